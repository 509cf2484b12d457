"""Worker processes, schedulers and clients that are killed, frozen or wrong: the rest goes on, or it is told."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dask.distributed import Client

from cache_spec.errors import BadInputError, KdpipeError
from pipeline.campaign import Campaign
from pipeline.capture import capture
from pipeline.cluster import connected, local_cluster
from pipeline.config import CaptureConfig
from pipeline.job import Job, JobRef, versions, write_job
from pipeline.progress import Progress
from pipeline.workers_config import WorkersConfig
from tests.certificates import Authority
from tests.cluster_tasks import POISONED, begun_task, deadly_task, slow_task, times_begun
from tests.clusters import RunningCluster, running_cluster, wait_until
from tests.integration.test_capture import contents
from tests.models import make_folder, write_words
from tests.unit.test_campaign import blocks

NUM_SHARDS = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), 2) as running:
        yield running


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> CaptureConfig:
    """Settings of a capture that one process has made."""
    folder = tmp_path_factory.mktemp("captures")
    config = CaptureConfig(
        teacher=str(make_folder(folder / "teacher", spread=4.0, n_layer=1)),
        text=(str(write_words(folder / "text.jsonl")),),
        out=folder / "clean",
        encoding="topk",
        k=4,
        block_tokens=16,
        batch_blocks=1,
        shard_blocks=1,
        hidden_window=8,
        device="cpu",
        cluster_timeout=60.0,
    )
    capture(config, quiet=True)
    return config


def changed(config: CaptureConfig, **settings: Any) -> CaptureConfig:
    return CaptureConfig(**{**config.model_dump(exclude_unset=True), **settings})


def committed(config: CaptureConfig) -> int:
    return len(list(config.out.glob("receipts/0*.json")))


def once(there: Callable[[], object], then: Callable[[], object]) -> threading.Thread:
    """Do something beside the test, as soon as something is there."""

    def watch() -> None:
        wait_until(there)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def campaign(client: Client, folder: Path, task: Any, *, timeout_s: float = 60.0) -> Progress:
    folder.mkdir(exist_ok=True)
    with Progress(blocks(NUM_SHARDS), list(range(NUM_SHARDS)), quiet=True) as progress:
        settings: dict[str, Any] = {"out": folder, "retries": 3, "timeout_s": timeout_s, "progress": progress}
        made = Campaign(client, JobRef(str(folder), "0"), task=task, **settings)
        made._poll()
        made.run(range(NUM_SHARDS))
    return progress


def test_workers_that_lack_something_are_refused_by_name(
    cluster: RunningCluster, clean: CaptureConfig, tmp_path: Path
) -> None:
    job = Job(
        out=str(tmp_path), store=None,
        fingerprint="0" * 64, staged_key="0" * 64, teacher="t", teacher_folder=clean.teacher,
        weight_files=("model.safetensors",), gguf_file=None, revision=None, weights_sha256="0" * 64, device="cpu",
        spread=False, dtype="float32", compiled=False, num_threads=1, versions=versions(),
    )  # fmt: skip
    good = write_job(tmp_path, job)
    cases = [
        (good, None),
        (JobRef(str(tmp_path / "elsewhere"), "0"), "worker-misses: worker tcp://.*elsewhere"),
        (JobRef(good.path, "0"), "worker-misses.*found other bytes"),
        (write_job(tmp_path, replace(job, teacher_folder="/nowhere")), "worker-misses.*no /nowhere/model.safetensors"),
        (
            write_job(tmp_path, replace(job, versions={**versions(), "torch": "0.1"})),
            r"worker-versions: worker tcp://.* on .*, expected torch 0\.1, found torch 2",
        ),
    ]
    with (
        connected(WorkersConfig(scheduler=cluster.address), 1) as client,
        Progress(blocks(), [], quiet=True) as progress,
    ):
        for ref, message in cases:
            made = Campaign(client, ref, out=tmp_path, retries=3, timeout_s=60, progress=progress)
            if message is None:
                made.check_workers()
                continue
            with pytest.raises(BadInputError, match=message):
                made.check_workers()


def test_after_the_schedulers_death_the_same_command_goes_on(
    cluster: RunningCluster, clean: CaptureConfig, tmp_path: Path
) -> None:
    """The last of the tests that share a cluster."""
    config = changed(clean, out=tmp_path / "cache", scheduler=cluster.address, cluster_timeout=5.0)
    watcher = once(lambda: committed(config) >= 3, cluster.processes[0].kill)
    with pytest.raises(KdpipeError, match="scheduler-lost"):
        capture(config, quiet=True)
    watcher.join()
    assert not (config.out / "seal.json").exists()
    capture(changed(config, scheduler=None), quiet=True)
    assert contents(config.out) == contents(clean.out)


def test_a_worker_without_this_package_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "pipeline"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    with running_cluster(tmp_path, 0) as running:
        running.start_worker(PYTHONPATH=str(broken.parent))
        settings = WorkersConfig(scheduler=running.address)
        with connected(settings, 1) as client, Progress(blocks(), [], quiet=True) as progress:
            made = Campaign(client, JobRef("/", "0"), out=tmp_path, retries=3, timeout_s=60, progress=progress)
            with pytest.raises(BadInputError, match=r"worker-misses: worker tcp://.*No module named 'pipeline\.job'"):
                made.check_workers()


def test_a_shard_that_kills_its_workers_is_named_and_all_others_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    told = rf"shards-failed.*1 given up: {POISONED} \(worker-killed.*found 3 workers"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with local_cluster(2) as workers, Client(workers, set_as_default=False) as client:
        # Ctrl-C is left to this process.
        assert client.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
        with pytest.raises(KdpipeError, match=told):
            campaign(client, folder, deadly_task)
    assert times_begun(folder, POISONED) == 3
    assert all(times_begun(folder, shard) for shard in range(NUM_SHARDS))


def test_a_lost_scheduler_is_told_and_not_waited_for_without_end(tmp_path: Path) -> None:
    with running_cluster(tmp_path, 1) as running:
        scheduler = running.processes[0]
        for stop in (signal.SIGSTOP, signal.SIGKILL):
            folder, timeout_s = tmp_path / stop.name, 3.0
            settings = WorkersConfig(scheduler=running.address, cluster_timeout=60.0)
            if stop == signal.SIGKILL:  # the client itself gives up first, and closes
                settings = settings.model_copy(update={"cluster_timeout": 1.0})
                timeout_s = 60.0
            with connected(settings, 1) as client:
                wait_until(partial(client.sync, client.scheduler.ncores))  # type: ignore[union-attr]
                watcher = once(partial(times_begun, folder, 1), partial(scheduler.send_signal, stop))
                with pytest.raises(KdpipeError, match=r"scheduler-lost: scheduler tcp://.*the same command again"):
                    campaign(client, folder, slow_task, timeout_s=timeout_s)
                watcher.join()
                scheduler.send_signal(signal.SIGCONT)
        settings = WorkersConfig(scheduler=running.address, cluster_timeout=1.0)
        with pytest.raises(KdpipeError, match="no-scheduler: scheduler tcp://"), connected(settings, 1):
            pass


def test_a_cluster_without_workers_is_told(tmp_path: Path) -> None:
    with (
        running_cluster(tmp_path, 0) as running,
        connected(WorkersConfig(scheduler=running.address), 1) as client,
        Progress(blocks(), [], quiet=True) as progress,
    ):
        made = Campaign(client, JobRef("/", "0"), out=tmp_path, retries=3, timeout_s=1.0, progress=progress)
        with pytest.raises(KdpipeError, match=r"no-workers: scheduler tcp://.*found no worker for 1 s"):
            made.check_workers()


def test_a_cluster_of_tls_is_used_with_certificates_and_not_without(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours").certify("node")
    with running_cluster(tmp_path / "cluster", 1, scheme="tls", options=ours.dask_options) as running:
        settings = WorkersConfig(
            scheduler=running.address, tls_ca=ours.authority, tls_cert=ours.certificate, tls_key=ours.key
        )
        with connected(settings, 1) as client:
            assert campaign(client, tmp_path / "begun", begun_task).num_done == NUM_SHARDS
        settings = WorkersConfig(scheduler=running.address, cluster_timeout=5.0)
        with pytest.raises(KdpipeError, match="no-scheduler: scheduler tls://"), connected(settings, 1):
            pass
