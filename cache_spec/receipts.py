"""Receipts: one sealed JSON file per committed shard, and the seal that ends a cache.

In: a manifest and what was written. Out: records that bind each shard file's size and digest to the manifest.
A shard without a receipt does not exist; a cache without a seal is not finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pydantic import Field, ValidationError

from cache_spec.durable import replace_file
from cache_spec.errors import CacheError
from cache_spec.layout import array_specs
from cache_spec.manifest import MANIFEST_NAME, Manifest, Sha256, load_sealed, seal_json, sha256_hex
from cache_spec.record import Record
from cache_spec.smallfile import MAX_RECEIPT_BYTES, read_small, small_file_digest

SEAL_NAME = "seal.json"
RECEIPTS_FOLDER = "receipts"


class FileReceipt(Record):
    """Size and digest of one shard file."""

    num_bytes: int = Field(ge=1)
    sha256: str = Sha256


class Receipt(Record):
    """Proof that a shard is whole, and of which cache it is part."""

    fingerprint: str = Sha256
    shard: int = Field(ge=0)
    first_block: int = Field(ge=0)
    num_blocks: int = Field(ge=1)
    tokens_sha256: str = Sha256
    """Digest of the shard's ids as little-endian uint32."""
    teacher_sha256: str = Sha256
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


def receipt_path(cache: Path, shard: int) -> Path:
    return cache / RECEIPTS_FOLDER / f"{shard:08d}.json"


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


def small_file_errors(cache: Path, manifest: Manifest) -> Iterator[CacheError]:
    """What is wrong with the small files that the manifest lists: array metadata, tokenizer, teacher configuration."""
    for name, expected in sorted(manifest.files.items()):
        path, parts = cache / name, PurePosixPath(name)
        outside = parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name
        try:
            if outside or path.is_symlink() or any((cache / above).is_symlink() for above in list(parts.parents)[:-1]):
                yield CacheError("unsafe-path", name, expected="a plain file inside the cache")
                continue
            digest = small_file_digest(path)
        except OSError as error:
            yield CacheError("missing-file", path, found=error.strerror)
            continue
        if digest != expected:
            yield CacheError("file-mismatch", path, expected=expected, found=digest)


def _read_sealed(path: Path) -> str | None:
    """The body of a sealed JSON file as JSON again; None if there is no file, CacheError if it cannot be read."""
    try:
        return json.dumps(load_sealed(read_small(path, MAX_RECEIPT_BYTES), path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError("broken-json", path, found=error.strerror) from None


def read_receipt(cache: Path, manifest: Manifest, shard: int) -> Receipt | None:
    """The receipt of a shard, checked against the manifest; None if there is none."""
    path = receipt_path(cache, shard)
    body = _read_sealed(path)
    if body is None:
        return None
    try:
        receipt = Receipt.model_validate_json(body)
    except ValidationError as error:
        raise CacheError("bad-receipt", path, found=error.errors()[0]["msg"]) from None
    first_block, num_blocks = manifest.blocks.shard_range(shard)
    expected = (manifest.fingerprint, shard, first_block, num_blocks, manifest.teacher.weights_sha256)
    found = (receipt.fingerprint, receipt.shard, receipt.first_block, receipt.num_blocks, receipt.teacher_sha256)
    if expected != found or set(receipt.files) != set(array_specs(manifest)):
        raise CacheError("foreign-receipt", path, expected=f"shard {shard} of cache {manifest.fingerprint[:12]}")
    return receipt


def write_seal(cache: Path, manifest: Manifest) -> None:
    """Seal a cache whose shards all have receipts; CacheError ``unfinished-cache`` otherwise."""
    digest = receipts_digest(cache, manifest)
    seal = Seal(fingerprint=manifest.fingerprint, num_shards=manifest.blocks.num_shards, receipts_sha256=digest)
    replace_file(cache / SEAL_NAME, seal_json(seal.model_dump(mode="json")))


def read_seal(cache: Path, manifest: Manifest) -> Seal | None:
    """The seal of a finished cache, checked against the manifest; None if the cache is not finished."""
    path = cache / SEAL_NAME
    body = _read_sealed(path)
    if body is None:
        return None
    try:
        seal = Seal.model_validate_json(body)
    except ValidationError as error:
        raise CacheError("bad-seal", path, found=error.errors()[0]["msg"]) from None
    if (seal.fingerprint, seal.num_shards) != (manifest.fingerprint, manifest.blocks.num_shards):
        raise CacheError("bad-seal", path, expected=f"the seal of cache {manifest.fingerprint[:12]}")
    return seal


def receipts_digest(cache: Path, manifest: Manifest) -> str:
    """Digest over all receipts in shard order."""
    parts = []
    for shard in range(manifest.blocks.num_shards):
        if read_receipt(cache, manifest, shard) is None:
            raise unfinished(cache, manifest)
        parts.append(receipt_path(cache, shard).read_bytes())
    return sha256_hex(b"".join(parts))


def committed_shards(cache: Path, manifest: Manifest) -> list[int]:
    """Shards that have a receipt, ascending."""
    # Listed, not tried one after the other: a manifest may claim any number of shards.
    names = os.listdir(cache / RECEIPTS_FOLDER) if (cache / RECEIPTS_FOLDER).is_dir() else []
    shards = (shard_of_receipt(name) for name in names)
    return sorted(shard for shard in shards if shard is not None and shard < manifest.blocks.num_shards)


def shard_of_receipt(name: str) -> int | None:
    """Which shard's receipt a file's name is of; None for any other name."""
    stem = name.removesuffix(".json")
    is_number = stem.isascii() and stem.isdigit() and len(stem) < 20
    return int(stem) if is_number and receipt_path(Path(), int(stem)).name == name else None


def whole_shards(cache: Path, manifest: Manifest) -> set[int]:
    """Shards whose receipt is valid and whose files are all there with their sizes; contents are not read."""
    specs = array_specs(manifest)
    whole = set()
    for shard in range(manifest.blocks.num_shards):
        try:
            receipt = read_receipt(cache, manifest, shard)
            paths = {name: cache / spec.shard_path(shard) for name, spec in specs.items()}
            if receipt and all(os.lstat(paths[n]).st_size == file.num_bytes for n, file in receipt.files.items()):
                whole.add(shard)
        except (CacheError, OSError):
            continue
    return whole


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
