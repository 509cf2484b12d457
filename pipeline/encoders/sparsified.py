"""``sparsified``: exactly K tokens, unbiased and summing to one, see ``cache_spec.encodings.sparsified``.

In: masses. Out: kept ids and their probabilities. The e most probable tokens are exact; the other K - e places are
shared by the rest in equal parts c, each token taken with probability p / c by systematic sampling along ids.

Legend of axes: R rows, V vocabulary, K kept, B blocks, T tokens, M temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import encode_gaps
from cache_spec.targets import Array, Geometry
from pipeline.encoders.draws import pick
from pipeline.encoders.spectrum import Masses, Rows
from pipeline.encoders.topk import tokens_last

_BELOW_ONE = 1 - 1e-9
"""A token whose probability of being taken is this or more is exact: rounding could else take it twice."""


class SparsifiedEncoder:
    """A fixed number of tokens by unbiased sparsification."""

    float64 = True
    num_uniforms = 2

    def __init__(self, encoding: Sparsified, geometry: Geometry, _tables: Any, _device: Any) -> None:
        self.encoding, self.geometry = encoding, geometry
        self.num_head, self.temperatures, self.seed = encoding.k, geometry.temperatures, encoding.seed

    def columns(self, _rows: Rows, _head_logprobs_RK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing is common to all temperatures."""
        return {}

    def columns_at(self, rows: Rows, masses: Masses) -> dict[str, torch.Tensor]:
        """Kept ids and log-probabilities at this temperature."""
        uniforms_R2 = rows.uniforms_RMN[:, masses.at]
        ids_RK, probs_RK = sparsify(masses.head_RK, rows.head_ids_RK, masses.tail_RV, uniforms_R2[:, :1])
        levels_RK = round_at_random(probs_RK, self.encoding.levels, uniforms_R2[:, 1:])
        return {"kept_ids": ids_RK, "kept_logprobs": 2 * (levels_RK / self.encoding.levels).log()}

    def stored(self, columns: Mapping[str, Array]) -> dict[str, Array]:
        """Ids in their dtype and gaps, tokens last."""
        return {
            "kept_ids": tokens_last(columns["kept_ids"]).astype(self.geometry.id_dtype),
            "kept_gaps": encode_gaps(columns["kept_logprobs"].swapaxes(1, 2), self.encoding.levels),
        }


def sparsify(
    head_RK: torch.Tensor, head_ids_RK: torch.Tensor, tail_RV: torch.Tensor, uniforms_R1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [R, K] and float64 probabilities [R, K], descending and summing to one, of K tokens.

    ``head_RK`` are the K largest masses, descending, ``tail_RV`` all others with 0 at the head.
    """
    k = head_RK.shape[1]
    rank_K = torch.arange(k, device=head_RK.device)
    head64_RK = head_RK.double()
    # Mass of each rank and all below it; the number of exact tokens is the first rank that takes less than its share.
    rest_RK = head64_RK.flip(1).cumsum(1).flip(1) + tail_RV.sum(1, dtype=torch.float64)[:, None]
    fits_RK = head64_RK * (k - rank_K) < rest_RK * _BELOW_ONE
    exact_R1 = torch.where(fits_RK.any(1), fits_RK.byte().argmax(1), k)[:, None]
    places_R1 = (k - exact_R1).clamp_min(1)
    is_exact_RK = rank_K < exact_R1
    share_R1 = rest_RK.gather(1, exact_R1.clamp_max(k - 1)) / places_R1
    values_RK = torch.where(is_exact_RK, head64_RK, share_R1)
    fractions_RK = ((rank_K - exact_R1).clamp_min(0) + uniforms_R1) / places_R1
    mass_RV = tail_RV.scatter_(1, head_ids_RK, torch.where(is_exact_RK, 0.0, head_RK))
    ids_RK = torch.where(is_exact_RK, head_ids_RK, pick(mass_RV, fractions_RK).ids_RN)
    mass_RV.scatter_(1, head_ids_RK, 0.0)
    return ids_RK, values_RK / values_RK.sum(1, keepdim=True)


def round_at_random(probs_RK: torch.Tensor, levels: int, uniforms_R1: torch.Tensor) -> torch.Tensor:
    """Whole levels of square roots, up or down so that (level / levels)^2 is right on average.

    One number decides for a whole row, so that what descends still does. To the nearest level, the value that the
    sampled tokens share would be off by a tenth where it is small, and all of them in one direction.
    """
    roots_RK = probs_RK.sqrt() * levels
    below_RK = roots_RK.floor()
    up_RK = uniforms_R1 * (2 * below_RK + 1) < roots_RK.square() - below_RK.square()
    return below_RK + up_RK
