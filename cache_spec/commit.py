"""Commit one shard: every array's file, then the receipt, so that a kill at any moment loses nothing acknowledged.

In: the decoded rows of one shard. Out: its files packed, then published, and their receipt. The first commit wins: a
slow twin finds the receipt and throws its own work away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from cache_spec.durable import make_folder, publish_new, replace_file, sync_folder, write_temporary, writing
from cache_spec.layout import array_specs, zarr_metadata
from cache_spec.manifest import MANIFEST_NAME, Manifest, sha256_hex
from cache_spec.receipts import RECEIPTS_FOLDER, FileReceipt, Receipt, read_receipt, receipt_path
from cache_spec.shardfile import encode_shard, end_crc32c
from cache_spec.tables import table_digests, write_tables
from cache_spec.targets import Array

PUBLISH_LOCK = ".publish.lock"


def tokens_digest(input_ids: Array) -> str:
    """SHA-256 of ids as little-endian uint32, whatever dtype they are stored in."""
    return hashlib.sha256(np.ascontiguousarray(input_ids, dtype="<u4").tobytes()).hexdigest()


def create_cache(cache: Path, manifest: Manifest, tables: Mapping[str, Array] | None = None) -> Manifest:
    """Write the array metadata and tables, then the manifest with the digest of each; returns that manifest.

    ``manifest.files`` names small files that lie in the folder already (tokenizer, teacher configuration);
    ``tables`` holds the values of what the encoding stores once.
    """
    tables = tables or {}
    manifest = manifest.model_copy(update={"tables": table_digests(tables)})
    metadata = zarr_metadata(manifest)
    digests = {path: sha256_hex(data) for path, data in metadata.items()}
    manifest = manifest.model_copy(update={"files": {**manifest.files, **digests}})
    make_folder(cache / RECEIPTS_FOLDER)
    for path, data in metadata.items():
        make_folder((cache / path).parent)
        replace_file(cache / path, data)
    write_tables(cache, manifest, tables)
    replace_file(cache / MANIFEST_NAME, manifest.to_json())
    return manifest


class PackedShard(NamedTuple):
    """One shard as it will be stored."""

    receipt: Receipt
    files: dict[str, bytes]
    """Content of each array's file."""


def pack_shard(manifest: Manifest, shard: int, arrays: Mapping[str, Array]) -> PackedShard:
    """Encode one shard.

    ``arrays`` holds, for every array of the cache, the rows of this shard: shape [num_blocks, *row_shape].
    """
    specs = array_specs(manifest)
    first_block, num_blocks = manifest.blocks.shard_range(shard)
    assert set(arrays) == set(specs), (sorted(arrays), sorted(specs))
    assert all(len(rows) == num_blocks for rows in arrays.values())
    files = {name: encode_shard(spec, arrays[name]) for name, spec in specs.items()}
    receipt = Receipt(
        fingerprint=manifest.fingerprint,
        shard=shard,
        first_block=first_block,
        num_blocks=num_blocks,
        tokens_sha256=tokens_digest(arrays["input_ids"]),
        teacher_sha256=manifest.teacher.weights_sha256,
        files={
            name: FileReceipt(num_bytes=len(data), end_crc32c=end_crc32c(specs[name], data), sha256=sha256_hex(data))
            for name, data in files.items()
        },
    )
    return PackedShard(receipt, files)


def commit_shard(cache: Path, manifest: Manifest, shard: int, arrays: Mapping[str, Array]) -> Receipt:
    """Pack and publish one shard; returns its receipt, an earlier one's if it was there first."""
    return publish_shard(cache, manifest, pack_shard(manifest, shard, arrays))


def publish_shard(cache: Path, manifest: Manifest, packed: PackedShard) -> Receipt:
    """Write, check and publish a packed shard; returns its receipt, an earlier one's if it was there first."""
    specs, (receipt, files) = array_specs(manifest), packed
    shard = receipt.shard
    temporaries: dict[str, Path] = {}
    try:
        for name, spec in specs.items():
            temporaries[name] = write_temporary(cache / spec.shard_path(shard), files[name])
        temporaries[RECEIPTS_FOLDER] = write_temporary(receipt_path(cache, shard), receipt.to_json())
        with writing(cache), FileLock(cache / PUBLISH_LOCK):
            earlier = read_receipt(cache, manifest, shard)
            if earlier is not None:
                return earlier
            for name, spec in specs.items():
                path = cache / spec.shard_path(shard)
                # No receipt, and nobody else publishes while we hold the lock: a file here is a killed run's orphan.
                path.unlink(missing_ok=True)
                publish_new(temporaries[name], path)
                sync_folder(path.parent)
            publish_new(temporaries[RECEIPTS_FOLDER], receipt_path(cache, shard))
            sync_folder(cache / RECEIPTS_FOLDER)
    finally:
        with writing(cache):
            for temporary in temporaries.values():
                temporary.unlink(missing_ok=True)
    return receipt
