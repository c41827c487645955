"""One image of a shard, as every container holds it."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.data.image_formats import Extension


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image of a shard."""

    key: str
    """Name within the shard, no "." in it (WebDataset cuts keys at the first dot)."""
    image: bytes
    """The image, as its extension says."""
    extension: Extension = "png"
    """How the image is coded."""
    cls: int | None = None
    """Label; None: the shard has none for it."""
    meta: dict[str, Any]
    """JSON values: where the image came from, or how it was made."""
    offset_bytes: int | None = field(default=None, compare=False)
    """Where the image begins in the tar that the sample was read from; None: it was not read from one."""


def check_key(key: str, seen: set[str]) -> None:
    """Refuse a key that some container could not hold, and remember it.

    Args:
        key: The key of a sample.
        seen: The keys before it in its shard; gets this one too.

    Raises:
        ValueError: If a key is empty, repeated, longer than 90 bytes, not ASCII, or has a "." or "/" in it.
    """
    if not key or key in seen or len(key) > 90 or not key.isascii() or set("./\0") & set(key):
        raise ValueError(f"key: must be unique ASCII of 1 to 90 letters without '.' or '/', got {key!r}")
    seen.add(key)
