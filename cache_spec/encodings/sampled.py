"""``sampled``: N tokens drawn from the teacher with replacement, as counts ("Sparse Logit Sampling", ACL 2025).

In: drawn ids and how often each came. Out: a distribution on them, count / N, right on average for every token.

Legend of axes: B blocks, T tokens, J distinct draws at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import numpy as np
from pydantic import Field

from cache_spec.encodings.base import EncodingRecord, broken
from cache_spec.encodings.topk import checked_ids
from cache_spec.errors import CacheError
from cache_spec.targets import Array, ArrayPart, Geometry, PointTargets


class Sampled(EncodingRecord):
    """Draws with replacement, at each temperature from the teacher's distribution at that temperature."""

    name: Literal["sampled"] = "sampled"
    draws: int = Field(ge=1, le=(1 << 16) - 1)
    """N: draws for each token and temperature."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the draws, which are a function of seed, block, position and temperature alone."""

    def num_points(self, g: Geometry) -> int:
        """J: distinct tokens that N draws can give."""
        return min(self.draws, g.vocab_size)

    def arrays(self, g: Geometry) -> tuple[ArrayPart, ...]:
        """Ids and counts."""
        shape = (len(g.temperatures), self.num_points(g), g.block_tokens)
        about = {"temperatures": list(g.temperatures)}
        dims = ("temperature", "point", "token")
        return (
            ArrayPart(
                name="draw_ids",
                dims=dims,
                row_shape=shape,
                dtype=g.id_dtype,
                shuffle="shuffle",
                attributes={"description": "distinct drawn tokens, most often drawn first; 0 where there is none"}
                | about,
            ),
            ArrayPart(
                name="draw_counts",
                dims=dims,
                row_shape=shape,
                dtype=np.uint8 if self.draws < 1 << 8 else np.uint16,
                shuffle="bitshuffle",
                attributes={"description": "how often each was drawn; 0 where there is none"} | about,
            ),
        )

    def decode(
        self, stored: Mapping[str, Array], g: Geometry, at: int, place: object, prepared: Array | None = None
    ) -> PointTargets:
        """Relative counts at the temperature of index ``at``; CacheError ``id-out-of-range`` or ``bad-counts``."""
        counts_BJT = stored["draw_counts"][:, at]
        if (counts_BJT.sum(1, dtype=np.int64) != self.draws).any():
            raise CacheError("bad-counts", f"{place} draw_counts", expected=f"counts that sum to {self.draws}")
        ids_BJT = checked_ids(stored["draw_ids"][:, at], g, f"{place} draw_ids")
        return PointTargets(
            ids_BTJ=np.ascontiguousarray(ids_BJT.swapaxes(1, 2)),
            probs_BTJ=counts_BJT.swapaxes(1, 2).astype(np.float32, order="C") / np.float32(self.draws),
        )

    def check(self, stored: Mapping[str, Array], g: Geometry, place: object) -> Iterator[CacheError]:
        """Every broken rule of the values."""
        for at in range(len(g.temperatures)):
            yield from broken(partial(self.decode, stored, g, at, place))
        counts, ids = stored["draw_counts"].astype(np.int64), stored["draw_ids"].astype(np.int64)
        if (np.diff(counts, axis=2) > 0).any():
            yield CacheError("bad-counts", f"{place} draw_counts", expected="counts in descending order")
        if ids[counts == 0].any():
            yield CacheError("bad-counts", f"{place} draw_ids", expected="id 0 where nothing was drawn")
        # Padding gets numbers of its own, so that only drawn ids can repeat.
        marked = np.where(counts > 0, ids, -1 - np.arange(ids.shape[2])[:, None])
        ordered = np.sort(marked, axis=2)
        if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
            yield CacheError("repeated-id", f"{place} draw_ids", expected="distinct ids in each row")
