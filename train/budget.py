"""How long a run may go on: hours and tokens of the settings come in, steps and the schedule's place go out.

A budget of tokens is a number of steps, known beforehand. One of hours is not: the schedule then follows the clock as
well as the steps, whichever is further, so that the learning rate has fallen when time is up.
"""

from __future__ import annotations

import numpy as np

from cache_spec.reader import CacheReader
from train.batches import StepPlan, epoch_order


def steps_for_tokens(reader: CacheReader, plan: StepPlan, max_tokens: int, *, seed: int, window_shards: int) -> int:
    """Return the number of steps after which ``max_tokens`` real tokens are reached, at most the plan's."""
    with reader.read_ahead(["block_lengths"]) as ahead:
        ahead.want(range(reader.manifest.blocks.num_shards))
        tokens_B = reader.lengths(np.arange(plan.num_blocks)).astype(np.int64)
    epochs, left = divmod(max_tokens, int(tokens_B.sum()))
    steps = epochs * plan.steps_per_epoch
    if left and steps < plan.total_steps:
        order = epoch_order(reader, plan, epoch=epochs, seed=seed, window_shards=window_shards)
        reached_B = np.cumsum(tokens_B[order.indices(0, plan.num_blocks)])
        blocks = int(np.searchsorted(reached_B, left)) + 1
        steps += -(-blocks // plan.step_blocks)
    return min(steps, plan.total_steps)


def schedule_step(step: int, total_steps: int, *, seconds: float, max_hours: float | None) -> int:
    """Return the step that the schedule is at: ``step``, or further where time runs out before the steps do."""
    if max_hours is None:
        return step
    return min(max(step, int(total_steps * seconds / (3600 * max_hours))), total_steps - 1)


def is_spent(seconds: float, max_hours: float | None) -> bool:
    """Whether a budget of hours is used up."""
    return max_hours is not None and seconds >= 3600 * max_hours
