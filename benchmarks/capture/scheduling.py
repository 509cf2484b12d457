"""What a shard costs client and scheduler, and what they keep of it.

In: a number of simulated shards, which take no time on their worker. Out: time and CPU time a shard, and anonymous
memory of the process that holds client and scheduler, after 1% and each tenth of the run.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

from dask.distributed import Client

from benchmarks.workers import anonymous_bytes
from cache_spec.manifest import BlocksInfo
from pipeline.campaign import Campaign
from pipeline.cluster import local_cluster
from pipeline.job import Committed, JobRef
from pipeline.progress import Progress


def simulated(_ref: JobRef, _shard: int) -> Committed:
    return Committed(1 << 18, 10_000_000)


class Watched(Progress):
    """Progress that measures this process after 1% and each tenth of the shards."""

    def __init__(self, blocks: BlocksInfo, todo: list[int]) -> None:
        super().__init__(blocks, todo, quiet=True)
        self.stops = {max(1, len(todo) // 100), *(len(todo) * tenth // 10 for tenth in range(1, 11))}
        self.marks: list[dict[str, Any]] = []
        self._last = (0, time.perf_counter(), time.process_time())

    def committed(self, shard: int, num_bytes: int) -> None:
        super().committed(shard, num_bytes)
        if self.num_done in self.stops:
            now = (self.num_done, time.perf_counter(), time.process_time())
            count, seconds, cpu = (new - old for new, old in zip(now, self._last, strict=True))
            gc.collect()
            self.marks.append(
                {
                    "shards": self.num_done,
                    "ms_per_shard": round(1e3 * seconds / count, 2),
                    "client_and_scheduler_cpu_ms_per_shard": round(1e3 * cpu / count, 2),
                    "anonymous_mb": round(anonymous_bytes() / 1e6, 1),
                }
            )
            print(self.marks[-1], file=sys.stderr, flush=True)
            self._last = (self.num_done, time.perf_counter(), time.process_time())


def measure(num_shards: int, num_workers: int) -> dict[str, Any]:
    blocks = BlocksInfo(
        num_blocks=num_shards, block_tokens=1 << 18, shard_blocks=1, last_block="drop", limit_tokens=None
    )
    todo = list(range(num_shards))
    with (
        local_cluster(num_workers) as cluster,
        Client(cluster, set_as_default=False) as client,
        Watched(blocks, todo) as progress,
    ):
        campaign = Campaign(
            client, JobRef("/", "0"), out=Path("/"), retries=3, timeout_s=60, progress=progress, task=simulated
        )
        campaign.run(todo)
    first, last = progress.marks[0], progress.marks[-1]
    costs = [mark["client_and_scheduler_cpu_ms_per_shard"] for mark in progress.marks]
    return {
        "shards": num_shards,
        "workers": num_workers,
        "cpu_ms_per_shard": round(sum(costs[1:]) / len(costs[1:]), 2),
        "last_tenth_of_first": round(costs[-1] / costs[1], 3),
        "memory_ratio": round(last["anonymous_mb"] / first["anonymous_mb"], 3),
        "marks": progress.marks,
    }
