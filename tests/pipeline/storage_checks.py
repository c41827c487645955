"""What several tests of object stores check."""

from pipeline.stores.storage import ObjectStore


def keys_of(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def check_one_line(error: BaseException, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 500, text
    for part in parts:
        assert part in text, f"{part!r} not in {text!r}"
