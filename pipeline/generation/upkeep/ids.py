"""Sample ids as an operator writes them."""

from pipeline.errors import ConfigError
from pipeline.generation.output.manifest import GenerationManifest

_MOST = 100_000


def parse_ids(text: str) -> tuple[int, ...]:
    """Ids, ascending and each once.

    Args:
        text: Such as 4711,4712 or 100-199.

    Raises:
        ConfigError: If it is none.
    """
    found: set[int] = set()
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"ids: must be whole numbers like 4711,4712 or 100-199, got {text!r}; write them so")
        stop = int(last) if dash else int(first)
        if stop - int(first) >= _MOST:
            raise ConfigError(f"ids: must be at most {_MOST:,} at once, got {word}; split them")
        found |= set(range(int(first), stop + 1))
    if not found:
        raise ConfigError(f"ids: must name images, got {text!r}; write them like 4711,4712")
    return tuple(sorted(found))


def by_shard(manifest: GenerationManifest, ids: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """The ids of each shard that holds some, by its index.

    Raises:
        ConfigError: If the run has no such image.
    """
    if beyond := [one for one in ids if one >= manifest.num_images]:
        raise ConfigError(
            f"ids: must be below {manifest.num_images}, the run's number of images, got {beyond[0]}; leave it out"
        )
    shards: dict[int, list[int]] = {}
    for one in ids:
        shards.setdefault(one // manifest.spec.shard_size, []).append(one)
    return {index: tuple(of_shard) for index, of_shard in shards.items()}
