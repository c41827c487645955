"""Stores in memory for tests of the output: one that counts requests, and one of millions of shards."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator

from pipeline.errors import ObjectMissingError
from pipeline.stores.object_store import ObjectInfo, Versioned


class CountingStore:
    """A store in memory that counts requests, as many as S3 would bill."""

    def __init__(self) -> None:
        self.uri = "memory"
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, kind: str, number: int = 1) -> None:
        with self._lock:
            self.requests[kind] += number

    def read(self, key: str) -> bytes:
        self.count("GET")
        if key not in self.objects:
            raise ObjectMissingError(key)
        return self.objects[key]

    def read_versioned(self, key: str) -> Versioned:
        data = self.read(key)
        return Versioned(data=data, etag=str(hash(data)))

    def write(self, key: str, data: bytes) -> None:
        self.count("PUT")
        self.objects[key] = data

    def create(self, key: str, data: bytes) -> bool:
        self.count("PUT")
        return self.objects.setdefault(key, data) is data

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        self.count("PUT")
        if key not in self.objects or str(hash(self.objects[key])) != etag:
            return None
        self.objects[key] = data
        return str(hash(data))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        number = 0
        for number, info in enumerate(self.infos(prefix), start=1):
            if number % 1000 == 1:
                self.count("LIST")
            yield info
        if number == 0:
            self.count("LIST")

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        for key in sorted(key for key in list(self.objects) if key.startswith(prefix)):
            yield ObjectInfo(key=key, size_bytes=len(self.objects[key]), modified_s=0.0)

    def stat(self, key: str) -> ObjectInfo | None:
        self.count("HEAD")
        return None if key not in self.objects else ObjectInfo(key=key, size_bytes=len(self.objects[key]), modified_s=0)

    def delete(self, key: str) -> None:
        self.count("DELETE")
        self.objects.pop(key, None)

    def remove_unfinished(self, prefix: str, *, older_than_s: float) -> int:
        return 0

    def delete_all(self, keys: Iterable[str]) -> None:
        for number, key in enumerate(keys):
            if number % 1000 == 0:
                self.count("DELETE")
            self.objects.pop(key, None)


class VastStore(CountingStore):
    """Commit records of as many shards as one likes, some of them with parts; what they hold is not there."""

    def __init__(self, num_shards: int, num_parts: int, *, every: int) -> None:
        """Ranges with parts are complete; of the others every so-manieth shard is committed."""
        super().__init__()
        self.num_shards, self.num_parts, self.every = num_shards, num_parts, every

    def infos(self, prefix: str) -> Iterator[ObjectInfo]:
        if prefix == "_manifest/":
            for index in range(self.num_parts):
                yield self._info(f"_manifest/{index:05d}-10000-{index:064x}.parquet")
        elif prefix.startswith("_parts/"):
            digits = prefix.removeprefix("_parts/")
            first = int(digits.ljust(9, "0"))
            last = min(int(digits.ljust(9, "9")), self.num_shards - 1)
            for index in range(first, last + 1):
                if index < 10_000 * self.num_parts or index % self.every == 0:
                    yield self._info(f"_parts/{index:09d}.json")

    @staticmethod
    def _info(key: str) -> ObjectInfo:
        return ObjectInfo(key=key, size_bytes=600, modified_s=0.0)
