"""One shard: its staged blocks through the teacher and into the cache, in one static batch shape.

In: a manifest, staged blocks (and what masks them), a loaded teacher and the encoder of the cache. Out: a committed
shard, the same bytes wherever it was made.

Legend of axes: B blocks, T tokens, W windows, D teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch

from cache_spec.commit import pack_shard
from cache_spec.encodings.hidden import encode_int8
from cache_spec.manifest import HiddenInfo, Manifest
from cache_spec.masking import REPLACEMENTS, SELECTED, MaskedText
from cache_spec.receipts import Receipt
from cache_spec.targets import Array
from pipeline.blocks import StagedBlocks
from pipeline.encoders import make_encoder
from pipeline.encoders.spectrum import Encoder
from pipeline.masking import Masker, Masks
from pipeline.overlap import overlapped
from pipeline.place import Place
from pipeline.streams import Event, on_stream, recorded, side_stream
from pipeline.targets import encode_batch
from pipeline.teacher import OutputHead, States, Teacher


def encoder_of(manifest: Manifest, tables: Mapping[str, Array], device: torch.device) -> Encoder:
    """The encoder of a cache, with its tables on the device that the teacher is on."""
    return make_encoder(manifest.encoding, manifest.geometry, tables=tables, device=device)


def capture_shards(
    place: Place,
    manifest: Manifest,
    staged: StagedBlocks,
    teacher: Teacher,
    encoder: Encoder,
    shards: Iterable[int],
    on_tokens: Callable[[int], object] = lambda tokens: None,
) -> Iterator[Receipt]:
    """Run the teacher over shard after shard; another thread packs and commits the one before. Gives the receipts.

    Two shards' arrays are held at most: one that is committed and one that is made. A failure to commit is raised at
    the next batch.
    """
    failed: list[BaseException] = []

    def checked(tokens: int) -> None:
        if failed:
            raise failed[0]
        on_tokens(tokens)

    def committed(made: tuple[int, dict[str, Array]]) -> Receipt:
        try:
            return place.publish(manifest, pack_shard(manifest, *made))
        except BaseException as error:
            failed.append(error)
            raise

    made = ((shard, shard_arrays(manifest, staged, teacher, encoder, shard, checked)) for shard in shards)
    yield from overlapped(made, committed)


def shard_arrays(
    manifest: Manifest,
    staged: StagedBlocks,
    teacher: Teacher,
    encoder: Encoder,
    shard: int,
    on_tokens: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Array]:
    """What a cache keeps of one shard's blocks, as the teacher reads them now."""
    made = _read_by_teacher(manifest, staged, teacher, shard, on_tokens)
    if not overlaps(teacher.device):
        return joined([encode_hidden(manifest, teacher.head, encoder, *batch) for batch in made])
    stream = side_stream(teacher.device)

    def encoded(made: tuple[_Batch, Event | None]) -> dict[str, Array]:
        batch, computed = made
        with on_stream(stream, computed, batch[0]):
            return encode_hidden(manifest, teacher.head, encoder, *batch)

    return joined(list(overlapped(((batch, recorded(teacher.device)) for batch in made), encoded)))


def overlaps(device: torch.device) -> bool:
    """Whether the teacher's next batch runs while the last one is encoded: on a CPU both want the same cores."""
    return device.type == "cuda"


_Batch = tuple[States, Array, Array, int, Masks | None]
"""What the teacher made of a batch in the static shape; its ids, lengths, number of its first block and masks."""


def _read_by_teacher(
    manifest: Manifest, staged: StagedBlocks, teacher: Teacher, shard: int, on_tokens: Callable[[int], object]
) -> Iterator[_Batch]:
    masker = masker_of(manifest, staged)
    for start, count in batches(manifest, shard):
        ids_BT, lengths_B = staged.read(start, count), staged.lengths(start, count)
        masks = None if masker is None else masker.masks(ids_BT, lengths_B, np.arange(start, start + count))
        yield read_blocks(manifest, teacher, ids_BT, lengths_B, masks), ids_BT, lengths_B, start, masks
        on_tokens(count * manifest.blocks.block_tokens)


def masker_of(manifest: Manifest, staged: StagedBlocks) -> Masker | None:
    """What masks the blocks of a cache; None where the teacher predicts the next token."""
    info = manifest.masking
    return None if info is None else Masker(info, staged.counts(manifest.teacher.vocab_size))


def batches(manifest: Manifest, shard: int) -> list[tuple[int, int]]:
    """First block and number of blocks of each batch of a shard."""
    first, count = manifest.blocks.shard_range(shard)
    size = manifest.batch_blocks
    return [(start, min(size, first + count - start)) for start in range(first, first + count, size)]


def joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    """The arrays of consecutive batches as those of one shard."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def encode_blocks(
    manifest: Manifest,
    teacher: Teacher,
    encoder: Encoder,
    ids_BT: Array,
    lengths_B: Array,
    first_block: int,
    masks: Masks | None = None,
) -> dict[str, Array]:
    """All arrays of at most one batch of blocks, computed in the one static batch shape of the cache."""
    states = read_blocks(manifest, teacher, ids_BT, lengths_B, masks)
    return encode_hidden(manifest, teacher.head, encoder, states, ids_BT, lengths_B, first_block, masks)


def read_blocks(manifest: Manifest, teacher: Teacher, ids_BT: Array, lengths_B: Array, masks: Masks | None) -> States:
    """What the teacher makes of at most one batch of blocks, in the static batch shape."""
    size = manifest.batch_blocks
    masked = _masked(manifest, ids_BT, lengths_B, masks)
    return teacher.states(padded(ids_BT if masked is None else masked.read_ids_BT, size), padded(lengths_B, size))


def encode_hidden(
    manifest: Manifest,
    head: OutputHead,
    encoder: Encoder,
    states: States,
    ids_BT: Array,
    lengths_B: Array,
    first_block: int,
    masks: Masks | None = None,
) -> dict[str, Array]:
    """All arrays of at most one batch of blocks, from last hidden states in the static batch shape."""
    size = len(states.read_BTD)
    arrays = encode_batch(
        head,
        states.read_BTD,
        padded(ids_BT, size),
        padded(lengths_B, size),
        encoder=encoder,
        first_block=first_block,
        window=manifest.hidden.window if manifest.hidden else None,
        masked=_masked(manifest, padded(ids_BT, size), padded(lengths_B, size), _padded_masks(masks, size)),
        last_BTD=states.last_BTD,
    )
    if manifest.hidden is not None:
        arrays |= pooled_arrays(manifest.hidden, arrays["hidden"])
    if masks is not None:
        arrays |= {SELECTED: masks.selected_BT, REPLACEMENTS: masks.replacements_BT}
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


def _padded_masks(masks: Masks | None, num_rows: int) -> Masks | None:
    return None if masks is None else Masks(*(padded(rows, num_rows) for rows in masks))


def _masked(manifest: Manifest, ids_BT: Array, lengths_B: Array, masks: Masks | None) -> MaskedText | None:
    if manifest.masking is None:
        return None
    assert masks is not None
    return masks.text(manifest.masking, ids_BT, lengths_B)
