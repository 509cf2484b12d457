"""One contender of the budget benchmark, or the making of its data, in a process of its own.

In: orders, see ``benchmarks.workers``, and the moment when time is up, of a clock that all processes share. Out: what
was made in that time, and what it took.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.budget.text import make_text_cache
from benchmarks.training.contenders import OnlineLoop, Task
from benchmarks.workers import answer_orders
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from pipeline.estimate import estimate
from train.budget import is_spent, schedule_step
from train.config import TrainConfig
from train.loop import train
from train.run import step_plan
from train.run_files import STUDENT_NAME
from train.schedule import rate_at
from train.student import quiet_transformers

CACHED, ONLINE, TEXT = "cached", "online", "text"
WAYS = (TEXT, ONLINE, CACHED)
"""Cross-entropy alone, the teacher in memory, and the teacher's cache."""
# A budget that is spent already still has its one step.
_LEAST_HOURS = 1e-9


def tokens_for(seconds: float, tokens_per_s: float, *, calibration_tokens: int, block_tokens: int, least: int) -> int:
    """Tokens, of whole blocks and at least ``least``, that a capture of so many seconds has; the pass over some of
    them that prototypes are learnt from takes as long as that for their targets."""
    passed = seconds * tokens_per_s
    tokens = max(passed - calibration_tokens, passed / 2)
    return max(int(tokens // block_tokens), -(-least // block_tokens)) * block_tokens


def capture_until(settings: dict[str, Any], end: float) -> dict[str, Any]:
    """Capture as much text as fits, by the rate that ``--dry-run`` finds, until the clock says ``end``."""
    config = CaptureConfig(**settings)
    began = time.monotonic()
    facts = estimate(config)
    # Whatever else that took than time with the teacher, a capture takes as well.
    left_s = end - time.monotonic() - (time.monotonic() - began)
    encoding = facts["encoding"]
    tokens = tokens_for(
        left_s,
        facts["tokens_per_s"],
        calibration_tokens=0 if config.prototypes_from else encoding.get("calibration_tokens", 0),
        block_tokens=config.block_tokens,
        least=max(encoding.get("prototypes", 1), config.batch_blocks * config.block_tokens),
    )
    made = capture(CaptureConfig(**settings, limit_tokens=tokens), quiet=True)
    return {"tokens": made["tokens"], "bytes": made["bytes"], "estimated_tokens_per_s": facts["tokens_per_s"]}


def train_online(loop: OnlineLoop, config: TrainConfig) -> dict[str, Any]:
    """The plain loop with the teacher in memory, under the schedule, the budget and the order of the product."""
    with quiet_transformers():
        plan, steps, tokens, seconds = step_plan(config, loop.reader), 0, 0, 0.0
        began = time.perf_counter()
        for micro in loop.micro_batches(config):
            at = schedule_step(steps, plan.total_steps, seconds=seconds, max_hours=config.max_hours)
            loop.optimizer.param_groups[0]["lr"] = rate_at(config, at, plan.total_steps)
            loop.step(micro.batch.input_ids_BT.long())
            steps += 1
            tokens += micro.batch.input_ids_BT.numel()
            seconds = time.perf_counter() - began
            if is_spent(seconds, config.max_hours):
                break
        loop.model.save_pretrained(config.out / STUDENT_NAME)
    return {"steps": steps, "tokens": tokens, "seconds": round(seconds, 3)}


class Worker:
    """What the process can be told to do; times are those of ``time.monotonic``."""

    def text(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Tokenise the text."""
        return {"tokens": make_text_cache(CaptureConfig(**settings))}

    def capture(self, settings: dict[str, Any], end: float) -> dict[str, Any]:
        """Run the teacher once."""
        return capture_until(settings, end)

    def train(self, way: str, task: dict[str, Any], out: str, end: float) -> dict[str, Any]:
        """Train one student until time is up."""
        made = Task(**task)
        online = OnlineLoop(made) if way == ONLINE else None
        if online is not None:
            online.load()
        hours = max(_LEAST_HOURS, (end - time.monotonic()) / 3600)
        config = made.config(Path(out), distils=way != TEXT, max_hours=hours)
        result = train(config, quiet=True) if online is None else train_online(online, config)
        return {name: result[name] for name in ("steps", "tokens", "seconds")}


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    answer_orders(Worker())


if __name__ == "__main__":
    main()
