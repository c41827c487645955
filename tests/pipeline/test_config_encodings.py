"""Files that are not the text that they should be: how they were saved, and what is there instead."""

import codecs
from dataclasses import dataclass

import pytest

from pipeline.config_io import from_json, read_toml
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Job:
    output: str


def test_a_byte_order_mark_in_utf_8_is_read() -> None:
    for text in ("output = 'a'", b"output = 'a'"):
        marked = "\ufeff" + text if isinstance(text, str) else codecs.BOM_UTF8 + text
        assert read_toml(Job, marked, "x.toml") == read_toml(Job, text, "x.toml")
    assert from_json(Job, codecs.BOM_UTF8 + b'{"output":"a"}', "x") == from_json(Job, b'{"output":"a"}', "x")


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ("output = 'ä'".encode("utf-16"), "is UTF-16 text, or none at all; save it as UTF-8"),
        ("output = 'ä'".encode("utf-16-le"), "is UTF-16 text, or none at all; save it as UTF-8"),
        (codecs.BOM_UTF16_BE + "output = 'ä'".encode("utf-16-be"), "is UTF-16 text"),
        ("output = 'ä'".encode("utf-32"), "save it as UTF-8"),
        (b"\xff\xfe", "is UTF-16 text"),
        ("# x\noutput = 'ä'".encode("latin-1"), "byte 0xe4 in line 2 is not UTF-8; save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "byte 0x89 in line 1 is not UTF-8"),
    ],
)
def test_a_file_that_is_not_utf_8_says_how_to_save_it(data: bytes, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_toml(Job, data, "x.toml")
    assert str(caught.value).startswith(f"x.toml: not valid TOML: {rule}" if rule[:2] in ("is", "by") else "x.toml: ")
    assert rule in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"<!DOCTYPE html>\n<html>404", '; it starts with "<!DOCTYPE html> <html>404"'),
        (b"", "; it is empty"),
        (b" \n", "; it is empty"),
        (b"[" * 100_000, '; it starts with "[[['),
        (b"\x1f\x8b\x08", "; it starts with "),
    ],
)
def test_json_that_is_none_shows_how_it_starts(data: bytes, found: str) -> None:
    """A web page of a proxy, say."""
    with pytest.raises(ConfigError) as caught:
        from_json(Job, data, "x.json")
    line = str(caught.value)
    assert line.startswith("x.json: not valid JSON: ") and found in line and "\n" not in line
    assert len(line) < 300
