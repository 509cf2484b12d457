"""The learning rate and loss weights: where they start, where they peak, where they end."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.config import TrainConfig
from train.distiller import LossWeights
from train.schedule import Schedule, WeightSchedule, learning_rate, scheduled_weights, weights_at

SCHEDULES: list[Schedule] = ["linear", "cosine", "constant", "wsd"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_evenly_to_the_peak(schedule: Schedule) -> None:
    rates = [learning_rate(step, 100, peak=2.0, schedule=schedule, warmup=0.05) for step in range(5)]
    assert rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_linear_falls_evenly_towards_zero() -> None:
    rates = [learning_rate(step, 8, peak=1.0, schedule="linear", warmup=0.5) for step in range(4, 8)]
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_is_at_half_the_peak_half_way() -> None:
    assert learning_rate(60, 100, peak=1.0, schedule="cosine", warmup=0.2) == pytest.approx(0.5)
    assert learning_rate(99, 100, peak=1.0, schedule="cosine", warmup=0.2) < 0.001


def test_constant_stays_at_the_peak() -> None:
    assert {learning_rate(step, 50, peak=0.3, schedule="constant", warmup=0.1) for step in range(5, 50)} == {0.3}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 7])
def test_short_runs_train_at_every_step(schedule: Schedule, warmup: float, total_steps: int) -> None:
    rates = [learning_rate(s, total_steps, peak=1.0, schedule=schedule, warmup=warmup) for s in range(total_steps)]
    assert all(0.0 < rate <= 1.0 for rate in rates)
    assert max(rates) == 1.0


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        learning_rate(step, 10, peak=1.0, warmup=0.0)


def test_wsd_stays_at_the_peak_and_falls_evenly_at_the_end() -> None:
    rates = [learning_rate(step, 20, peak=2.0, schedule="wsd", warmup=0.1, cooldown=0.2) for step in range(20)]
    assert rates == pytest.approx([1.0, *[2.0] * 15, 2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("constant", [1.0] * 5),
        ("linear:1:0", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("linear:0.2:1", [0.2, 0.4, 0.6, 0.8, 1.0]),
        ("linear:1:0:0.6", [1.0, 0.5, 0.0, 0.0, 0.0]),
        ("linear:1:0.5:0.2", [1.0, 0.5, 0.5, 0.5, 0.5]),
        ("first:0.4", [1.0, 1.0, 0.0, 0.0, 0.0]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.5]),
    ],
)
def test_a_weight_follows_its_schedule(text: str, factors: list[float]) -> None:
    schedule = WeightSchedule.parse(text)
    found = [schedule.factor(step, 5, warmup=0.4, cooldown=0.4) for step in range(5)]
    assert found == pytest.approx(factors)


def test_weights_at_scales_each_term_by_its_own_schedule() -> None:
    peak = LossWeights(kl=0.8, ce=0.2, cosine=0.4, mse=0.0)
    paths = {"cache": Path("cache"), "out": Path("run")}
    config = TrainConfig(**paths, cosine_weight=0.4)
    assert weights_at(config, peak, 3, 10) == peak
    assert scheduled_weights(config, peak) == {}
    config = TrainConfig(**paths, cosine_weight=0.4, kl_schedule="linear:1:0.5", hidden_schedule="first:0.5")
    assert weights_at(config, peak, 0, 11) == peak
    assert weights_at(config, peak, 10, 11) == LossWeights(kl=0.4, ce=0.2, cosine=0.0, mse=0.0)
    at_the_end = weights_at(config, peak, 10, 11)
    assert scheduled_weights(config, at_the_end) == {"kl_weight": 0.4, "cosine_weight": 0.0}
