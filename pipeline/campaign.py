"""A capture on dask workers, seen from the client: a bounded window of shards, their retries, and a verdict on each.

In: a connected client, shards, and how one is submitted. Out: every shard committed, or the shards that were given up
named with their errors while all others are committed. Memory follows the window and the failures, not the shards.
"""

from __future__ import annotations

import asyncio
import queue
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dask.distributed import Client, Future, KilledWorker
from dask.utils import key_split

from cache_spec.errors import BadInputError, KdpipeError, WouldLoseDataError
from cache_spec.failures import first_line
from cache_spec.manifest import Manifest
from pipeline.blocks import StagedBlocks
from pipeline.cluster import connected, local_threads
from pipeline.config import CaptureConfig
from pipeline.job import Committed, Job, JobRef, check_worker, versions, write_job
from pipeline.progress import Progress
from pipeline.tasks import capture_task
from pipeline.teacher_files import TeacherFiles

IN_FLIGHT_PER_THREAD = 2
"""One shard that is made and one that waits, so that a worker does not wait for the client."""
_WITHOUT_SUCCESS = 3
"""Shards given up before any is committed, after which the fault is not theirs."""
_OF_A_SHARD = {"non-finite-logits", "non-finite-normaliser", "hidden-overflow"}
"""Errors of what a block says, which would come again: neither a retry nor a stop helps."""
_POLL_S = 1.0
_ANSWER_S = 10.0
_NAMED = 5


def capture_on_workers(
    files: TeacherFiles,
    config: CaptureConfig,
    manifest: Manifest,
    staged: StagedBlocks,
    todo: list[int],
    progress: Progress,
) -> None:
    """Commit every shard of ``todo`` on the workers that ``config`` names.

    Raises the error of the lowest shard where going on makes no sense, else KdpipeError ``shards-failed`` when the
    others are committed; ``no-scheduler``, ``scheduler-lost``, ``no-workers``; ``worker-misses``, ``worker-versions``.
    """
    device = config.device
    job = Job(
        out=str(config.out.resolve()),
        store=config.store,
        fingerprint=manifest.fingerprint,
        staged_key=staged.key,
        teacher=files.name,
        teacher_folder=str(files.folder.resolve()),
        weight_files=files.weight_files,
        gguf_file=files.gguf_file,
        revision=files.revision,
        weights_sha256=str(manifest.teacher.weights_sha256),
        device=manifest.run.device_type if device == "auto" else device,
        spread=config.spread,
        dtype=manifest.run.dtype,
        compiled=manifest.run.compiled,
        num_threads=local_threads(config),
        versions=versions(),
    )
    ref = write_job(staged.path.parent, job)
    with connected(config, len(todo)) as client:
        campaign = Campaign(
            client,
            ref,
            out=config.out,
            retries=config.shard_retries,
            timeout_s=config.cluster_timeout,
            progress=progress,
        )
        if config.dashboard:
            progress.note("dashboard", f"dashboard: {client.dashboard_link}", address=client.dashboard_link)
        campaign.check_workers()
        campaign.run(todo)


class Campaign:
    """Shards on their way through one cluster.

    A shard that fails is tried again until it failed ``retries`` times. One that was on a worker when it died may not
    be to blame, so the last verdict on it is passed when it runs alone. What is certain to fail everywhere, such as a
    full disk, stops the run once the shards that run are finished.
    """

    def __init__(
        self,
        client: Client,
        ref: JobRef,
        *,
        out: Path,
        retries: int,
        timeout_s: float,
        progress: Progress,
        task: Callable[[JobRef, int], Committed] = capture_task,
    ) -> None:
        self._client, self._ref, self._task = client, ref, task
        self._out, self._retries, self._timeout_s, self._progress = out, retries, timeout_s, progress
        assert client.scheduler is not None
        self._place = f"scheduler {client.scheduler.address}"
        # Keys of one run: tasks that an earlier client left behind are not taken for this one's.
        self._run, self._num_submitted = secrets.token_hex(4), 0
        self._in_flight: dict[Any, tuple[int, Future[Any]]] = {}
        self._finished: queue.SimpleQueue[tuple[Any, Committed | None]] = queue.SimpleQueue()
        self._todo: deque[int] = deque()
        self._again: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._alone: int | None = None
        self._failures: Counter[int] = Counter()
        self._given_up: dict[int, KdpipeError] = {}
        self._num_committed = 0
        self._stop: tuple[int, KdpipeError] | None = None
        self._num_threads = 0
        self._polled = self._answered = self._staffed = time.monotonic()
        self._waiting = False

    def check_workers(self) -> None:
        """Wait for a first worker, and refuse to begin where one of those that are there lacks something."""
        while not self._num_threads:
            self._poll()
            if not self._num_threads:
                time.sleep(min(_POLL_S, self._timeout_s) / 4)
        try:
            # Beside the tasks of others, on all workers at once; one that dies meanwhile is no misfit.
            found = self._client.run(check_worker, self._ref, on_error="return", callback_timeout=self._timeout_s)
        except TimeoutError:
            # One that is frozen holds up the answers of all; each process asks itself before its first task too.
            self._progress.note("worker-silent", "a worker does not answer: going on without asking")
            return
        except OSError as error:
            raise self._scheduler_lost(first_line(error)) from None
        for address, problem in sorted(found.items()):
            if isinstance(problem, KdpipeError):
                raise problem
            if isinstance(problem, Exception) and not isinstance(problem, OSError):
                place, told = f"worker {address}", first_line(problem)
                raise BadInputError("worker-misses", place, expected="this version of kdpipe", found=told)

    def run(self, shards: Iterable[int]) -> None:
        """Commit all shards; see ``capture_on_workers`` for what is raised."""
        self._todo.extend(shards)
        try:
            while self._in_flight or (self._stop is None and (self._todo or self._again or self._suspects)):
                self._submit()
                self._settle_finished()
        except KdpipeError as error:
            raise (self._stop[1] if self._stop else error) from None
        if self._stop is not None:
            raise self._stop[1]
        if self._given_up:
            named = [f"{shard} ({self._given_up[shard]})" for shard in sorted(self._given_up)[:_NAMED]]
            more = f" and {len(self._given_up) - _NAMED} more" if len(self._given_up) > _NAMED else ""
            raise KdpipeError(
                "shards-failed",
                self._out,
                expected=f"{self._num_committed + len(self._given_up)} shards",
                found=f"{len(self._given_up)} given up: {'; '.join(named)}{more}",
                hint="the others are committed; the same command tries these again",
            )

    def _submit(self) -> None:
        """Fill the window: what failed before what has not begun, and suspects one by one when all else is done."""
        if self._stop is not None or self._client.status != "running":
            return
        while self._alone is None and len(self._in_flight) < IN_FLIGHT_PER_THREAD * self._num_threads:
            if self._again or self._todo:
                shard = (self._again or self._todo).popleft()
            elif self._suspects and not self._in_flight:
                shard = self._alone = self._suspects.popleft()
            else:
                break
            self._num_submitted += 1
            key = (f"shard-{self._run}", shard, self._num_submitted)
            future = self._client.submit(self._task, self._ref, shard, key=key, pure=False)
            self._in_flight[key] = (shard, future)
            future.add_done_callback(self._tell_finished)
        self._progress.running(min(len(self._in_flight), self._num_threads))

    def _tell_finished(self, future: Future[Any]) -> None:
        """In a thread of dask."""
        assert self._client.loop is not None
        self._client.loop.add_callback(self._fetch, future)

    async def _fetch(self, future: Future[Any]) -> None:
        """Beside all else: the worker that holds a result may be frozen, or cut off."""
        done: Committed | None = None
        # What a broken connection raises depends on where it broke; results that are asked for together end together.
        with suppress(Exception, asyncio.CancelledError):
            if future.status == "finished":
                [done] = await asyncio.wait_for(self._client.gather([future], asynchronous=True), self._timeout_s)
        self._finished.put((future.key, done))

    def _settle_finished(self) -> None:
        """Wait a little for shards to finish, and look after those that did and after the cluster."""
        wait_s = min(_POLL_S, self._timeout_s) / 4
        with suppress(queue.Empty):
            while True:
                key, done = self._finished.get(timeout=wait_s)
                shard, future = self._in_flight.pop(key)
                was_alone = shard == self._alone
                self._alone = None if was_alone else self._alone
                self._settle(shard, future, done, was_alone)
                wait_s = 0.0
        if time.monotonic() - self._polled > min(_POLL_S, self._timeout_s):
            self._poll()

    def _settle(self, shard: int, future: Future[Any], done: Committed | None, was_alone: bool) -> None:
        error: BaseException | None = None
        # The task's own error is returned, not raised.
        with suppress(Exception):
            if done is None and future.status == "error":
                error = future.exception(timeout=self._timeout_s)
        if done is not None:
            self._num_committed += 1
            self._failures.pop(shard, None)
            self._progress.read(done.num_tokens)
            self._progress.committed(shard, done.num_bytes)
        elif isinstance(error, KilledWorker):
            self._killed(shard, error, was_alone)
        elif isinstance(error, Exception):
            self._failed(shard, error)
        else:
            # The connection, or the worker that held the result, went away: the shard is not to blame.
            (self._suspects if was_alone else self._again).append(shard)

    def _failed(self, shard: int, error: Exception) -> None:
        if not isinstance(error, KdpipeError):  # of dask itself; tasks raise our own
            error = KdpipeError("worker-failed", f"shard {shard}", found=repr(error)[:1000])
        of_the_shard = error.kind in _OF_A_SHARD
        if isinstance(error, BadInputError | WouldLoseDataError) and not of_the_shard:
            self._stop_for(shard, error)
            return
        self._failures[shard] += 1
        if of_the_shard or self._failures[shard] >= self._retries:
            self._give_up(shard, error)
        else:
            self._progress.retried(shard, self._failures[shard], error)
            self._again.append(shard)

    def _killed(self, shard: int, error: KilledWorker, was_alone: bool) -> None:
        self._failures[shard] += error.allowed_failures + 1
        count = self._failures[shard]
        told = KdpipeError(
            "worker-killed",
            f"shard {shard}",
            found=f"{count} workers that died with it, the last {error.last_worker.address}",
            hint="most often memory: see the worker's log, and give a smaller --batch-blocks",
        )
        if was_alone and count >= self._retries:
            self._give_up(shard, told)
            return
        self._progress.retried(shard, count, told)
        (self._suspects if count >= self._retries - 1 else self._again).append(shard)

    def _give_up(self, shard: int, error: KdpipeError) -> None:
        self._given_up[shard] = error
        self._progress.failed(shard, error)
        if not self._num_committed and len(self._given_up) >= _WITHOUT_SUCCESS:
            lowest = min(self._given_up)
            self._stop_for(lowest, self._given_up[lowest])

    def _stop_for(self, shard: int, error: KdpipeError) -> None:
        if self._stop is None and self._in_flight:
            self._progress.note("stopping", "stopping: the shards that run are finished first", error=str(error))
        if self._stop is None or shard < self._stop[0]:
            self._stop = (shard, error)

    def _poll(self) -> None:
        """Ask the scheduler for its workers; raises ``scheduler-lost`` or ``no-workers`` after the stated time."""
        self._polled = time.monotonic()
        # Dask remembers the group of each of the last 100,000 keys, 0.7 kB a shard, and asks again for none of ours.
        key_split.cache_clear()
        if self._client.status == "closed":
            raise self._scheduler_lost("it did not come back")
        try:
            threads = self._client.sync(self._ask_threads, callback_timeout=min(_ANSWER_S, self._timeout_s))
        except Exception as error:  # what a broken connection raises depends on where it broke
            if time.monotonic() - self._answered > self._timeout_s:
                raise self._scheduler_lost(first_line(error)) from None
            self._wait_for("scheduler-silent", "the scheduler does not answer")
            return
        self._answered = time.monotonic()
        self._num_threads = sum(threads.values())
        if threads:
            self._staffed = self._answered
            self._waiting = False
        elif self._answered - self._staffed > self._timeout_s:
            raise KdpipeError(
                "no-workers",
                self._place,
                found=f"no worker for {self._timeout_s:g} s",
                hint="start workers, then run the same command again: it goes on where it stopped",
            )
        else:
            self._wait_for("no-workers", "there is no worker")

    async def _ask_threads(self) -> dict[str, int]:
        """Threads of each worker, by address."""
        scheduler = self._client.scheduler
        if scheduler is None:
            raise ConnectionError("it did not come back")
        threads: dict[str, int] = await scheduler.ncores()
        return threads

    def _wait_for(self, event: str, line: str) -> None:
        if not self._waiting:
            self._waiting = True
            self._progress.note(event, f"{line}: waiting for up to {self._timeout_s:g} s")

    def _scheduler_lost(self, found: str) -> KdpipeError:
        return KdpipeError(
            "scheduler-lost",
            self._place,
            expected=f"an answer within {self._timeout_s:g} s",
            found=found,
            hint="run the same command again when it is back: it goes on where it stopped",
        )
