"""Workers: a failure ends the run soon and says which shard, and Ctrl-C is left to the process that owns them."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
from dask.distributed import Client, LocalCluster

from cache_spec.errors import BadInputError, KdpipeError
from pipeline import workers
from pipeline.config import CaptureConfig

begun: list[int] = []
errors: dict[int, Exception] = {}


def task(_files: Any, _config: Any, _manifest: Any, _staged: Any, shard: int, _threads: int) -> int:
    begun.append(shard)
    if shard in errors:
        raise errors[shard]
    return 1


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CaptureConfig:
    """Settings of two workers; in their place, one thread of this process runs ``task``."""
    begun.clear()
    errors.clear()

    def cluster(_num_workers: int) -> Any:
        return LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        )

    monkeypatch.setattr(workers, "_cluster", cluster)
    monkeypatch.setattr(workers, "_capture_task", task)
    return CaptureConfig(teacher="t", text=("x",), out=tmp_path, workers=2)


def run(config: CaptureConfig) -> int:
    done: list[int] = []
    nothing: Any = None
    workers.capture_on_workers(nothing, config, nothing, nothing, list(range(40)), done.append)
    return sum(done)


def test_every_shard_runs_once(config: CaptureConfig) -> None:
    assert run(config) == 40
    assert sorted(begun) == list(range(40))


def test_after_a_failure_no_shard_is_begun_and_the_lowest_is_told(config: CaptureConfig) -> None:
    errors.update({shard: BadInputError("non-finite-logits", f"block {shard}") for shard in range(40)})
    with pytest.raises(BadInputError, match="non-finite-logits: block 0"):
        run(config)
    assert sorted(begun) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"out-of-memory: shard 2.*smaller --batch-blocks"),
        (ValueError("two\nlines"), "worker-failed: shard 2, found ValueError.*two"),
    ],
)
def test_a_failure_of_a_worker_is_one_line(config: CaptureConfig, error: Exception, message: str) -> None:
    errors[2] = error
    with pytest.raises(KdpipeError, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)


def test_worker_processes_ignore_an_interrupt_and_this_one_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with workers._cluster(1) as cluster, Client(cluster) as client:
        assert client.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is before
