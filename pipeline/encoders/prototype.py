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
from pipeline.encoders.draws import pick, uniforms
from pipeline.encoders.spectrum import Masses, Rows
from pipeline.encoders.topk import TopKEncoder, tokens_last

_MAX_CODE = (1 << 15) - 1
_ROUNDING, _ABOVE, _BELOW = range(3)
_STREAMS = 3
"""Streams of random numbers a temperature."""


class PrototypeEncoder(TopKEncoder):
    """Head, tail odds, prototype, and signed draws where asked for."""

    encoding: Prototype

    def __init__(
        self, encoding: Prototype, geometry: Geometry, tables: Mapping[str, Array], device: torch.device
    ) -> None:
        super().__init__(encoding, geometry, tables, device)
        self.float64 = encoding.residual_draws > 0
        self.classifier_CE = torch.from_numpy(tables["prototype_classifier"]).to(device)
        self.places_CV = _places(token_order(tables["prototypes"]))
        self.probs_MCV = None
        if encoding.residual_draws:
            self.probs_MCV = torch.from_numpy(decode_prototypes(tables["prototypes"])).to(device)

    def columns(self, rows: Rows, head_logprobs_RK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Ids, log-probabilities and prototype."""
        return super().columns(rows, head_logprobs_RK) | {"tail_prototype": self._prototype(rows)}

    def columns_at(self, rows: Rows, masses: Masses) -> dict[str, torch.Tensor]:
        """Log odds of the tail, and the draws."""
        if self.probs_MCV is None:
            return super().columns_at(rows, masses)
        # Made zero at the head and scaled, this is what a reader takes the tail to be, but for the tail's mass.
        shared_RV = self.probs_MCV[masses.at][self._prototype(rows)].scatter_(1, rows.head_ids_RK, 0.0)
        return self._draw(rows, masses, shared_RV)

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

    def _draw(self, rows: Rows, masses: Masses, shared_RV: torch.Tensor) -> dict[str, torch.Tensor]:
        """Draws from tail / sum(tail) - shared / sum(shared), both taken outside the head.

        The tail's mass and that of the difference are rounded at random to their codes, so that on average they are
        exact, and the target is: head (1 - m), tail m * shared + m * difference.
        """
        step, half = self.encoding.odds_step_nats, self.encoding.residual_draws // 2
        streams = [masses.at * _STREAMS + stream for stream in range(_STREAMS)]
        seed, block_R, position_R = self.encoding.seed, rows.block_R, rows.position_R
        rounding_R2 = uniforms(seed, block_R, position_R, stream=streams[_ROUNDING], num_draws=2)
        odds_R = _round_at_random(masses.log_odds_R.double() / step, step, torch.sigmoid, rounding_R2[:, 0])

        tail_sum_R1 = masses.tail_RV.sum(1, keepdim=True, dtype=torch.float64)
        shared_sum_R1 = shared_RV.sum(1, keepdim=True, dtype=torch.float64)
        difference_RV = shared_RV.mul_((-1 / shared_sum_R1).float())
        difference_RV.addcmul_(masses.tail_RV, (1 / tail_sum_R1).float())
        rank_S = torch.arange(half, device=shared_RV.device)
        halves = []
        sums = []
        for stream, sign in ((_ABOVE, 1), (_BELOW, -1)):
            part_RV = (difference_RV * sign).clamp_min_(0.0)
            sums.append(part_RV.sum(1, dtype=torch.float64))
            # Evenly spaced from one random start: right on average as independent draws are, and nearer each time.
            start_R1 = uniforms(seed, block_R, position_R, stream=streams[stream], num_draws=1)
            halves.append(pick(part_RV, (rank_S + start_R1) / half))
        mass_R = torch.sigmoid(odds_R * step) * (sums[0] + sums[1])
        # Rows without a tail, or whose tail is the prototype's, have nothing to draw from.
        drawn_R = (sums[0] > 0) & (sums[1] > 0) & mass_R.isfinite()
        log_mass_R = torch.where(drawn_R, mass_R, 0.0).log()
        codes_R = _round_at_random(log_mass_R / MASS_STEP_NATS, MASS_STEP_NATS, torch.exp, rounding_R2[:, 1])
        return {
            "tail_log_odds": odds_R * step,
            "residual_ids": torch.cat(halves, 1) * drawn_R[:, None],
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
