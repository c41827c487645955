"""Model URIs: taken apart as they were put together, and refused where they are none."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ModelMissingError
from pipeline.models.model_uri import absolute_model_uri, parse_registered, split_average

PLACES = ("models:/ddpm@candidate", "models:/ddpm/3", "artifacts/checkpoints/step-1", "s3://b/p", "file:///a?b=c")


@given(place=st.sampled_from(PLACES), halflife=st.integers(1, 10**12))
def test_the_average_is_what_stands_at_the_end(place: str, halflife: int) -> None:
    assert split_average(place) == (place, None)
    assert split_average(f"{place}?ema={halflife}") == (place, halflife)


def test_a_uri_for_processes_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_model_uri("run/step-1") == f"{tmp_path}/run/step-1"
    assert absolute_model_uri("run/step-1?ema=5") == f"{tmp_path}/run/step-1?ema=5"
    for uri in ("models:/ddpm@candidate", "models:/ddpm/3?ema=5", "s3://b/p?ema=5", "/a/b"):
        assert absolute_model_uri(uri) == uri


@pytest.mark.parametrize("place", ["models:/a/1", "models:/a@b", "some/folder", "s3://b/p"])
@pytest.mark.parametrize("value", ["0", "", "abc", "-5", "5.0", "5?ema="])
def test_what_is_no_half_life_is_refused(place: str, value: str) -> None:
    with pytest.raises(ModelMissingError, match=r"\?ema=: a whole number of images above 0, got '"):
        split_average(f"{place}?ema={value}")


@pytest.mark.parametrize("uri", ["models:/a/1?EMA=5", "models:/a@b?foo=1", "models:/a?foo@b", "models:/a@b?"])
def test_other_questions_are_no_model_uri(uri: str) -> None:
    assert split_average(uri) == (uri, None)
    with pytest.raises(ModelMissingError, match="is no model URI"):
        parse_registered(uri)


def test_versions_aliases_and_checkpoints_are_told_apart() -> None:
    version, alias = parse_registered("models:/a.b/12"), parse_registered("models:/a@c")
    assert version is not None and (version.name, version.version, version.alias) == ("a.b", "12", None)
    assert alias is not None and (alias.name, alias.version, alias.alias) == ("a", None, "c")
    assert parse_registered("some/folder") is None
