"""What changes over a run: a step and the length of the run come in, a learning rate or loss weights go out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.distiller import LossWeights

Schedule = Literal["linear", "cosine", "constant", "wsd"]
DEFAULT_COOLDOWN = 0.1


def learning_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    schedule: Schedule = "linear",
    warmup: float,
    cooldown: float = DEFAULT_COOLDOWN,
) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0, of a run of ``total_steps``.

    It rises along a line over the first ``round(warmup * total_steps)`` steps, reaches ``peak`` with the last of
    them, then falls to zero at ``total_steps`` (linear, cosine) or stays (constant), or stays and falls along a line
    over the last ``round(cooldown * total_steps)`` steps (wsd: warm-up, stable, decay). No step is wasted on a rate of
    zero. Raises ValueError for a step outside the run.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a run of {total_steps} steps")
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        return peak * min(1.0, (total_steps - step) / max(1, round(cooldown * total_steps)))
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def rate_at(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` that the settings say."""
    return learning_rate(
        step,
        total_steps,
        peak=config.learning_rate,
        schedule=config.schedule,
        warmup=config.warmup,
        cooldown=config.cooldown,
    )


class WeightSchedule(NamedTuple):
    """How the factor of a loss weight changes over a run."""

    kind: Literal["constant", "linear", "first", "wsd"] = "constant"
    start: float = 1.0
    end: float = 1.0
    fraction: float = 1.0

    @classmethod
    def parse(cls, text: str) -> WeightSchedule:
        """Read ``constant``, ``linear:FROM:TO``, ``linear:FROM:TO:FRACTION``, ``first:FRACTION`` or ``wsd``.

        Raises ValueError for anything else.
        """
        kind, *parts = text.split(":")
        try:
            numbers = [float(part) for part in parts]
        except ValueError:
            numbers = [math.nan]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            kind = ""
        if kind == "constant" and not numbers:
            return cls()
        if kind == "wsd" and not numbers:
            return cls("wsd")
        if kind == "first" and len(numbers) == 1 and 0 < numbers[0] <= 1:
            return cls("first", 1.0, 0.0, numbers[0])
        if kind == "linear" and len(numbers) in (2, 3) and 0 < (*numbers, 1.0)[2] <= 1 and max(numbers[:2]) > 0:
            return cls("linear", *numbers)
        raise ValueError(
            f"{text!r} is none of constant, linear:FROM:TO, linear:FROM:TO:FRACTION, first:FRACTION and wsd"
        )

    def factor(self, step: int, total_steps: int, *, warmup: float, cooldown: float) -> float:
        """What the weight is multiplied by at ``step``, counted from 0."""
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            return learning_rate(step, total_steps, peak=1.0, schedule="wsd", warmup=warmup, cooldown=cooldown)
        num_steps = round(self.fraction * total_steps)
        if self.kind == "first":
            return 1.0 if step < num_steps else 0.0
        progress = min(1.0, step / max(1, num_steps - 1))
        return self.start + (self.end - self.start) * progress


def weights_at(config: TrainConfig, peak: LossWeights, step: int, total_steps: int) -> LossWeights:
    """Return the loss weights of optimizer step ``step``; ``peak`` where no schedule is set."""

    def factor(text: str) -> float:
        schedule = WeightSchedule.parse(text)
        return schedule.factor(step, total_steps, warmup=config.warmup, cooldown=config.cooldown)

    hidden = factor(config.hidden_schedule)
    return replace(
        peak,
        kl=peak.kl * factor(config.kl_schedule),
        ce=peak.ce * factor(config.ce_schedule),
        cosine=peak.cosine * hidden,
        mse=peak.mse * hidden,
    )


def scheduled_weights(config: TrainConfig, weights: LossWeights) -> dict[str, float]:
    """Return the weights that follow a schedule, by the names that they have among the metrics."""
    of_terms = {"kl": config.kl_schedule, "ce": config.ce_schedule}
    of_terms |= {"cosine": config.hidden_schedule, "mse": config.hidden_schedule}
    return {
        f"{name}_weight": getattr(weights, name)
        for name, text in of_terms.items()
        if text != "constant" and getattr(config, f"{name}_weight") > 0
    }
