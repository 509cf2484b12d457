"""A sample of a cache: blocks spread evenly over the committed shards, and what the teacher says at some positions.

In: a reader, the shards that are there, a seed. Out: the most probable tokens with their probabilities, the mass
outside them, entropies. The same seed draws the same sample.

Legend of axes: B blocks, T tokens, N positions, K listed tokens, V vocabulary, D teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cache_spec.imported import ImportedInfo
from cache_spec.manifest import Manifest
from cache_spec.masking import real_positions
from cache_spec.reader import CacheReader
from cache_spec.targets import Array, HeadTargets, HiddenTargets, PointTargets, Targets

_MOST_LISTED = 100
_READ_BLOCKS = 8
_MOST_POSITIONS = 16_384
# Each costs a row of the whole vocabulary.
_MOST_DENSE_POSITIONS = 1024
_DENSE_ROWS = 64


class Positions(NamedTuple):
    """Sampled positions in ascending order of blocks."""

    block_N: Array
    at_N: Array
    """Place in the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tops:
    """What a teacher finds most probable at N positions, at one temperature."""

    ids_NK: Array
    probs_NK: Array
    """float64, descending."""
    outside_N: Array | None
    """Mass of all other tokens; None where the encoding does not tell it."""
    entropy_N: Array
    """Nats; see ``entropy_is``."""


def entropy_is(encoding_name: str, imported: ImportedInfo | None) -> str:
    """What the entropies of ``Tops`` are, in words."""
    if imported is not None and imported.logprobs == "renormalised":
        return "of the kept tokens, as if there were no others"
    return {
        "hidden": "exact",
        "topk": "a lower bound: all tokens outside the head count as one",
        "prototype": "a lower bound: all tokens outside the head count as one",
        "sampled": "of the drawn tokens: below the teacher's",
        "sparsified": "of the kept tokens: below the teacher's",
    }[encoding_name]


def pick_shards(shards: Sequence[int], most: int, rng: np.random.Generator) -> list[int]:
    """At most so many of ``shards``: one at random of each of equally many in a row."""
    if len(shards) <= most:
        return list(shards)
    return [int(rng.choice(part)) for part in np.array_split(np.asarray(shards), most)]


def pick_blocks(manifest: Manifest, shards: Sequence[int], most: int, rng: np.random.Generator) -> list[int]:
    """At most ``most`` blocks of these shards, ascending, as evenly as they go."""
    wanted = np.full(len(shards), most // max(1, len(shards)))
    wanted[: most - wanted.sum()] += 1
    blocks: list[int] = []
    for shard, count in zip(shards, wanted.tolist(), strict=True):
        first, num_blocks = manifest.blocks.shard_range(shard)
        parts = np.array_split(np.arange(num_blocks), min(count, num_blocks)) if count else []
        blocks += [first + int(rng.choice(part)) for part in parts]
    return sorted(blocks)


def pick_positions(reader: CacheReader, blocks: Sequence[int], rng: np.random.Generator) -> Positions:
    """Positions that have targets, equally many of each block as far as it has them."""
    dense = reader.manifest.encoding.name == "hidden"
    per_block = max(1, (_MOST_DENSE_POSITIONS if dense else _MOST_POSITIONS) // max(1, len(blocks)))
    lengths_B = reader.lengths(blocks)
    masked = reader.masked(blocks)
    tokens = reader.manifest.blocks.block_tokens
    kept_BT = real_positions(lengths_B, tokens) if masked is None else masked.kept_BT
    block_N, at_N = [], []
    for block, kept_T in zip(blocks, kept_BT, strict=True):
        there = np.flatnonzero(kept_T)
        at = np.sort(rng.choice(there, min(per_block, len(there)), replace=False))
        block_N.append(np.full(len(at), block))
        at_N.append(at)
    return Positions(np.concatenate(block_N), np.concatenate(at_N))


def read_tops(reader: CacheReader, positions: Positions, temperature: float) -> Tops:
    """The most probable tokens at ``positions``, at a declared temperature; CacheError for what is damaged."""
    parts: list[Tops] = []
    blocks = np.unique(positions.block_N)
    head = reader.output_head() if reader.manifest.encoding.name == "hidden" else None
    for start in range(0, len(blocks), _READ_BLOCKS):
        some = blocks[start : start + _READ_BLOCKS]
        inside = np.isin(positions.block_N, some)
        row_N, at_N = np.searchsorted(some, positions.block_N[inside]), positions.at_N[inside]
        batch = reader.batch(some, temperature, with_hidden=False)
        parts.append(_tops(batch.targets, row_N, at_N, temperature, head))
    tops = _joined(parts)
    imported = reader.manifest.imported
    # Nothing is known of what renormalised values left out.
    return tops if imported is None or imported.logprobs == "full" else replace(tops, outside_N=None)


def _tops(
    targets: Targets, row_N: Array, at_N: Array, temperature: float, head: tuple[Array, Array | None] | None
) -> Tops:
    if isinstance(targets, HeadTargets):
        return _of_head(targets, row_N, at_N, temperature)
    if isinstance(targets, PointTargets):
        return _of_points(targets, row_N, at_N)
    assert head is not None  # the encoding is hidden
    pieces = [slice(start, start + _DENSE_ROWS) for start in range(0, len(row_N), _DENSE_ROWS)]
    return _joined([_of_hidden(targets, row_N[piece], at_N[piece], temperature, *head) for piece in pieces])


def _joined(parts: Sequence[Tops]) -> Tops:
    outside = [part.outside_N for part in parts if part.outside_N is not None]
    return Tops(
        ids_NK=np.concatenate([part.ids_NK for part in parts]),
        probs_NK=np.concatenate([part.probs_NK for part in parts]),
        outside_N=np.concatenate(outside) if outside else None,
        entropy_N=np.concatenate([part.entropy_N for part in parts]),
    )


def _of_head(targets: HeadTargets, row_N: Array, at_N: Array, temperature: float) -> Tops:
    powers_NK = np.exp(targets.logprobs_BTK[row_N, at_N].astype(np.float64) / temperature)
    odds_N = targets.tail_log_odds_BT[row_N, at_N].astype(np.float64)
    with np.errstate(over="ignore"):
        outside_N, inside_N = 1 / (1 + np.exp(-odds_N)), 1 / (1 + np.exp(odds_N))
    probs_NK = inside_N[:, None] * powers_NK / powers_NK.sum(1, keepdims=True)
    entropy_N = _entropy(np.concatenate([probs_NK, outside_N[:, None]], axis=1))
    ids_NK = targets.ids_BTK[row_N, at_N]
    return Tops(ids_NK=ids_NK, probs_NK=probs_NK, outside_N=outside_N, entropy_N=entropy_N)


def _of_points(targets: PointTargets, row_N: Array, at_N: Array) -> Tops:
    probs_NJ = targets.probs_BTJ[row_N, at_N].astype(np.float64)
    order_NJ = np.argsort(-probs_NJ, axis=1, kind="stable")
    probs_NJ = np.take_along_axis(probs_NJ, order_NJ, axis=1)
    ids_NJ = np.take_along_axis(targets.ids_BTJ[row_N, at_N], order_NJ, axis=1)
    return Tops(ids_NK=ids_NJ, probs_NK=probs_NJ, outside_N=None, entropy_N=_entropy(probs_NJ))


def _of_hidden(
    targets: HiddenTargets, row_N: Array, at_N: Array, temperature: float, weight_VD: Array, bias_V: Array | None
) -> Tops:
    logits_NV: Array = (targets.hidden_BTD[row_N, at_N].astype(np.float32) @ weight_VD.T).astype(np.float64)
    logits_NV = (logits_NV if bias_V is None else logits_NV + bias_V) / temperature
    logits_NV -= logits_NV.max(1, keepdims=True)
    probs_NV = np.exp(logits_NV)
    probs_NV /= probs_NV.sum(1, keepdims=True)
    ids_NK = np.argsort(-probs_NV, axis=1, kind="stable")[:, :_MOST_LISTED]
    probs_NK = np.take_along_axis(probs_NV, ids_NK, axis=1)
    outside_N = np.clip(1 - probs_NK.sum(1), 0, 1)
    return Tops(ids_NK=ids_NK, probs_NK=probs_NK, outside_N=outside_N, entropy_N=_entropy(probs_NV))


def _entropy(probs_NK: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        nats: Array = -np.where(probs_NK > 0, probs_NK * np.log(probs_NK), 0.0).sum(1)
    return nats
