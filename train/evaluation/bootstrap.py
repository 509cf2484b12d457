"""How sure a figure is: sums of each unit of a measurement come in, intervals of figures made of them go out.

Whole units (documents, windows, blocks, examples) are drawn with replacement, never tokens, which hang together inside
one. Interval: percentiles of the figure over the resamples (Efron, "Bootstrap Methods: Another Look at the Jackknife",
1979). Measurements of as many units get the same draws, so that figures of two models on the same units can be
subtracted draw by draw, and the interval of the difference is that of pairs.

Legend: U units, S sums of each, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]
Figures = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """How often is resampled, and how wide intervals are."""

    resamples: int
    level: float
    """Share of the resamples inside an interval."""
    seed: int

    def replicates(self, sums_US: Sums, figures: Callable[[Sums], Figures]) -> Figures:
        """Figures of each resample, [R] of each; ``figures`` makes them of sums over units, [..., S].

        Empty for fewer than two units, of which nothing can be told, and for no resamples.
        """
        num_units = len(sums_US)
        if num_units < 2 or not self.resamples:
            return {}
        rng = np.random.default_rng(self.seed)
        draws = (rng.integers(num_units, size=num_units) for _ in range(self.resamples))
        sums_RS = np.stack([np.bincount(drawn, minlength=num_units) @ sums_US for drawn in draws])
        with np.errstate(over="ignore"):
            return figures(sums_RS)

    def intervals(self, replicates: Figures) -> dict[str, list[float]]:
        """Lower and upper end of each figure; those that are not finite in some resample have none."""
        outside = (1 - self.level) / 2
        return {
            name: [float(end) for end in np.quantile(values, [outside, 1 - outside])]
            for name, values in replicates.items()
            if np.isfinite(values).all()
        }
