"""A capture on a cluster whose processes are killed: workers, nannies, the scheduler, the client.

In: which of them, and how many kills. Out: counts of those after which something acknowledged was lost or torn, or the
end was unlike that of one process. Whatever dies is started again, as a service manager would; the client by the same
command. Processes are forked, so that a worker comes back in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import dask
from distributed import Nanny, Scheduler, Worker

from benchmarks.faults.forked import forked, outcome
from benchmarks.faults.kills import Acknowledged, check_finished, moment
from benchmarks.faults.small import SmallCaptures, digests
from benchmarks.faults.tally import Tally
from pipeline import cli
from pipeline.job import versions

VICTIMS = ("worker", "nanny", "scheduler", "client")
_WORKERS = 2
_LONGEST_PAUSE_S = 1.0
_PATIENCE_S = 120.0
"""Without any progress: far more than anything here takes."""
_HOST = "127.0.0.1"
_SETTINGS = {
    "distributed.scheduler.allowed-failures": 0,
    "distributed.worker.multiprocessing-method": "fork",
    "distributed.worker.profile.enabled": False,
    "distributed.scheduler.active-memory-manager.start": False,
}


def _until_finished(make: Callable[[], Any]) -> None:
    async def serve() -> None:
        async with make() as server:
            await server.finished()

    with dask.config.set(_SETTINGS):
        asyncio.run(serve())


class _Cluster:
    """A scheduler, workers and a client; each can be started again under its name."""

    def __init__(self, small: SmallCaptures, out: Path, *, nannies: bool) -> None:
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.small, self.out = small, out
        self.folder = small.folder / "cluster"
        self.folder.mkdir()
        address = f"tcp://{_HOST}:{self.port}"
        more: Any = {"memory_limit": 0} if nannies else {"memory_limit": 0, "dashboard": False}
        serving = partial(
            Nanny if nannies else Worker, address, nthreads=1, host=_HOST, local_directory=str(self.folder), **more
        )
        scheduler = partial(Scheduler, host=_HOST, port=self.port, dashboard=False, dashboard_address=f"{_HOST}:0")
        # A shard that is killed with its worker is not to blame here, however often that happens.
        command = small.command(
            out.name, scheduler=address, cluster_timeout=60, worker_threads=1, shard_retries=1_000_000
        )
        self.bodies: dict[str, Callable[[], object]] = {
            "scheduler": partial(_until_finished, scheduler),
            **{f"worker-{number}": partial(_until_finished, serving) for number in range(_WORKERS)},
            "client": partial(cli.run, command),
        }
        self.running: dict[str, ForkProcess] = {}

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(self, name: str) -> None:
        self.running[name] = forked(self.bodies[name], self.log(name))

    def start_lost(self) -> None:
        """Start what is not there, but for the client."""
        for name in self.bodies:
            if name != "client" and (name not in self.running or not self.running[name].is_alive()):
                self.start(name)

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].join()

    def end(self) -> None:
        for name in reversed(self.running):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)


def cluster_campaign(small: SmallCaptures, kills: int, rng: random.Random, *, victim: str) -> dict[str, Any]:
    """Kill processes of one kind ``kills`` times while captures go on, and let each capture end."""
    versions()  # read once, not by each child
    expected = digests(small.clean())
    out, tally = small.folder / f"killed-{victim}", Tally()
    cluster, known = _Cluster(small, out, nannies=victim == "nanny"), Acknowledged(out)
    counts = tally.counts
    progress = time.monotonic()
    try:
        cluster.start_lost()
        cluster.start("client")
        while True:
            cluster.start_lost()
            client = cluster.running["client"]
            client.join(timeout=rng.uniform(0, _LONGEST_PAUSE_S))
            when = f"after {counts['kills']} kills"
            if not client.is_alive():
                if client.exitcode == 0:
                    counts["finished_captures"] += 1
                    known.look(tally, when)
                    check_finished(out, expected, tally, when)
                    shutil.rmtree(out)
                    known, progress = Acknowledged(out), time.monotonic()
                    if counts["kills"] >= kills:
                        return tally.report(kills=counts["kills"], victim=victim)
                else:
                    # One line, and the same command goes on: that is what is promised of a client that gives up.
                    told = outcome(client, cluster.log("client"))
                    tally.check("Traceback" not in told, f"{when}: {told}")
                    counts["clients_that_gave_up"] += 1
                cluster.start("client")
                continue
            if counts["kills"] < kills:
                name = victim if victim in cluster.bodies else f"worker-{rng.randrange(_WORKERS)}"
                if not cluster.running[name].is_alive():
                    continue
                cluster.kill(name)
                counts["kills"] += 1
                counts[moment(out)] += 1
                seen = len(known.receipts)
                known.look(tally, when)
                progress = time.monotonic() if len(known.receipts) > seen else progress
                if victim == "client":
                    cluster.start(name)
            if time.monotonic() - progress > _PATIENCE_S:
                tally.check(False, f"{when}: nothing happened for {_PATIENCE_S:g} s")
                return tally.report(kills=counts["kills"], victim=victim)
    finally:
        cluster.end()
