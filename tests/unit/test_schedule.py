"""The learning rate: where it starts, where it peaks, where it ends."""

from __future__ import annotations

import pytest

from train.schedule import Schedule, learning_rate

SCHEDULES: list[Schedule] = ["linear", "cosine", "constant"]


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
