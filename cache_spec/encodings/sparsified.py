"""``sparsified``: exactly K tokens, unbiased: large probabilities as they are, small ones kept at random at one value.

In: kept ids and their probabilities. Out: a distribution on K tokens that sums to one and is right on average for every
token. Tokens of p ≥ c are exact; another is kept with probability p / c at value c. Since c is at most the smallest
exact one, the values of a row descend: the exact ones, then c for all others.

Legend of axes: B blocks, T tokens, K kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import numpy as np
from pydantic import Field

from cache_spec.encodings.base import EncodingRecord, broken
from cache_spec.encodings.topk import checked_ids, decode_gaps, gap_dtype, repeats
from cache_spec.errors import CacheError
from cache_spec.targets import Array, ArrayPart, Geometry, PointTargets

DEFAULT_LEVELS = 4096


class Sparsified(EncodingRecord):
    """A fixed number of tokens for each position and temperature, chosen by systematic sampling."""

    name: Literal["sparsified"] = "sparsified"
    k: int = Field(ge=1)
    """K: tokens kept."""
    levels: int = Field(default=DEFAULT_LEVELS, ge=2, le=(1 << 16) - 1)
    """Square roots of kept probabilities are multiples of 1 / levels; many, for one value stands for the whole tail."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the sampling, which is a function of seed, block, position and temperature alone."""

    def arrays(self, g: Geometry) -> tuple[ArrayPart, ...]:
        """Ids and gaps."""
        num_temperatures, tokens = len(g.temperatures), g.block_tokens
        about = {"temperatures": list(g.temperatures)}
        return (
            ArrayPart(
                name="kept_ids",
                dims=("temperature", "rank", "token"),
                row_shape=(num_temperatures, self.k, tokens),
                dtype=g.id_dtype,
                shuffle="shuffle",
                attributes={"description": "exact tokens, most probable first; then sampled ones, ascending"} | about,
            ),
            ArrayPart(
                name="kept_gaps",
                dims=("temperature", "rank", "token"),
                row_shape=(num_temperatures, self.k, tokens),
                dtype=gap_dtype(self.levels),
                shuffle="bitshuffle",
                attributes={
                    "description": "square root of the probability at the temperature, but for a factor common to the"
                    " row, is 1 - cumulative sum along rank / levels",
                    "levels": self.levels,
                    "error_bound": 1 / self.levels,
                }
                | about,
            ),
        )

    def refuse(self, g: Geometry) -> str | None:
        """Why these parameters do not fit; None if they do."""
        return f"k {self.k} is above the vocabulary of {g.vocab_size}" if self.k > g.vocab_size else None

    def decode(
        self, stored: Mapping[str, Array], g: Geometry, at: int, place: object, prepared: Array | None = None
    ) -> PointTargets:
        """Kept probabilities at the temperature of index ``at``, scaled to sum to one after rounding."""
        logprobs_BTK = decode_gaps(stored["kept_gaps"][:, at], self.levels, f"{place} kept_gaps")
        probs_BTK = np.exp(logprobs_BTK - logprobs_BTK[..., :1])
        ids_BKT = checked_ids(stored["kept_ids"][:, at], g, f"{place} kept_ids")
        return PointTargets(
            ids_BTJ=np.ascontiguousarray(ids_BKT.swapaxes(1, 2)),
            probs_BTJ=probs_BTK / probs_BTK.sum(2, keepdims=True),
        )

    def check(self, stored: Mapping[str, Array], g: Geometry, place: object) -> Iterator[CacheError]:
        """Every broken rule of the values."""
        for at in range(len(g.temperatures)):
            yield from broken(partial(self.decode, stored, g, at, place))
        if repeats(stored["kept_ids"].swapaxes(2, 3)):
            yield CacheError("repeated-id", f"{place} kept_ids", expected="distinct ids in each row")
