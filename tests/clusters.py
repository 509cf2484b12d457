"""Dask clusters as a user starts them: a scheduler and workers as processes, which tests may kill.

In: how many workers, and on which hosts. Out: their processes and the scheduler's address; all of them end with the
test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.processes import free_port

START_S = 120.0
ENVIRONMENT = {
    "DASK_LOGGING__DISTRIBUTED": "critical",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[1]),
}


class Host(NamedTuple):
    """Where processes run."""

    address: str = "127.0.0.1"
    enter: tuple[str, ...] = ()
    """What stands before a command that is to run there."""


LOOPBACK = Host()


@dataclass
class RunningCluster:
    """Processes of one cluster, workers without nannies: one that is killed does not come back."""

    folder: Path
    host: Host = LOOPBACK
    port: int = field(default_factory=free_port)
    scheme: str = "tcp"
    options: tuple[str, ...] = ()
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.scheme}://{self.host.address}:{self.port}"

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        options = ["--host", self.address, "--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        return self._start(self.host, "scheduler", *options)

    def start_worker(self, host: Host = LOOPBACK, **environment: str) -> subprocess.Popen[bytes]:
        options = ["--nthreads", "1", "--no-nanny", "--memory-limit", "0", "--no-dashboard", "--host", host.address]
        self.workers.append(self._start(host, "worker", self.address, *options, **environment))
        return self.workers[-1]

    def _start(self, host: Host, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        module = "distributed.cli.dask_" + arguments[0]
        command = [*host.enter, sys.executable, "-m", module, *arguments[1:], *self.options]
        folder = ["--local-directory", str(self.folder)] if arguments[0] == "worker" else []
        with open(self.folder / f"{arguments[0]}-{len(self.processes)}.log", "wb") as log:
            process = subprocess.Popen(
                [*command, *folder],
                cwd=self.folder,
                env={**os.environ, **ENVIRONMENT, **environment},
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process


@contextmanager
def running_cluster(folder: Path, num_workers: int, **settings: object) -> Iterator[RunningCluster]:
    """A scheduler and workers that are on their way up; clients wait for them."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = RunningCluster(folder, **settings)  # type: ignore[arg-type]
    try:
        cluster.start_scheduler()
        for _ in range(num_workers):
            cluster.start_worker()
        yield cluster
    finally:
        for process in cluster.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in cluster.processes:
            process.wait()


def wait_until(there: Callable[[], object], seconds: float = START_S) -> None:
    """Return when ``there()`` is true; AssertionError if that takes far longer than it can."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
