"""One shard: its staged blocks through the teacher and into the cache, in one static batch shape.

In: a manifest, staged blocks and a loaded teacher. Out: a committed shard, the same bytes wherever it was made.

Legend of axes: B blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cache_spec.commit import commit_shard
from cache_spec.manifest import Manifest
from cache_spec.receipts import read_receipt
from cache_spec.shardfile import Array
from pipeline.blocks import StagedBlocks
from pipeline.targets import encode_batch
from pipeline.teacher import Teacher


def capture_shard(
    cache: Path,
    manifest: Manifest,
    staged: StagedBlocks,
    teacher: Teacher,
    shard: int,
    on_tokens: Callable[[int], object] = lambda tokens: None,
) -> None:
    """Run the teacher over one shard's blocks and commit it; does nothing if the shard is committed."""
    if read_receipt(cache, manifest, shard) is not None:
        return
    first, count = manifest.blocks.shard_range(shard)
    batch = manifest.compute.batch_blocks
    parts = []
    for start in range(first, first + count, batch):
        num_blocks = min(batch, first + count - start)
        ids_BT, lengths_B = staged.read(start, num_blocks), staged.lengths(start, num_blocks)
        parts.append(encode_blocks(manifest, teacher, ids_BT, lengths_B, start))
        on_tokens(num_blocks * manifest.blocks.block_tokens)
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    commit_shard(cache, manifest, shard, rows)


def encode_blocks(
    manifest: Manifest, teacher: Teacher, ids_BT: Array, lengths_B: Array, first_block: int
) -> dict[str, Array]:
    """All arrays of at most one batch of blocks, computed in the one static batch shape of the cache."""
    num_blocks = len(ids_BT)
    missing = manifest.compute.batch_blocks - num_blocks
    if missing:
        # A smaller batch could round differently; repeating a block keeps the shape, and is cut off again.
        ids_BT = np.concatenate([ids_BT, np.repeat(ids_BT[-1:], missing, axis=0)])
        lengths_B = np.concatenate([lengths_B, np.repeat(lengths_B[-1:], missing)])
    arrays = encode_batch(
        teacher,
        ids_BT,
        lengths_B,
        k=manifest.encoding.k,
        step_nats=manifest.encoding.step_nats,
        temperatures=manifest.temperatures,
        window=manifest.hidden.window if manifest.hidden else None,
        first_block=first_block,
    )
    return {name: rows[:num_blocks] for name, rows in arrays.items()}
