"""``prototype``: head, shared tail, and draws of what it leaves over, see ``cache_spec.encodings.prototype``.

In: a head, masses, hidden states, and the cache's tables. Out: its arrays. A token's prototype follows from its hidden
state alone. With draws, the half of them is taken where the teacher's tail is above the prototype's, the other where
it is below: both differences weigh the same, so the draws add up to nothing, and the target still sums to one.

Legend of axes: R rows, V vocabulary, K kept, C prototypes, D width, M temperatures, S draws, B blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cache_spec.encodings.prototype import (
    MASS_STEP_NATS,
    Prototype,
    decode_prototypes,
    encode_ranks,
    encode_residual,
    token_order,
)
from cache_spec.encodings.topk import encode_odds
from cache_spec.targets import Array, Geometry
from pipeline.encoders.draws import pick
from pipeline.encoders.spectrum import Masses, Rows
from pipeline.encoders.topk import TopKEncoder, tokens_last

_MAX_CODE = (1 << 15) - 1


class PrototypeEncoder(TopKEncoder):
    """Head, tail odds, prototype, and signed draws where asked for."""

    encoding: Prototype

    def __init__(
        self, encoding: Prototype, geometry: Geometry, tables: Mapping[str, Array], device: torch.device
    ) -> None:
        super().__init__(encoding, geometry, tables, device)
        self.float64 = encoding.residual_draws > 0
        self.num_uniforms, self.seed = 4 if encoding.residual_draws else 0, encoding.seed
        self.classifier_CE = torch.from_numpy(tables["prototype_classifier"]).to(device)
        self.places_CV = _places(token_order(tables["prototypes"]))
        self.probs_MCV = None
        if encoding.residual_draws:
            self.probs_MCV = torch.from_numpy(decode_prototypes(tables["prototypes"])).to(device)
        self._buffers_2RV: tuple[torch.Tensor, torch.Tensor] | None = None

    def columns(self, rows: Rows, head_logprobs_RK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ids, log-probabilities and prototype."""
        return super().columns(rows, head_logprobs_RK) | {"tail_prototype": self._prototype(rows)}

    def columns_at(self, rows: Rows, masses: Masses) -> dict[str, torch.Tensor]:
        """Log odds of the tail, and the draws."""
        if self.probs_MCV is None:
            return super().columns_at(rows, masses)
        # Made zero at the head and scaled, this is what a reader takes the tail to be, but for the tail's mass.
        shared_RV, scratch_RV = self._buffers(masses.tail_RV)
        torch.index_select(self.probs_MCV[masses.at], 0, self._prototype(rows), out=shared_RV)
        return self._draw(rows, masses, shared_RV.scatter_(1, rows.head_ids_RK, 0.0), scratch_RV)

    def stored(self, columns: Mapping[str, Array]) -> dict[str, Array]:
        """The head's arrays with places for ids, prototypes in their dtype, and the draws."""
        arrays = super().stored(columns)
        del arrays["head_ids"]
        arrays["head_ranks"] = self.places_CV[columns["tail_prototype"][..., None], columns["head_ids"]]
        arrays["tail_prototype"] = columns["tail_prototype"].astype(self.encoding.row_dtype)
        if self.encoding.residual_draws:
            ranks_BTMS = self.places_CV[columns["tail_prototype"][..., None, None], columns["residual_ids"]]
            arrays["residual_ranks"] = encode_residual(ranks_BTMS, np.isfinite(columns["residual_log_mass"]))
            arrays["residual_log_mass"] = encode_odds(tokens_last(columns["residual_log_mass"]), MASS_STEP_NATS)
        return arrays

    def _prototype(self, rows: Rows) -> torch.Tensor:
        """int64 [R]: the prototype that the hidden state votes for."""
        return classify(rows.hidden_RD, self.classifier_CE)

    def _buffers(self, like_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of the shape, made once: fresh ones would cost a page fault every 4 KiB."""
        if self._buffers_2RV is None or len(self._buffers_2RV[0]) < len(like_RV):
            self._buffers_2RV = torch.empty_like(like_RV), torch.empty_like(like_RV)
        first_RV, second_RV = self._buffers_2RV
        return first_RV[: len(like_RV)], second_RV[: len(like_RV)]

    def _draw(
        self, rows: Rows, masses: Masses, shared_RV: torch.Tensor, scratch_RV: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Draws from tail / sum(tail) - shared / sum(shared), both taken outside the head.

        The tail's mass and that of the difference are rounded at random to their codes, so that on average they are
        exact, and the target is: head (1 - m), tail m * shared + m * difference.
        """
        step, half = self.encoding.odds_step_nats, self.encoding.residual_draws // 2
        uniforms_R4 = rows.uniforms_RMN[:, masses.at]
        odds_R = _round_at_random(masses.log_odds_R.double() / step, step, torch.sigmoid, uniforms_R4[:, 0])

        # In units of the shared sum: above zero where the prototype gives more than the teacher.
        shared_sum_R = shared_RV.sum(1)
        excess_RV = shared_RV.addcmul_(masses.tail_RV, (shared_sum_R / masses.tail_RV.sum(1))[:, None], value=-1)
        rank_S = torch.arange(half, device=shared_RV.device)
        halves = []
        above_RV = torch.neg(excess_RV, out=scratch_RV).clamp_min_(0.0)
        for draw, part_RV in ((2, above_RV), (3, excess_RV.clamp_min_(0.0))):
            # Evenly spaced from one random start: right on average as independent draws are, and nearer each time.
            halves.append(pick(part_RV, (rank_S + uniforms_R4[:, draw, None]) / half))
        above_R, below_R = (picked.total_R for picked in halves)
        mass_R = torch.sigmoid(odds_R * step) * (above_R + below_R) / shared_sum_R
        # Rows without a tail, or whose tail is the prototype's, have nothing to draw from.
        drawn_R = (above_R > 0) & (below_R > 0) & mass_R.isfinite()
        log_mass_R = torch.where(drawn_R, mass_R, 0.0).log()
        codes_R = _round_at_random(log_mass_R / MASS_STEP_NATS, MASS_STEP_NATS, torch.exp, uniforms_R4[:, 1])
        return {
            "tail_log_odds": odds_R * step,
            "residual_ids": torch.cat([picked.ids_RN for picked in halves], 1) * drawn_R[:, None],
            "residual_log_mass": codes_R * MASS_STEP_NATS,
        }


def _places(order_CV: Array) -> Array:
    """The place [C, V] of every token in each order: the same for all batches."""
    every_11V, first_11 = np.arange(order_CV.shape[1])[None, None], np.zeros((1, 1), np.intp)
    return np.concatenate([encode_ranks(every_11V, first_11, order_1V)[0] for order_1V in order_CV[:, None]])


def classify(hidden_ND: torch.Tensor, classifier_CE: torch.Tensor) -> torch.Tensor:
    """int64 [N]: the row of the classifier [C, D + 1] with the largest product with (hidden state, 1)."""
    votes_NC = torch.addmm(classifier_CE[:, -1], hidden_ND.float(), classifier_CE[:, :-1].T)
    return votes_NC.argmax(1)


def _round_at_random(codes_R: torch.Tensor, step: float, value_of: object, uniforms_R: torch.Tensor) -> torch.Tensor:
    """Whole codes, up or down so that ``value_of(code * step)`` is right on average; -inf stays."""
    assert callable(value_of)
    below_R = codes_R.clamp(-_MAX_CODE, _MAX_CODE - 1).floor()
    low_R, value_R, high_R = (value_of(c * step) for c in (below_R, codes_R, below_R + 1))
    up_R = uniforms_R < (value_R - low_R) / (high_R - low_R)
    return torch.where(codes_R.isneginf(), codes_R, below_R + up_R)
