"""DistillKit's published settings, emulated from their description, on the same positions.

In: the teacher's log-probabilities. Out: what a loss would be given. K log-probabilities of each position are kept at
temperature 1: the first few as bfloat16, the others as the values of a curve fitted by least squares over rank, whose
coefficients are float32; ids take as many bits as the vocabulary needs. At another temperature what was kept is
divided by it; then the missing mass is either left out and the kept rescaled (``zero``), or taken as one outcome, whose
mass is raised to 1 / T like every other (``uniform``).

Legend of axes: C rows of a chunk, V vocabulary, K kept, P coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from train.loss_targets import BucketTargets, LinearTargets, points

_SMALLEST_REST = 1e-6


@dataclass(frozen=True, kw_only=True)
class DistillKit:
    """One setting of that toolkit."""

    name: str
    k: int
    exact: int
    """Log-probabilities stored as they are."""
    powers: tuple[float, ...]
    """Of the rank, in the curve of the others."""
    missing: Literal["zero", "uniform"]

    def bytes_per_token(self, vocab_size: int) -> float:
        """Packed size: no compression follows."""
        ids = -(-self.k * math.ceil(math.log2(vocab_size)) // 8)
        return ids + 2 * self.exact + 4 * len(self.powers)

    def kept(self, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [C, K], and the log-probabilities at temperature 1 that a reader gets back."""
        values_CK, ids_CK = log_p_CV.topk(min(self.k, log_p_CV.shape[1]), dim=1)
        curve_CK = values_CK[:, self.exact :].double()
        rank_K = torch.arange(curve_CK.shape[1], dtype=torch.float64)
        design_KP = torch.stack([rank_K**power for power in self.powers], dim=1)
        coefficients_CP = (curve_CK @ torch.linalg.pinv(design_KP).T).float()
        fitted_CK = (coefficients_CP.double() @ design_KP.T).to(log_p_CV.dtype)
        exact_CK = values_CK[:, : self.exact].bfloat16().to(log_p_CV.dtype)
        return ids_CK, torch.cat([exact_CK, fitted_CK], dim=1)

    def targets(self, log_p_CV: Tensor, temperature: float) -> LinearTargets | BucketTargets:
        """What a loss at that temperature is given, from the full log-probabilities at temperature 1."""
        ids_CK, values_CK = self.kept(log_p_CV)
        scaled_CK = values_CK / temperature
        if self.missing == "zero":
            return points(ids_CK, scaled_CK.softmax(dim=1))
        rest_C = (1 - values_CK.exp().sum(dim=1)).clamp(_SMALLEST_REST, 1.0)
        log_rest_C1 = (rest_C.log() / temperature).unsqueeze(1)
        log_probs_CM = torch.cat([scaled_CK, log_rest_C1], dim=1).log_softmax(dim=1)
        return BucketTargets(ids_NK=ids_CK, log_probs_NK=log_probs_CM[:, :-1], log_rest_N=log_probs_CM[:, -1])


RIVALS = (
    DistillKit(name="DistillKit 128, zero", k=128, exact=16, powers=(0, 1, 2, 3, 4, 0.5), missing="zero"),
    DistillKit(name="DistillKit 128, uniform", k=128, exact=16, powers=(0, 1, 2, 3, 4, 0.5), missing="uniform"),
    DistillKit(name="DistillKit 50, zero", k=50, exact=1, powers=(0, 1, 0.5), missing="zero"),
)
