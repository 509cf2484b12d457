"""One contender of the training benchmark in a process of its own, see ``benchmarks.workers``."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks.training.contenders import CONTENDERS, Task
from benchmarks.workers import Peak, answer_orders


class Worker:
    """The contender."""

    def __init__(self, name: str, task: Task) -> None:
        self.contender = CONTENDERS[name](task)

    def turn(self, steps: int) -> dict[str, Any]:
        """Some steps, and the most memory that the process had."""
        with Peak() as peak:
            answer = self.contender.turn(steps)
        return {**answer, "peak_bytes": peak.most_bytes}


def main() -> None:
    name, threads, task = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answer_orders(Worker(name, Task(**json.loads(task))))


if __name__ == "__main__":
    main()
