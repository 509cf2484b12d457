"""One shard: its staged blocks through the teacher and into the cache, in one static batch shape.

In: a manifest, staged blocks, a loaded teacher and the encoder of the cache. Out: a committed shard, the same bytes
wherever it was made.

Legend of axes: B blocks, T tokens, W windows, D teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from cache_spec.commit import commit_shard
from cache_spec.encodings.hidden import encode_int8
from cache_spec.manifest import HiddenInfo, Manifest
from cache_spec.receipts import Receipt, read_receipt
from cache_spec.targets import Array
from pipeline.blocks import StagedBlocks
from pipeline.encoders import make_encoder
from pipeline.encoders.spectrum import Encoder
from pipeline.overlap import overlapped
from pipeline.targets import encode_batch
from pipeline.teacher import OutputHead, Teacher


def encoder_of(manifest: Manifest, tables: Mapping[str, Array], device: torch.device) -> Encoder:
    """The encoder of a cache, with its tables on the device that the teacher is on."""
    return make_encoder(manifest.encoding, manifest.geometry, tables=tables, device=device)


def capture_shard(
    cache: Path,
    manifest: Manifest,
    staged: StagedBlocks,
    teacher: Teacher,
    encoder: Encoder,
    shard: int,
    on_tokens: Callable[[int], object] = lambda tokens: None,
) -> Receipt:
    """Run the teacher over one shard's blocks and commit it, if it is not committed; returns its receipt."""
    earlier = read_receipt(cache, manifest, shard)
    if earlier is not None:
        return earlier
    made = _read_by_teacher(manifest, staged, teacher, shard, on_tokens)

    def encoded(batch: _Batch) -> dict[str, Array]:
        return encode_hidden(manifest, teacher.head, encoder, *batch)

    parts = overlapped(made, encoded) if overlaps(teacher.device) else [encoded(batch) for batch in made]
    return commit_shard(cache, manifest, shard, joined(parts))


def overlaps(device: torch.device) -> bool:
    """Whether the teacher's next batch runs while the last one is encoded: on a CPU both want the same cores."""
    return device.type == "cuda"


_Batch = tuple[torch.Tensor, Array, Array, int]
"""Last hidden states of a batch in the static shape; ids, lengths and the number of its first block."""


def _read_by_teacher(
    manifest: Manifest, staged: StagedBlocks, teacher: Teacher, shard: int, on_tokens: Callable[[int], object]
) -> Iterator[_Batch]:
    for start, count in batches(manifest, shard):
        ids_BT = staged.read(start, count)
        hidden_BTD = teacher.hidden(padded(ids_BT, manifest.compute.batch_blocks))
        yield hidden_BTD, ids_BT, staged.lengths(start, count), start
        on_tokens(count * manifest.blocks.block_tokens)


def batches(manifest: Manifest, shard: int) -> list[tuple[int, int]]:
    """First block and number of blocks of each batch of a shard."""
    first, count = manifest.blocks.shard_range(shard)
    size = manifest.compute.batch_blocks
    return [(start, min(size, first + count - start)) for start in range(first, first + count, size)]


def joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    """The arrays of consecutive batches as those of one shard."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def encode_blocks(
    manifest: Manifest, teacher: Teacher, encoder: Encoder, ids_BT: Array, lengths_B: Array, first_block: int
) -> dict[str, Array]:
    """All arrays of at most one batch of blocks, computed in the one static batch shape of the cache."""
    size = manifest.compute.batch_blocks
    hidden_BTD = teacher.hidden(padded(ids_BT, size))
    return encode_hidden(manifest, teacher.head, encoder, hidden_BTD, ids_BT, lengths_B, first_block)


def encode_hidden(
    manifest: Manifest,
    head: OutputHead,
    encoder: Encoder,
    hidden_BTD: torch.Tensor,
    ids_BT: Array,
    lengths_B: Array,
    first_block: int,
) -> dict[str, Array]:
    """All arrays of at most one batch of blocks, from last hidden states in the static batch shape."""
    arrays = encode_batch(
        head,
        hidden_BTD,
        padded(ids_BT, len(hidden_BTD)),
        padded(lengths_B, len(hidden_BTD)),
        encoder=encoder,
        first_block=first_block,
        window=manifest.hidden.window if manifest.hidden else None,
    )
    if manifest.hidden is not None:
        arrays |= pooled_arrays(manifest.hidden, arrays["hidden"])
    return {name: rows[: len(ids_BT)] for name, rows in arrays.items()}


def pooled_arrays(info: HiddenInfo, hidden_BWD: Array) -> dict[str, Array]:
    """The arrays of pooled hidden states as they are stored."""
    if info.dtype == "float16":
        return {"hidden": hidden_BWD.astype(np.float16)}
    codes_BDW, scale_BD = encode_int8(hidden_BWD.astype(np.float32).swapaxes(1, 2))
    return {"hidden": np.ascontiguousarray(codes_BDW.swapaxes(1, 2)), "hidden_scale": scale_BD}


def padded(rows: Array, num_rows: int) -> Array:
    """A smaller batch could round differently; repeating its last block keeps the shape, and is cut off again."""
    missing = num_rows - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows
