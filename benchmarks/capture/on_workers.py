"""Captures on one worker and on two, each of one thread: tokens a second, and CPU seconds a token.

In: a teacher, sizes, turns. Out: the speed of each turn between its first commits and the moment a worker has nothing
left to do, so that starting workers and waiting for the last shard count for nothing; the ratio of two workers to one;
and what two cost in CPU time over what one does, which other load on the machine disturbs less.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.capture.captures import begin
from cache_spec.manifest import BlocksInfo
from pipeline.campaign import capture_on_workers
from pipeline.progress import Progress


class Watched(Progress):
    """Progress that takes the time when each worker has committed a shard or two, and when the first one is idle."""

    def __init__(self, blocks: BlocksInfo, todo: list[int], num_workers: int) -> None:
        super().__init__(blocks, todo, quiet=True)
        self.marked = 2 * num_workers, blocks.num_shards - num_workers + 1
        self.marks = list[tuple[int, float, float]]()

    def committed(self, shard: int, num_bytes: int) -> None:
        super().committed(shard, num_bytes)
        if self.num_done in self.marked:
            self.marks.append((self.num_done, time.perf_counter(), _workers_cpu_s()))

    @property
    def rate(self) -> tuple[float, float]:
        """Shards a second, CPU seconds a shard."""
        (done, began, cpu), (all_done, ended, all_cpu) = self.marks
        return (all_done - done) / (ended - began), (all_cpu - cpu) / (all_done - done)


def measure(teacher: Path, work: Path, *, num_shards: int, turns: int, **settings: Any) -> dict[str, Any]:
    """In turns: one worker, then two."""
    rates: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    block_tokens, shard_blocks = settings["block_tokens"], settings["shard_blocks"]
    for _ in range(turns):
        for num_workers, found in rates.items():
            begun = begin(
                teacher,
                work,
                workers=num_workers,
                worker_threads=1,
                limit_tokens=num_shards * shard_blocks * block_tokens,
                **settings,
            )
            todo = list(range(num_shards))
            with Watched(begun.manifest.blocks, todo, num_workers) as progress:
                files = begun.run.source.files
                capture_on_workers(files, begun.config, begun.manifest, begun.run.staged, todo, progress)
            found.append(progress.rate)
            shutil.rmtree(work)
    shard_tokens = shard_blocks * block_tokens
    return {
        "shards": num_shards,
        "turns": turns,
        "load_average": os.getloadavg()[0],
        "tokens_per_s": {str(n): [round(rate * shard_tokens, 1) for rate, _ in found] for n, found in rates.items()},
        "ratio": round(statistics.median(two[0] / one[0] for one, two in zip(rates[1], rates[2], strict=True)), 3),
        "cpu_ratio_of_one_to_two": round(
            statistics.median(one[1] / two[1] for one, two in zip(rates[1], rates[2], strict=True)), 3
        ),
    }


def _workers_cpu_s() -> float:
    """CPU time of this process's children so far."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
            total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total
