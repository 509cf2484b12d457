"""``python -m benchmarks.campaign``: what a shard costs client and scheduler, and what they keep of it.

In: a number of simulated shards, which take no time on their worker. Out: JSON: time and CPU time a shard, and
anonymous memory of the process that holds client and scheduler, at every tenth part of the run. Offline.
"""

from __future__ import annotations

import argparse
import gc
import json
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
    """Progress that measures this process at every ``every``-th shard."""

    def __init__(self, blocks: BlocksInfo, todo: list[int], every: int) -> None:
        super().__init__(blocks, todo, quiet=True)
        self.every, self.marks = every, list[dict[str, Any]]()
        self._last = (time.perf_counter(), time.process_time())

    def committed(self, shard: int, num_bytes: int) -> None:
        super().committed(shard, num_bytes)
        if self.num_done % self.every == 0:
            now = (time.perf_counter(), time.process_time())
            seconds, cpu = ((new - old) / self.every for new, old in zip(now, self._last, strict=True))
            gc.collect()
            self.marks.append(
                {
                    "shards": self.num_done,
                    "ms_per_shard": round(1e3 * seconds, 2),
                    "client_and_scheduler_cpu_ms_per_shard": round(1e3 * cpu, 2),
                    "anonymous_mb": round(anonymous_bytes() / 1e6, 1),
                }
            )
            self._last = (time.perf_counter(), time.process_time())


def measure(num_shards: int, num_workers: int) -> dict[str, Any]:
    blocks = BlocksInfo(
        num_blocks=num_shards, block_tokens=1 << 18, shard_blocks=1, last_block="drop", limit_tokens=None
    )
    todo = list(range(num_shards))
    with (
        local_cluster(num_workers) as cluster,
        Client(cluster, set_as_default=False) as client,
        Watched(blocks, todo, max(1, num_shards // 10)) as progress,
    ):
        campaign = Campaign(
            client, JobRef("/", "0"), out=Path("/"), retries=3, timeout_s=60, progress=progress, task=simulated
        )
        campaign.run(todo)
    first, last = progress.marks[0], progress.marks[-1]
    growth = last["anonymous_mb"] / first["anonymous_mb"]
    return {"shards": num_shards, "workers": num_workers, "memory_ratio": round(growth, 3), "marks": progress.marks}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps(measure(options.shards, options.workers), indent=2))


if __name__ == "__main__":
    main()
