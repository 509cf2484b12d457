"""A cache of one shard made to look like one of many equal shards, to time opening, listing and resuming it.

In: a finished cache of one shard, and a count. Out: the same folder with that many shards, their receipts and a seal.
Its tokens no longer have the manifest's digest: that alone ``verify`` finds.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cache_spec.layout import array_specs, zarr_metadata
from cache_spec.manifest import MANIFEST_NAME, seal_json, sha256_hex
from cache_spec.receipts import SEAL_NAME, Seal, read_manifest, read_receipt, receipt_path


def multiply(cache: Path, times: int, *, link: bool) -> None:
    """Give the one shard's files to each number, as hard links where ``link``; nothing is synced."""
    one = read_manifest(cache)
    receipt = read_receipt(cache, one, 0)
    assert one.blocks.num_shards == 1
    assert receipt is not None
    blocks, corpus = one.blocks, one.corpus
    many = one.model_copy(
        update={
            "blocks": blocks.model_copy(update={"num_blocks": blocks.num_blocks * times}),
            "corpus": corpus.model_copy(update={"num_tokens": corpus.num_tokens * times}),
        }
    )
    metadata = zarr_metadata(many)
    digests = {name: sha256_hex(data) for name, data in metadata.items()}
    many = many.model_copy(update={"files": {**many.files, **digests}})
    for name, data in {**metadata, MANIFEST_NAME: many.to_json()}.items():
        (cache / name).write_bytes(data)
    for spec in array_specs(many).values():
        first = cache / spec.shard_path(0)
        data = first.read_bytes()
        for shard in range(1, times):
            path = cache / spec.shard_path(shard)
            if link:
                os.link(first, path)
            else:
                path.write_bytes(data)
    body, digest = receipt.model_dump(mode="json"), hashlib.sha256()
    for shard in range(times):
        changed = {"fingerprint": many.fingerprint, "shard": shard, "first_block": shard * blocks.num_blocks}
        sealed = seal_json({**body, **changed})
        digest.update(sealed)
        receipt_path(cache, shard).write_bytes(sealed)
    seal = Seal(fingerprint=many.fingerprint, num_shards=times, receipts_sha256=digest.hexdigest())
    (cache / SEAL_NAME).write_bytes(seal_json(seal.model_dump(mode="json")))
