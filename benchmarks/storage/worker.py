"""One engine of the storage benchmark in a process of its own, pinned to one core, told by lines what to do next.

In: JSON objects on standard input, one a line. Out: one a line on standard output: times, bytes, or what went wrong.
Processes take turns, so no engine's caches, threads or memory count for another.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.storage.content import MODEL_ARRAYS, Sizes, Source
from benchmarks.storage.engines import ENGINES, Read
from benchmarks.workers import Peak, answer_orders

# A set that takes this long to open need not be opened again.
_OPENING_S = 2.0


class Worker:
    """The engine, and its reader while one is open."""

    def __init__(self, engine: str) -> None:
        self.engine = ENGINES[engine]
        self.read: Read | None = None

    def write(self, source: str, folder: str) -> dict[str, Any]:
        """Write a set once, timed as seen by a clock and as time of the processor."""
        with Peak() as peak:
            wall, cpu = time.perf_counter(), time.process_time()
            self.engine.write(Source(Path(source)), Path(folder))
            times = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        return {**times, "peak_bytes": peak.grown_bytes}

    def open(self, source: str, folder: str) -> dict[str, Any]:
        """Open what was written; a reader that was open is closed first."""
        self.read = None
        gc.collect()
        self.read = self.engine.open(Path(folder), Source(Path(source)).sizes)
        return {}

    def check(self, source: str, blocks: list[int]) -> dict[str, Any]:
        """Compare some blocks with the set, value by value."""
        assert self.read is not None
        whole, batch = Source(Path(source)), self.read(blocks)
        different = []
        for name in MODEL_ARRAYS:
            rows = np.concatenate([whole.rows(name, block, 1) for block in blocks])
            expected = rows[:, 0] if name == "tail_log_odds" else rows
            found = np.asarray(batch[name])
            if found.shape != expected.shape or not np.array_equal(found.astype(expected.dtype), expected):
                different.append(name)
        return {"different": different}

    def turn(self, blocks: list[int], batch_blocks: int, limit_s: float) -> dict[str, Any]:
        """Read batches until the blocks or the time are over."""
        assert self.read is not None
        num_read, wall, cpu = 0, time.perf_counter(), time.process_time()
        while num_read < len(blocks) and (time.perf_counter() - wall < limit_s or not num_read):
            batch = blocks[num_read : num_read + batch_blocks]
            self.read(batch)
            num_read += len(batch)
        return {"blocks": num_read, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}

    def memory(self, source: str, folder: str, blocks: list[int], batch_blocks: int) -> dict[str, Any]:
        """Anonymous memory that opening and reading add, and the size of the arrays of one batch among it."""
        self.read = None
        with Peak() as peak:
            self.open(source, folder)
            assert self.read is not None
            for at in range(0, len(blocks), batch_blocks):
                batch = self.read(blocks[at : at + batch_blocks])
        return {"peak_bytes": peak.grown_bytes, "batch_bytes": sum(array.nbytes for array in batch.values())}

    def openings(self, sizes: dict[str, Any], folder: str, times: int) -> dict[str, Any]:
        """Time of opening a set, and what opening looks at."""
        seen: dict[str, int] = {"opened": 0, "listed": 0}
        counting = False

        def count(event: str, _: tuple[Any, ...]) -> None:
            if counting and event in ("open", "os.listdir", "os.scandir"):
                seen["opened" if event == "open" else "listed"] += 1

        made = Sizes(**{**sizes, "temperatures": tuple(sizes["temperatures"])})
        opening = self.engine.open_many or self.engine.open
        sys.addaudithook(count)
        taken: list[float] = []
        while len(taken) < times and sum(taken) < _OPENING_S:
            # Not the first time, when libraries are loaded.
            counting = len(taken) == 1
            wall = time.perf_counter()
            opening(Path(folder), made)
            taken.append(time.perf_counter() - wall)
            gc.collect()
        counting = False
        return {"seconds": sorted(taken)[len(taken) // 2], "files_opened": seen["opened"], "listings": seen["listed"]}


def main() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        from numcodecs import blosc

        blosc.set_nthreads(1)
    except ImportError:
        pass
    answer_orders(Worker(sys.argv[1]))


if __name__ == "__main__":
    main()
