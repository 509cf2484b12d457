"""``topk``: the K most probable tokens, and the mass of all others at each temperature.

In: descending log-probabilities and log odds of the tail, or their stored codes. Out: the other. Also what every
encoding with a head shares with this one.

Legend of axes: B blocks, T tokens, K kept, M temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cache_spec.buffers import take
from cache_spec.encodings.base import EncodingRecord, broken
from cache_spec.errors import CacheError
from cache_spec.targets import Array, ArrayPart, Geometry, HeadTargets

DEFAULT_LEVELS = 128
DEFAULT_ODDS_STEP_NATS = 1 / 16
LEAST_LEVEL = 2.0**-20
"""What level 0 of a head stands for: nothing to speak of at any temperature, but no token is impossible."""
EMPTY_TAIL = -(1 << 15)
_MAX_ODDS = (1 << 15) - 1
_PADDING_BYTES = 64
# What a teacher's 32-bit arithmetic may add to the errors of quantisation when sums over V are compared.
ROUNDING_NATS = 0.002


class Head(EncodingRecord):
    """Parameters of every encoding that keeps a head."""

    k: int = Field(ge=1)
    """K: tokens kept in each head."""
    levels: int = Field(default=DEFAULT_LEVELS, ge=2, le=(1 << 16) - 1)
    """Square roots of head probabilities are kept as multiples of 1 / levels; the error is at most half of that."""
    odds_step_nats: float = Field(default=DEFAULT_ODDS_STEP_NATS, gt=0, le=1)
    """Quantisation step of the tail's log odds; the error is at most half of it."""

    ids_array: ClassVar[str] = "head_ids"

    def arrays(self, g: Geometry) -> tuple[ArrayPart, ...]:
        """The arrays of ids, log-probabilities and tail odds."""
        tokens, num_temperatures = g.block_tokens, len(g.temperatures)
        return (
            ArrayPart(
                name="head_ids",
                dims=("token", "rank"),
                row_shape=(tokens, self.k),
                dtype=g.id_dtype,
                shuffle="noshuffle",
                attributes={"description": "ids of the K most probable next tokens, most probable first"},
            ),
            ArrayPart(
                name="head_gaps",
                dims=("rank", "token"),
                row_shape=(self.k, tokens),
                dtype=gap_dtype(self.levels),
                shuffle="bitshuffle",
                attributes={
                    "description": "square root of the probability at temperature 1 is 1 - cumulative sum along rank"
                    " / levels",
                    "levels": self.levels,
                    "error_bound": 0.5 / self.levels,
                },
            ),
            ArrayPart(
                name="tail_log_odds",
                dims=("temperature", "token"),
                row_shape=(num_temperatures, tokens),
                dtype=np.int16,
                shuffle="bitshuffle",
                compressor="lz4",
                attributes={
                    "description": "step * value is log(m / (1 - m)), m the probability outside the head;"
                    f" {EMPTY_TAIL} for m = 0",
                    "temperatures": list(g.temperatures),
                    "step": self.odds_step_nats,
                    "error_bound": self.odds_step_nats / 2,
                    "units": "nat",
                },
            ),
        )

    def refuse(self, g: Geometry) -> str | None:
        """Why these parameters do not fit; None if they do."""
        return f"k {self.k} is above the vocabulary of {g.vocab_size}" if self.k > g.vocab_size else None

    def decode(
        self, stored: Mapping[str, Array], g: Geometry, at: int, place: object, prepared: Array | None = None
    ) -> HeadTargets:
        """Head and tail at the temperature of index ``at``; CacheError ``id-out-of-range`` or ``gap-overflow``."""
        return HeadTargets(
            ids_BTK=checked_ids(stored["head_ids"], g, f"{place} head_ids"),
            logprobs_BTK=decode_gaps(stored["head_gaps"], self.levels, f"{place} head_gaps", least=LEAST_LEVEL),
            tail_log_odds_BT=decode_odds(stored["tail_log_odds"][:, at], self.odds_step_nats),
        )

    def check(self, stored: Mapping[str, Array], g: Geometry, place: object) -> Iterator[CacheError]:
        """Every broken rule of the values."""
        named = stored[self.ids_array]
        yield from broken(lambda: checked_ids(named, g, f"{place} {self.ids_array}"))
        if repeats(named):
            yield CacheError("repeated-id", f"{place} {self.ids_array}", expected="distinct ids in each head")
        gap_errors = list(broken(lambda: decode_gaps(stored["head_gaps"], self.levels, f"{place} head_gaps")))
        yield from gap_errors or self._mass_errors(stored, g, place)

    def _mass_errors(self, stored: Mapping[str, Array], g: Geometry, place: object) -> Iterator[CacheError]:
        """What tail masses cannot be, given the head: every number here is twice in the cache, and must agree."""
        codes_BMT, place = stored["tail_log_odds"], f"{place} tail_log_odds"
        if self.k == g.vocab_size:
            if (codes_BMT != EMPTY_TAIL).any():
                expected = "an empty tail where the head is the whole vocabulary"
                yield CacheError("bad-tail-mass", place, expected=expected)
            return
        if (np.diff(codes_BMT.astype(np.int32), axis=1) < -1).any():
            yield CacheError("bad-tail-mass", place, expected="masses that do not fall as the temperature rises")
        roots_BTK = 1 - np.cumsum(stored["head_gaps"], axis=1, dtype=np.int64).swapaxes(1, 2) / self.levels
        with np.errstate(divide="ignore"):
            log_roots_BTK = np.log(roots_BTK)
        for at, temperature in enumerate(g.temperatures):
            odds_BT = decode_odds(codes_BMT[:, at], self.odds_step_nats).astype(np.float64)
            # Codes at either end may stand for what is beyond it.
            is_exact_BT = np.abs(codes_BMT[:, at].astype(np.int32)) != _MAX_ODDS
            log_head_BT = np.logaddexp.reduce(log_roots_BTK * (2 / temperature), axis=-1)
            log_last_BT = np.log(roots_BTK[..., -1] + 1 / self.levels) * (2 / temperature)
            limit_BT = math.log(g.vocab_size - self.k) + log_last_BT - log_head_BT
            if (is_exact_BT & (odds_BT > limit_BT + self.odds_step_nats + ROUNDING_NATS)).any():
                expected = f"at {temperature:g} no token outside the head above its last"
                yield CacheError("bad-tail-mass", place, expected=expected)
            # Each root is off by less than one level, and so the sum of their squares by this.
            slack_BT = (2 * roots_BTK.sum(-1) + self.k / self.levels) / self.levels
            slack_BT += self.odds_step_nats / 4 + ROUNDING_NATS
            error_BT = np.abs(np.exp(log_head_BT) - np.exp(-np.logaddexp(0, odds_BT))) * is_exact_BT
            if temperature == 1 and (error_BT > slack_BT).any():
                found = f"off by {error_BT.max():.6f}"
                yield CacheError("mass-not-one", place, expected="at 1 a head and a tail that sum to one", found=found)


class TopK(Head):
    """The K most probable tokens and the mass of the others; nothing is known of single tokens of the tail."""

    name: Literal["topk"] = "topk"


def gap_dtype(levels: int) -> type[np.generic]:
    """Narrowest dtype of a gap: uint8 up to 255 levels, else uint16."""
    return np.uint8 if levels < 1 << 8 else np.uint16


def encode_gaps(head_logprobs_BTK: Array, levels: int) -> Array:
    """Gaps [B, K, T] between the levels of square roots of descending probabilities, log-probabilities [B, T, K].

    The first counts from the top, so that it is small for a sure teacher; a row's first token is at level 1 at least.
    """
    roots_BTK = np.rint(np.exp(head_logprobs_BTK.astype(np.float64) / 2) * levels).clip(0, levels).astype(np.int64)
    roots_BTK[..., 0] = roots_BTK[..., 0].clip(1)
    gaps_BTK = -np.diff(roots_BTK, axis=-1, prepend=levels)
    return np.ascontiguousarray(gaps_BTK.swapaxes(-1, -2).astype(gap_dtype(levels)))


def decode_gaps(gaps_BKT: Array, levels: int, place: object = "head_gaps", *, least: float = 0.0) -> Array:
    """float32 log-probabilities [B, T, K] of stored gaps [B, K, T]; level 0 counts as ``least`` of a level.

    CacheError ``gap-overflow`` where a sum leaves the range, or a first one reaches level 0.
    """
    num_blocks, num_kept, num_tokens = gaps_BKT.shape
    # With rows of a power of two, all ranks of a token would fall into the same few lines of the processor's cache.
    padded = num_tokens + _PADDING_BYTES // gaps_BKT.itemsize
    levels_BKT = take((num_blocks, num_kept, padded), gaps_BKT.dtype)[..., :num_tokens]
    np.subtract(gaps_BKT.dtype.type(levels), gaps_BKT[:, 0], out=levels_BKT[:, 0])
    # Rank by rank over all tokens: several times faster than a cumulative sum along an axis.
    for rank in range(1, num_kept):
        np.subtract(levels_BKT[:, rank - 1], gaps_BKT[:, rank], out=levels_BKT[:, rank])
    # A difference of unsigned numbers has wrapped around if and only if it is above the first of them.
    rises = np.greater(levels_BKT[:, 1:], levels_BKT[:, :-1], out=take(levels_BKT[:, 1:].shape, np.bool_))
    if rises.any() or (levels_BKT[:, 0] > levels).any() or not levels_BKT[:, 0].all():
        expected = f"gaps summing to at most {levels}, the first below that"
        found = gaps_BKT.sum(axis=1, dtype=np.uint64).max()
        raise CacheError("gap-overflow", place, expected=expected, found=found)
    logprobs_BTK = take((num_blocks, num_tokens, num_kept), np.float32)
    np.copyto(logprobs_BTK, levels_BKT.swapaxes(1, 2))
    np.maximum(logprobs_BTK, np.float32(least), out=logprobs_BTK)
    logprobs_BTK *= np.float32(1 / levels)
    with np.errstate(divide="ignore"):
        np.log(logprobs_BTK, out=logprobs_BTK)
    logprobs_BTK *= np.float32(2)
    return logprobs_BTK


def encode_odds(log_odds: Array, step_nats: float) -> Array:
    """int16 codes of log odds; -inf has its own code, and what is beyond the range saturates."""
    codes = np.rint(np.maximum(log_odds.astype(np.float64), -1e30) / step_nats).clip(-_MAX_ODDS, _MAX_ODDS)
    return np.where(np.isneginf(log_odds), EMPTY_TAIL, codes).astype(np.int16)


def decode_odds(codes: Array, step_nats: float) -> Array:
    """float32 log odds of their codes."""
    return np.where(codes == EMPTY_TAIL, np.float32(-np.inf), codes * np.float32(step_nats)).astype(np.float32)


def checked_ids(ids: Array, g: Geometry, place: object) -> Array:
    """The same ids; CacheError ``id-out-of-range`` unless all are below V."""
    if ids.size and ids.max() >= g.vocab_size:
        raise CacheError("id-out-of-range", place, expected=f"ids below {g.vocab_size}", found=ids.max())
    return ids


def repeats(ids_BTK: Array) -> bool:
    """Whether any row holds an id twice."""
    ordered_BTK = np.sort(ids_BTK, axis=-1)
    return bool((ordered_BTK[..., 1:] == ordered_BTK[..., :-1]).any())
