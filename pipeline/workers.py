"""Capture on local dask workers: one task is one shard, and only names and counts travel.

In: shards that are not committed. Out: committed shards, the same bytes that one process would have written. Workers
read staged blocks and write shards themselves; the client keeps a bounded number of tasks in flight.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from dask.distributed import Client, LocalCluster, as_completed, get_worker

from cache_spec.errors import KdpipeError
from cache_spec.manifest import Manifest
from pipeline.blocks import StagedBlocks
from pipeline.config import CaptureConfig
from pipeline.encoders.spectrum import Encoder
from pipeline.failures import as_failure
from pipeline.folder import read_tables
from pipeline.shard import capture_shard, encoder_of
from pipeline.teacher import Teacher, load_teacher
from pipeline.teacher_files import TeacherFiles

_IN_FLIGHT_PER_WORKER = 2

# One teacher and one encoder per worker process, loaded by the first task that needs them.
_teachers: dict[str, Teacher] = {}
_encoders: dict[str, Encoder] = {}


def capture_on_workers(
    files: TeacherFiles,
    config: CaptureConfig,
    manifest: Manifest,
    staged: StagedBlocks,
    todo: list[int],
    on_tokens: Callable[[int], object],
) -> None:
    """Commit every shard of ``todo`` on ``config.workers`` processes.

    After a failure no shard is begun; those that run are finished, and the lowest failed one's error is raised.
    """
    threads = max(1, (os.cpu_count() or 1) // config.workers)
    failures: dict[int, BaseException] = {}
    with (
        _cluster(min(config.workers, len(todo))) as cluster,
        Client(cluster) as client,
    ):
        shards = iter(todo)

        def submit(count: int) -> Iterator[object]:
            for shard in islice(shards, count):
                yield client.submit(
                    _capture_task, files, config, manifest, staged, shard, threads, key=("shard", shard), pure=False
                )

        running = as_completed(submit(_IN_FLIGHT_PER_WORKER * config.workers))
        for future in running:
            error = future.exception()
            if error is None:
                on_tokens(future.result())
            else:
                failures[future.key[1]] = error
            for next_future in submit(0 if failures else 1):
                running.add(next_future)
    if failures:
        lowest = min(failures)
        first = failures[lowest]
        if isinstance(first, KdpipeError):
            raise first
        failure = as_failure(first, f"shard {lowest}")
        raise failure or KdpipeError("worker-failed", f"shard {lowest}", found=repr(first)) from first


@contextmanager
def _cluster(num_workers: int) -> Iterator[LocalCluster]:
    """Worker processes that leave Ctrl-C to this one: they end with it, and say nothing of it."""
    # The processes inherit what is ignored; only a main thread may change it.
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        cluster = LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            memory_limit=0,
            silence_logs=logging.CRITICAL,
        )
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
    with cluster:
        yield cluster


def _capture_task(
    files: TeacherFiles, config: CaptureConfig, manifest: Manifest, staged: StagedBlocks, shard: int, threads: int
) -> int:
    """Runs on a worker: commit one shard, return its number of tokens."""
    torch.set_num_threads(threads)
    teacher, out = _teacher(files, config), Path(config.out)
    if manifest.fingerprint not in _encoders:
        _encoders[manifest.fingerprint] = encoder_of(manifest, read_tables(out, manifest), teacher.device)
    capture_shard(out, manifest, staged, teacher, _encoders[manifest.fingerprint], shard)
    return manifest.blocks.shard_range(shard)[1] * manifest.blocks.block_tokens


def _teacher(files: TeacherFiles, config: CaptureConfig) -> Teacher:
    key = f"{files.weights_sha256} {config.device} {config.dtype}"
    if key not in _teachers:
        device = config.device
        if device in ("auto", "cuda") and torch.cuda.is_available():
            # Worker names are 0, 1, 2, …: one GPU each, round robin. Not run on a GPU yet.
            device = f"cuda:{int(get_worker().name) % torch.cuda.device_count()}"
        _teachers[key] = load_teacher(files, device=device, dtype=config.dtype)
    return _teachers[key]
