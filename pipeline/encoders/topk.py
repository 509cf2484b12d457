"""``topk``: the K most probable tokens and the log odds of all others, see ``cache_spec.encodings.topk``.

In: a head and masses. Out: its arrays.

Legend of axes: R rows, K kept, B blocks, T tokens, M temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cache_spec.encodings.topk import Head, encode_gaps, encode_odds
from cache_spec.targets import Array, Geometry
from pipeline.encoders.spectrum import Masses, Rows


class TopKEncoder:
    """Head and tail odds."""

    float64 = False
    num_uniforms = seed = 0

    def __init__(self, encoding: Head, geometry: Geometry, _tables: Any, _device: Any) -> None:
        self.encoding, self.geometry = encoding, geometry
        self.num_head, self.temperatures = encoding.k, geometry.temperatures

    def columns(self, rows: Rows, head_logprobs_RK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ids and log-probabilities."""
        return {"head_ids": rows.head_ids_RK, "head_logprobs": head_logprobs_RK}

    def columns_at(self, _rows: Rows, masses: Masses) -> dict[str, torch.Tensor]:
        """Log odds of the tail."""
        return {"tail_log_odds": masses.log_odds_R}

    def stored(self, columns: Mapping[str, Array]) -> dict[str, Array]:
        """Ids in their dtype, gaps and odds as codes."""
        return {
            "head_ids": columns["head_ids"].astype(self.geometry.id_dtype),
            "head_gaps": encode_gaps(columns["head_logprobs"], self.encoding.levels),
            "tail_log_odds": encode_odds(tokens_last(columns["tail_log_odds"]), self.encoding.odds_step_nats),
        }


def tokens_last(values: Array) -> Array:
    """[B, T, ...] as [B, ..., T], contiguous."""
    return np.ascontiguousarray(np.moveaxis(values, 1, -1))
