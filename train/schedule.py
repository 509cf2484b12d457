"""The learning rate: a step and the length of the run come in, one float goes out."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate(step: int, total_steps: int, *, peak: float, schedule: Schedule = "linear", warmup: float) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0, of a run of ``total_steps``.

    It rises along a line over the first ``round(warmup * total_steps)`` steps, reaches ``peak`` with the last of
    them, then falls to zero at ``total_steps`` (linear, cosine) or stays (constant). The first step is never wasted
    on a rate of zero. Raises ValueError for a step outside the run.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a run of {total_steps} steps")
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
