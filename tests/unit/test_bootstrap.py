"""Intervals of means are as wide as statistics says, come again with their seed, and pairs stay pairs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from train.evaluation.bootstrap import Bootstrap

BOOTSTRAP = Bootstrap(resamples=2000, level=0.95, seed=0)


def mean(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return {"mean": sums[..., 0] / sums[..., 1]}


def units(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([values, np.ones_like(values)], axis=1)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = BOOTSTRAP.intervals(BOOTSTRAP.replicates(units(values), mean))["mean"]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    bootstrap = Bootstrap(resamples=200, level=0.8, seed=3)
    covered = 0
    for _ in range(200):
        low, high = bootstrap.intervals(bootstrap.replicates(units(rng.exponential(size=60)), mean))["mean"]
        covered += low <= 1.0 <= high
    assert 0.7 < covered / 200 < 0.88


def test_a_large_unit_weighs_by_what_it_holds() -> None:
    sums_US = np.array([[10.0, 10.0], [0.0, 1.0], [0.0, 1.0]])
    low, high = BOOTSTRAP.intervals(BOOTSTRAP.replicates(sums_US, mean))["mean"]
    assert (low, high) == (0.0, 1.0)


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    sums_US = units(np.arange(30.0))
    first, again = (BOOTSTRAP.replicates(sums_US, mean)["mean"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = Bootstrap(resamples=2000, level=0.95, seed=1).replicates(sums_US, mean)["mean"]
    assert (first != other).any()


def test_differences_of_pairs_are_as_sure_as_the_pairs_are_alike() -> None:
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 5, size=100)
    one, other = (BOOTSTRAP.replicates(units(hard + shift), mean)["mean"] for shift in (0.0, 0.25))
    low, high = BOOTSTRAP.intervals({"difference": other - one})["difference"]
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(0.25)


def test_one_unit_or_no_resample_has_no_interval() -> None:
    assert BOOTSTRAP.intervals(BOOTSTRAP.replicates(units(np.ones(1)), mean)) == {}
    nothing = Bootstrap(resamples=0, level=0.95, seed=0)
    assert nothing.intervals(nothing.replicates(units(np.ones(9)), mean)) == {}


def test_a_figure_beyond_a_float_has_no_interval() -> None:
    sums_US = units(np.array([1.0, 1e4]))
    found = BOOTSTRAP.replicates(sums_US, lambda sums: {**mean(sums), "e": np.exp(sums[..., 0] / sums[..., 1])})
    assert list(BOOTSTRAP.intervals(found)) == ["mean"]
