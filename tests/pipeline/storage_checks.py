"""What several tests of object stores check."""

import re

from pipeline.stores.storage import ObjectStore


def keys_of(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def check_one_line(error: BaseException, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 500, text
    for part in parts:
        assert part in text, f"{part!r} not in {text!r}"


def tried_again_for_s(error: BaseException) -> float:
    """How long the error says that the request was tried again: never an exact figure, since machines differ."""
    said = re.search(r"\(tried again for ([0-9.]+) s\)", str(error))
    assert said is not None, str(error)
    return float(said[1])
