"""Receipts: one sealed JSON file per committed shard, and the seal that ends a cache.

In: a manifest and what was written. Out: records that bind each shard file's size and digest to the manifest.
A shard without a receipt does not exist; a cache without a seal is not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

from pydantic import Field, ValidationError

from cache_spec.durable import replace_file
from cache_spec.errors import CacheError
from cache_spec.layout import array_specs
from cache_spec.manifest import MANIFEST_NAME, Manifest, Sha256, load_sealed, seal_json
from cache_spec.record import Record
from cache_spec.smallfile import MAX_RECEIPT_BYTES, read_small, small_file_digest

SEAL_NAME = "seal.json"
RECEIPTS_FOLDER = "receipts"
MOST_UNSEEN_SHARDS = 200_000


class FileReceipt(Record):
    """Size and digests of one shard file."""

    num_bytes: int = Field(ge=1)
    end_crc32c: int = Field(ge=0, lt=1 << 32)
    """Of its last chunk's checksum and its index: what a reader compares that does not read the whole file."""
    sha256: str = Sha256


class Receipt(Record):
    """Proof that a shard is whole, and of which cache it is part."""

    fingerprint: str = Sha256
    shard: int = Field(ge=0)
    first_block: int = Field(ge=0)
    num_blocks: int = Field(ge=1)
    tokens_sha256: str = Sha256
    """Digest of the shard's ids as little-endian uint32."""
    teacher_sha256: Annotated[str, Sha256] | None
    """Digest of the teacher's weights, where the manifest has one."""
    files: dict[str, FileReceipt]
    """One entry per array."""

    @property
    def num_bytes(self) -> int:
        """Of the shard's files."""
        return sum(file.num_bytes for file in self.files.values())

    def to_json(self) -> bytes:
        """Sealed, as it is stored."""
        return seal_json(self.model_dump(mode="json"))


class Seal(Record):
    """Written once, when every shard has its receipt."""

    fingerprint: str = Sha256
    num_shards: int = Field(ge=1)
    receipts_sha256: str = Sha256
    """Digest over the bytes of all receipts in shard order."""

    def to_json(self) -> bytes:
        """Sealed, as it is stored."""
        return seal_json(self.model_dump(mode="json"))


def receipt_name(shard: int) -> str:
    """Of the receipt, inside the folder of receipts."""
    return f"{shard:08d}.json"


def receipt_path(cache: Path, shard: int) -> Path:
    return cache / receipt_object(shard)


def receipt_object(shard: int) -> str:
    """Of the receipt, relative to the cache."""
    return f"{RECEIPTS_FOLDER}/{receipt_name(shard)}"


def read_manifest(cache: Path) -> Manifest:
    """The manifest of a cache folder; CacheError ``not-a-cache`` if there is none."""
    path = cache / MANIFEST_NAME
    try:
        data = read_small(path)
    except OSError as error:
        raise CacheError(
            "not-a-cache", cache, expected=f"a folder with {MANIFEST_NAME}", found=error.strerror
        ) from None
    return Manifest.from_json(data, path)


def is_inside(name: str) -> bool:
    """Whether a small file's name leads nowhere out of the cache, on any system."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(name) & {"\\", "\0"}


def small_file_errors(cache: Path, manifest: Manifest) -> Iterator[CacheError]:
    """What is wrong with the small files that the manifest lists: array metadata, tokenizer, teacher configuration."""
    for name, expected in sorted(manifest.files.items()):
        path = cache / name
        try:
            above = [cache / folder for folder in list(PurePosixPath(name).parents)[:-1]]
            if not is_inside(name) or any(part.is_symlink() for part in (path, *above)):
                yield CacheError("unsafe-path", name, expected="a plain file inside the cache")
                continue
            digest = small_file_digest(path)
        except OSError as error:
            yield CacheError("missing-file", path, found=error.strerror)
            continue
        if digest != expected:
            yield CacheError("file-mismatch", path, expected=expected, found=digest)


def _read(path: Path) -> bytes | None:
    """Content of a sealed JSON file; None if there is no file, CacheError if it cannot be read."""
    try:
        return read_small(path, MAX_RECEIPT_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError("broken-json", path, found=error.strerror) from None


def read_receipt(cache: Path, manifest: Manifest, shard: int) -> Receipt | None:
    """The receipt of a shard, checked against the manifest; None if there is none."""
    return _read_receipt(cache, manifest, shard, _Common.of(manifest))


def read_receipts(cache: Path, manifest: Manifest) -> Iterator[tuple[int, Receipt | None]]:
    """Every shard with its receipt; None if there is none, or none that can be used."""
    common = _Common.of(manifest)
    for shard in range(manifest.blocks.num_shards):
        try:
            yield shard, _read_receipt(cache, manifest, shard, common)
        except CacheError:
            yield shard, None


class _Common(NamedTuple):
    """What all receipts of a cache say alike, made once: it takes as long as reading one."""

    fingerprint: str
    arrays: frozenset[str]

    @classmethod
    def of(cls, manifest: Manifest) -> _Common:
        return cls(manifest.fingerprint, frozenset(array_specs(manifest)))


def _read_receipt(cache: Path, manifest: Manifest, shard: int, common: _Common) -> Receipt | None:
    path = receipt_path(cache, shard)
    data = _read(path)
    return None if data is None else _parsed(data, manifest, shard, path, common)


def parse_receipt(data: bytes, manifest: Manifest, shard: int, place: object) -> Receipt:
    """A receipt from its bytes, checked against the manifest; CacheError ``bad-receipt``, ``foreign-receipt``."""
    return _parsed(data, manifest, shard, place, _Common.of(manifest))


def _parsed(data: bytes, manifest: Manifest, shard: int, place: object, common: _Common) -> Receipt:
    try:
        receipt = Receipt.model_validate_json(json.dumps(load_sealed(data, place)))
    except ValidationError as error:
        raise CacheError("bad-receipt", place, found=error.errors()[0]["msg"]) from None
    first_block, num_blocks = manifest.blocks.shard_range(shard)
    expected = (common.fingerprint, shard, first_block, num_blocks, manifest.teacher.weights_sha256)
    found = (receipt.fingerprint, receipt.shard, receipt.first_block, receipt.num_blocks, receipt.teacher_sha256)
    if expected != found or receipt.files.keys() != common.arrays:
        raise CacheError("foreign-receipt", place, expected=f"shard {shard} of cache {common.fingerprint[:12]}")
    return receipt


def write_seal(cache: Path, manifest: Manifest) -> Seal:
    """Seal a cache whose shards all have receipts; CacheError ``unfinished-cache`` otherwise."""
    seal = make_seal(manifest, receipts_digest(cache, manifest))
    replace_file(cache / SEAL_NAME, seal.to_json())
    return seal


def make_seal(manifest: Manifest, receipts_sha256: str) -> Seal:
    """The seal of a cache whose receipts have this digest."""
    num_shards = manifest.blocks.num_shards
    return Seal(fingerprint=manifest.fingerprint, num_shards=num_shards, receipts_sha256=receipts_sha256)


def read_seal(cache: Path, manifest: Manifest) -> Seal | None:
    """The seal of a finished cache, checked against the manifest; None if the cache is not finished."""
    path = cache / SEAL_NAME
    data = _read(path)
    return None if data is None else parse_seal(data, manifest, path)


def parse_seal(data: bytes, manifest: Manifest, place: object) -> Seal:
    """A seal from its bytes, checked against the manifest; CacheError ``bad-seal``."""
    try:
        seal = Seal.model_validate_json(json.dumps(load_sealed(data, place)))
    except ValidationError as error:
        raise CacheError("bad-seal", place, found=error.errors()[0]["msg"]) from None
    if (seal.fingerprint, seal.num_shards) != (manifest.fingerprint, manifest.blocks.num_shards):
        raise CacheError("bad-seal", place, expected=f"the seal of cache {manifest.fingerprint[:12]}")
    return seal


def receipts_digest(cache: Path, manifest: Manifest) -> str:
    """Digest over all receipts in shard order."""
    digest, common = hashlib.sha256(), _Common.of(manifest)
    for shard in range(manifest.blocks.num_shards):
        receipt = _read_receipt(cache, manifest, shard, common)
        if receipt is None:
            raise unfinished(cache, manifest)
        digest.update(receipt.to_json())  # its bytes, as a sealed file has one form alone
    return digest.hexdigest()


def committed_shards(cache: Path, manifest: Manifest) -> list[int]:
    """Shards that have a receipt, ascending."""
    folder = cache / RECEIPTS_FOLDER
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    return [shard for shard in range(manifest.blocks.num_shards) if receipt_name(shard) in names]


def refuse_absurd(cache: Path, manifest: Manifest) -> None:
    """Raise ``unfinished-cache`` where a manifest claims so many shards that to go through them would not end."""
    folder = cache / RECEIPTS_FOLDER
    refuse_endless(manifest, len(os.listdir(folder)) if folder.is_dir() else 0, cache)


def refuse_endless(manifest: Manifest, num_receipts: int, place: object) -> None:
    """As ``refuse_absurd``, where so many receipts are known to be there."""
    if manifest.blocks.num_shards > MOST_UNSEEN_SHARDS + num_receipts:
        found = f"{num_receipts} receipts"
        raise CacheError("unfinished-cache", place, expected=f"{manifest.blocks.num_shards} shards", found=found)


def unfinished(cache: Path, manifest: Manifest) -> CacheError:
    """The error for a cache with shards missing."""
    done = len(committed_shards(cache, manifest))
    return CacheError(
        "unfinished-cache",
        cache,
        expected=f"{manifest.blocks.num_shards} shards and a seal",
        found=f"{done} shards",
        hint="run the command that began it again to finish it",
    )
