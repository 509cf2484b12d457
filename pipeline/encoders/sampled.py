"""``sampled``: N independent draws with replacement at each temperature, see ``cache_spec.encodings.sampled``.

In: masses. Out: drawn ids and their counts.

Legend of axes: R rows, V vocabulary, N draws, J distinct draws, B blocks, T tokens, M temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cache_spec.encodings.sampled import Sampled
from cache_spec.targets import Array, Geometry
from pipeline.encoders.draws import pick
from pipeline.encoders.spectrum import Masses, Rows
from pipeline.encoders.topk import tokens_last


class SampledEncoder:
    """Ids and counts of independent draws."""

    num_head = 1
    float64 = True

    def __init__(self, encoding: Sampled, geometry: Geometry, _tables: Any, _device: Any) -> None:
        self.encoding, self.geometry = encoding, geometry
        self.temperatures = geometry.temperatures
        self.num_uniforms, self.seed = encoding.draws, encoding.seed

    def columns(self, _rows: Rows, _head_logprobs_RK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing is common to all temperatures."""
        return {}

    def columns_at(self, rows: Rows, masses: Masses) -> dict[str, torch.Tensor]:
        """N draws from the distribution at this temperature."""
        mass_RV = masses.tail_RV.scatter_(1, rows.head_ids_RK, masses.head_RK)
        ids_RJ, counts_RJ = count_equal(pick(mass_RV, rows.uniforms_RMN[:, masses.at]).ids_RN)
        mass_RV.scatter_(1, rows.head_ids_RK, 0.0)
        points = self.encoding.num_points(self.geometry)
        return {"draw_ids": ids_RJ[:, :points], "draw_counts": counts_RJ[:, :points]}

    def stored(self, columns: Mapping[str, Array]) -> dict[str, Array]:
        """Both in their dtypes, tokens last."""
        count_dtype = np.uint8 if self.encoding.draws < 1 << 8 else np.uint16
        return {
            "draw_ids": tokens_last(columns["draw_ids"]).astype(self.geometry.id_dtype),
            "draw_counts": tokens_last(columns["draw_counts"]).astype(count_dtype),
        }


def count_equal(ids_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids [R, N] and their counts, most frequent first, equal counts by ascending id, then zeros in both."""
    ordered_RN = ids_RN.sort(1).values
    first_RN = torch.ones_like(ordered_RN)
    first_RN[:, 1:] = ordered_RN[:, 1:] != ordered_RN[:, :-1]
    place_RN = first_RN.cumsum(1) - 1
    counts_RN = torch.zeros_like(ordered_RN).scatter_add_(1, place_RN, torch.ones_like(ordered_RN))
    distinct_RN = torch.zeros_like(ordered_RN).scatter_(1, place_RN, ordered_RN)
    counts_RN, order_RN = counts_RN.sort(dim=1, descending=True, stable=True)
    return distinct_RN.gather(1, order_RN), counts_RN
