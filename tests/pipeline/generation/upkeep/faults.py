"""Faults of a finished run, one field or one object each, by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.generation.output.manifest import MANIFEST_KEY
from pipeline.stores.object_store import ObjectStore
from tests.pipeline.generation.upkeep.small_run import tars

Fault = Callable[[ObjectStore], None]


def other_digit(text: str) -> str:
    """One hexadecimal digit of a digest altered: of the long one in a key."""
    place = max(match.start() for match in re.finditer(r"[0-9a-f]{32,}", text)) + 20
    return f"{text[:place]}{'0' if text[place] != '0' else '1'}{text[place + 1 :]}"


def edit(key: str, name: str, change: Callable[[Any], Any]) -> Fault:
    """A field of a JSON record, edited by hand."""

    def apply(store: ObjectStore) -> None:
        record = json.loads(store.read(key))
        record[name] = change(record[name])
        store.write(key, json.dumps(record).encode())

    return apply


def write(key: str, data: bytes) -> Fault:
    return lambda store: store.write(key, data)


def delete(key: str) -> Fault:
    return lambda store: store.delete(key)


def flip(store: ObjectStore, key: str) -> None:
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.write(key, bytes(data))


def named_part(store: ObjectStore) -> str:
    key: str = json.loads(store.read(MANIFEST_KEY))["parts"][0]["key"]
    return key


def of_record(index: int) -> dict[str, Fault]:
    key = f"_parts/{index:09d}.json"
    return {
        f"record {index} num_samples": edit(key, "num_samples", lambda number: number - 1),
        f"record {index} size_bytes": edit(key, "size_bytes", lambda number: number + 1),
        f"record {index} sha256": edit(key, "sha256", other_digit),
        f"record {index} key": edit(key, "key", other_digit),
        f"record {index} first_id": edit(key, "first_id", lambda number: number + 1),
        f"record {index} index": edit(key, "index", lambda number: number + 1),
        f"record {index} spec_digest": edit(key, "spec_digest", other_digit),
        f"record {index} model_digest": edit(key, "model_digest", other_digit),
        f"record {index} made": edit(key, "made", lambda _: {}),
        f"record {index} gone": delete(key),
        f"record {index} damaged": write(key, b"{"),
    }


def of_removal(index: int, sequence: int) -> dict[str, Fault]:
    key, name = f"_removed/{index:09d}-{sequence:04d}.json", f"removal {index}-{sequence}"
    return {
        f"{name} ids": edit(key, "ids", lambda ids: [*ids[:-1], ids[-1] + 1]),
        f"{name} more ids": edit(key, "ids", lambda ids: [*ids, ids[-1] + 1]),
        f"{name} key": edit(key, "key", other_digit),
        f"{name} sha256": edit(key, "sha256", other_digit),
        f"{name} size_bytes": edit(key, "size_bytes", lambda number: number + 1),
        f"{name} num_samples": edit(key, "num_samples", lambda number: number + 1),
        f"{name} old_key": edit(key, "old_key", other_digit),
        f"{name} old_sha256": edit(key, "old_sha256", other_digit),
        f"{name} old_size_bytes": edit(key, "old_size_bytes", lambda number: number + 1),
        f"{name} index": edit(key, "index", lambda number: number + 1),
        f"{name} sequence": edit(key, "sequence", lambda number: number + 1),
        f"{name} gone": delete(key),
        f"{name} damaged": write(key, b"{"),
    }


def _seed(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "seed": spec["seed"] + 1}


def _part_key(change: Callable[[str], str]) -> Fault:
    return edit(MANIFEST_KEY, "parts", lambda parts: [{**parts[0], "key": change(parts[0]["key"])}])


OF_MANIFEST: dict[str, Fault] = {
    "manifest damaged": write(MANIFEST_KEY, b"nothing"),
    "manifest spec": edit(MANIFEST_KEY, "spec", _seed),
    "manifest spec_digest": edit(MANIFEST_KEY, "spec_digest", other_digit),
    "manifest num_images 19": edit(MANIFEST_KEY, "num_images", lambda _: 19),
    "manifest num_images 12": edit(MANIFEST_KEY, "num_images", lambda _: 12),
    "manifest num_images 26": edit(MANIFEST_KEY, "num_images", lambda _: 26),
    "manifest num_images none": edit(MANIFEST_KEY, "num_images", lambda _: None),
    "manifest parts none": edit(MANIFEST_KEY, "parts", lambda _: []),
    "manifest part digest": _part_key(other_digit),
    "manifest part number": _part_key(lambda key: key.replace("00000-00004", "00000-00003")),
    "manifest class_names": edit(MANIFEST_KEY, "class_names", lambda _: 3),
}
OF_OBJECTS: dict[str, Fault] = {
    "part gone": lambda store: store.delete(named_part(store)),
    "part altered": lambda store: flip(store, named_part(store)),
    "tar 1 gone": lambda store: store.delete(tar(store, 1)),
    "tar 1 altered": lambda store: flip(store, tar(store, 1)),
    "tar 3 gone": lambda store: store.delete(tar(store, 3)),
    "config gone": delete("config.toml"),
    "config damaged": write("config.toml", b"sample = ["),
    "config seed": lambda store: store.write(
        "config.toml", store.read("config.toml").replace(b"seed = 0", b"seed = 5")
    ),
    "ledger damaged": write("ledger.json", b"{"),
}


def tar(store: ObjectStore, index: int) -> str:
    """The tar that stands of a shard, by the largest part that is there and whole, whatever the manifest says."""
    folder = Path(store.uri)
    return min(
        (path.name for path in folder.glob(f"{index:09d}-*")),
        default=f"{index:09d}-{'0' * 64}.tar",
    )


__all__ = ["OF_MANIFEST", "OF_OBJECTS", "Fault", "of_record", "of_removal", "tar", "tars"]
