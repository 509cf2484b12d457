"""What a cache consists of when it is moved: files with their digests, and whether a store holds the same one.

In: a finished cache in a folder, or what a store says. Out: items in groups that belong together, their bytes compared
with their digests on the way, and a refusal where another cache lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from cache_spec.errors import CacheError, WouldLoseDataError
from cache_spec.layout import ArraySpec
from cache_spec.manifest import MANIFEST_NAME, Manifest, differences, sha256_hex
from cache_spec.reader import CacheReader
from cache_spec.receipts import (
    SEAL_NAME,
    Receipt,
    parse_seal,
    read_receipt,
    receipt_object,
    receipts_digest,
    unfinished,
)
from cache_spec.store import ReadableStore
from cache_spec.tables import table_paths

_PIECE_BYTES = 1 << 20
Element = TypeVar("Element")


class Item(NamedTuple):
    """One file of a cache."""

    name: str
    num_bytes: int
    sha256: str | None
    """None for a table's chunk, which only the values of the whole table have a digest of."""
    kind: str = "file-mismatch"
    """Of the error where the bytes are others."""


class Finished(NamedTuple):
    """A cache in a folder that is whole, as far as its sizes and small files tell."""

    path: Path
    manifest: Manifest
    specs: dict[str, ArraySpec]
    manifest_bytes: bytes
    seal_bytes: bytes

    @classmethod
    def open(cls, cache: Path) -> Self:
        """A finished cache; CacheError for one that is unfinished, or whose receipts are not those of its seal."""
        reader = CacheReader.open(cache)
        seal_bytes = (cache / SEAL_NAME).read_bytes()
        expected = parse_seal(seal_bytes, reader.manifest, cache / SEAL_NAME).receipts_sha256
        found = receipts_digest(cache, reader.manifest)
        if found != expected:
            raise CacheError("seal-mismatch", cache / SEAL_NAME, expected=expected, found=found)
        return cls(cache, reader.manifest, reader.specs, (cache / MANIFEST_NAME).read_bytes(), seal_bytes)

    def receipt(self, shard: int) -> Receipt:
        """A shard's receipt."""
        receipt = read_receipt(self.path, self.manifest, shard)
        if receipt is None:
            raise unfinished(self.path, self.manifest)
        return receipt

    def receipt_item(self, shard: int) -> Item:
        """A shard's receipt as a file."""
        data = (self.path / receipt_object(shard)).read_bytes()
        return Item(receipt_object(shard), len(data), sha256_hex(data))

    def shard_items(self, shard: int) -> list[Item]:
        """The files of a shard, its receipt apart."""
        return shard_items(self.specs, self.receipt(shard))

    def other_items(self) -> list[Item]:
        """Tables, then small files."""
        names = [(name, None) for name in table_paths(self.manifest)] + sorted(self.manifest.files.items())
        return [Item(name, (self.path / name).stat().st_size, digest) for name, digest in names]

    def pieces(self, item: Item) -> Iterator[bytes]:
        """The bytes of a file; CacheError at its end if they are not those of the item."""
        digest, num_bytes, path = hashlib.sha256(), 0, self.path / item.name
        try:
            with open(path, "rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    digest.update(piece)
                    num_bytes += len(piece)
                    yield piece
        except FileNotFoundError:
            raise CacheError("missing-shard", path, found="no such file") from None
        check(item, num_bytes, digest.hexdigest(), path)


def shard_items(specs: dict[str, ArraySpec], receipt: Receipt) -> list[Item]:
    """The files of a shard, in the order of the arrays."""
    files = receipt.files
    return [
        Item(spec.shard_path(receipt.shard), files[name].num_bytes, files[name].sha256, "shard-digest")
        for name, spec in specs.items()
    ]


def check(item: Item, num_bytes: int, sha256: str, place: object) -> None:
    """Refuse bytes that are not the item's: CacheError ``truncated-shard``, or of the item's kind."""
    if num_bytes != item.num_bytes:
        kind = "truncated-shard" if item.kind == "shard-digest" else item.kind
        raise CacheError(kind, place, expected=f"{item.num_bytes} bytes", found=num_bytes)
    if item.sha256 is not None and sha256 != item.sha256:
        raise CacheError(item.kind, place, expected=item.sha256, found=sha256)


def refuse_another(store: ReadableStore, cache: Finished) -> tuple[bool, bool]:
    """Whether a store holds the cache's manifest, and its seal; WouldLoseDataError ``other-cache`` for another's."""
    found = [store.get(MANIFEST_NAME), store.get(SEAL_NAME)]
    hint = "push to another address, or delete what is there"
    if found[0] is not None and found[0] != cache.manifest_bytes:
        there = Manifest.from_json(found[0], f"{store.url}/{MANIFEST_NAME}")
        told = differences(there, cache.manifest)
        same = told[0] if told else "the same settings, captured another time"
        raise WouldLoseDataError(
            "other-cache", store.url, expected=cache.manifest.fingerprint[:12], found=same, hint=hint
        )
    if found[1] is not None and found[1] != cache.seal_bytes:
        raise WouldLoseDataError("other-cache", store.url, found="a seal over other shards", hint=hint)
    return found[0] is not None, found[1] is not None


def in_batches(elements: Iterable[Element], size: int) -> Iterator[list[Element]]:
    """Lists of at most ``size`` elements."""
    left = iter(elements)
    while batch := list(islice(left, size)):
        yield batch
