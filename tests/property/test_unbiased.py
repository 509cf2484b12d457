"""Encodings that draw are right on average, for every token: a statistical test with a stated rate of false alarms.

The same distribution stands at every position of many blocks, so that its targets are independent and differ in their
draws only. Each token's mean over them is compared with the teacher's probability in units of its standard error; the
limit is such that a right encoder is called wrong, over all tokens of a test together, once in 10,000 seeds
(Bonferroni, normal approximation). The seed is fixed, so the outcome is too.

Legend of axes: B blocks, T tokens, V vocabulary, N = B*T targets.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from cache_spec.encodings import Encoding
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import TopK
from tests.encoded import encode, full, meaning, same_rows

FALSE_ALARMS = 1e-4
NUM_BLOCKS, NUM_TOKENS = 40, 500
TEMPERATURES = (1.0, 2.0)
FEWEST_DRAWS = 30
"""A token that so few targets are expected to hold is left out: its mean is not normal yet."""


def distributions() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    zipf_V = -1.2 * torch.arange(1, 61).float().log()
    return {
        "zipf": zipf_V[torch.randperm(60)],
        "flat": torch.randn(70) * 0.2,
        "ties": torch.tensor([3.0] * 5 + [1.0] * 30 + [0.0] * 30),
        "peaked": torch.cat([torch.tensor([6.0]), torch.randn(50)]),
    }


def z_scores(encoding: Encoding, logits_V: torch.Tensor, at: int, bound: float = 0.0) -> Any:
    """Standardised errors of the mean of every token that is met often enough; a bias of ``bound`` is allowed."""
    arrays, geometry = encode(*same_rows(logits_V, NUM_BLOCKS, NUM_TOKENS), encoding, TEMPERATURES)
    dense_NV = meaning(arrays, encoding, geometry, at, tail="renormalise").reshape(-1, len(logits_V))
    error_V = np.abs(dense_NV.mean(0) - full(logits_V, TEMPERATURES[at]))
    standard_V = dense_NV.std(0) / len(dense_NV) ** 0.5
    often_V = (dense_NV != dense_NV[0]).sum(0) >= FEWEST_DRAWS
    often_V |= standard_V < 1e-12
    return (np.maximum(error_V - bound, 0) / np.maximum(standard_V, 1e-9))[often_V]


def limit(num_tokens: int) -> float:
    return NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * num_tokens))


@pytest.mark.parametrize("name", distributions())
@pytest.mark.parametrize("at", range(len(TEMPERATURES)))
@pytest.mark.parametrize(
    ("encoding", "bound"),
    [
        (Sampled(draws=12), 0.0),
        (Sparsified(k=10, levels=65_535), 1e-6),
        # Rounded values are scaled to sum to one, which brings in the square of a relative error.
        (Sparsified(k=10, levels=255), 1e-4),
        # A head's own shape is within its rounding; its mass, and every token of the tail, are right on average.
        (Prototype(k=6, levels=65_535, prototypes=2, calibration_tokens=1, residual_draws=8), 2e-5),
    ],
    ids=["sampled", "sparsified", "sparsified-coarse", "residual"],
)
def test_every_token_is_right_on_average(name: str, at: int, encoding: Encoding, bound: float) -> None:
    scores = z_scores(encoding, distributions()[name], at, bound)
    assert len(scores) > 30
    assert scores.max() < limit(len(scores))


@pytest.mark.parametrize(
    "encoding",
    [
        TopK(k=30),
        Prototype(k=6, levels=65_535, prototypes=2, calibration_tokens=1),
        Sparsified(k=10, levels=8),
    ],
    ids=["renormalised", "prototype-alone", "too-coarse"],
)
def test_the_test_finds_what_is_biased(encoding: Encoding) -> None:
    scores = z_scores(encoding, distributions()["zipf"], 0, 1e-6)
    assert scores.max() > 2 * limit(len(scores))


def test_draws_of_one_target_are_independent() -> None:
    """Variance of each token's count is that of independent draws: chi-square of N targets, normal approximation."""
    logits_V, draws = distributions()["zipf"], 12
    arrays, geometry = encode(*same_rows(logits_V, NUM_BLOCKS, NUM_TOKENS), Sampled(draws=draws), TEMPERATURES)
    for at, temperature in enumerate(TEMPERATURES):
        probs_V = full(logits_V, temperature)
        counts_NV = meaning(arrays, Sampled(draws=draws), geometry, at).reshape(-1, len(logits_V)) * draws
        expected_V = draws * probs_V * (1 - probs_V)
        variance_V = np.square(counts_NV - draws * probs_V).mean(0)
        fourth_V = np.square(np.square(counts_NV - draws * probs_V) - expected_V).mean(0)
        scores = np.abs(variance_V - expected_V) / np.sqrt(fourth_V / len(counts_NV))
        assert scores.max() < limit(len(scores))
