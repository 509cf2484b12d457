"""The client's side of a capture on workers: each shard once, bounded retries, and a verdict on each failure."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import cloudpickle
import pytest
from dask.distributed import Client, Future, LocalCluster

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.manifest import BlocksInfo
from pipeline.campaign import IN_FLIGHT_PER_THREAD, Campaign
from pipeline.job import Committed, JobRef
from pipeline.progress import Progress

NUM_SHARDS = 40
begun: Counter[int] = Counter()
errors: dict[int, list[Exception]] = {}
"""What a shard raises on its first, second, … try."""


def task(_ref: JobRef, shard: int) -> Committed:
    begun[shard] += 1
    if begun[shard] <= len(errors.get(shard, [])):
        raise errors[shard][begun[shard] - 1]
    return Committed(16, 100)


watched: list[Client] = []


def counting_task(_ref: JobRef, shard: int) -> Committed:
    time.sleep(0.05)  # long enough for the client to fill its window
    begun[shard] = len(watched[0].futures)
    return Committed(16, 100)


def disconnecting_task(_ref: JobRef, shard: int) -> Committed:
    begun[shard] += 1
    if shard == 5 and begun[shard] == 1:
        stream: Any = watched[0].scheduler_comm
        loop: Any = watched[0].loop
        loop.add_callback(stream.comm.abort)
        time.sleep(0.1)
    return Committed(16, 100)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """In place of workers, one thread of this process."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as connected,
    ):
        yield connected


@pytest.fixture(autouse=True)
def forgetting() -> None:
    begun.clear()
    errors.clear()
    watched.clear()


def blocks(num_shards: int = NUM_SHARDS) -> BlocksInfo:
    return BlocksInfo(num_blocks=num_shards, block_tokens=16, shard_blocks=1, last_block="drop", limit_tokens=None)


def run(client: Client, *, retries: int = 3, shards: int = NUM_SHARDS, **settings: Any) -> Progress:
    with Progress(blocks(shards), list(range(shards)), quiet=True) as progress:
        options: dict[str, Any] = {"retries": retries, "timeout_s": 20.0, "progress": progress, "task": task} | settings
        campaign = Campaign(client, JobRef("nowhere", "0"), out=Path("out"), **options)
        campaign._poll()
        campaign.run(range(shards))
        assert not campaign._in_flight
        for _ in range(200):  # futures are released by another thread
            if not client.futures:
                break
            time.sleep(0.01)
        assert not client.futures
    return progress


def test_every_shard_runs_once_and_nothing_of_it_is_kept(client: Client) -> None:
    progress = run(client)
    assert begun == Counter(range(NUM_SHARDS))
    assert (progress.num_done, progress.num_bytes, progress.tokens_left) == (NUM_SHARDS, NUM_SHARDS * 100, 0)


def test_no_more_shards_are_in_flight_than_workers_need(client: Client) -> None:
    watched.append(client)
    run(client, task=counting_task, shards=10)
    assert 1 < max(begun.values()) <= IN_FLIGHT_PER_THREAD


@pytest.mark.parametrize(
    "error",
    [
        BadInputError("cannot-write", "cache", found="No space left on device"),
        BadInputError("worker-misses", "worker tcp://there"),
    ],
)
def test_what_would_fail_everywhere_stops_the_run_and_the_lowest_is_told(client: Client, error: BadInputError) -> None:
    errors.update({shard: [error] for shard in range(NUM_SHARDS)})
    with pytest.raises(BadInputError, match=error.kind):
        run(client)
    assert sum(begun.values()) <= IN_FLIGHT_PER_THREAD


def test_a_shard_that_fails_now_and_then_is_tried_again(client: Client) -> None:
    errors.update({3: [KdpipeError("system-error", "shard 3")] * 2, 7: [MemoryError()]})
    assert run(client).num_done == NUM_SHARDS
    assert (begun[3], begun[7], begun[8]) == (3, 2, 1)


@pytest.mark.parametrize(("retries", "tries"), [(1, 1), (3, 3)])
def test_a_poisoned_shard_is_named_and_all_others_are_made(client: Client, retries: int, tries: int) -> None:
    errors.update({5: [KdpipeError("out-of-memory", "shard 5")] * 9, 9: [ValueError("two\nlines")] * 9})
    with pytest.raises(KdpipeError, match=r"shards-failed: out, expected 40.*found 2 given up") as caught:
        run(client, retries=retries)
    line = str(caught.value)
    assert caught.value.exit_code == 1
    assert "5 (out-of-memory: shard 5)" in line
    assert "9 (worker-failed: shard 9" in line
    assert "\n" not in line
    assert begun == Counter(range(NUM_SHARDS)) + Counter({5: tries - 1, 9: tries - 1})


def test_a_block_of_broken_numbers_is_not_tried_twice(client: Client) -> None:
    errors[5] = [BadInputError("non-finite-logits", "block 5")] * 9
    with pytest.raises(KdpipeError, match=r"shards-failed.*non-finite-logits: block 5"):
        run(client)
    assert begun == Counter(range(NUM_SHARDS))


def test_a_fault_of_every_shard_is_not_looked_for_in_each(client: Client) -> None:
    errors.update({shard: [KdpipeError("out-of-memory", f"shard {shard}")] * 9 for shard in range(NUM_SHARDS)})
    with pytest.raises(KdpipeError, match="out-of-memory: shard 0"):
        run(client)
    assert max(begun) < 10


def test_a_task_is_small(client: Client, tmp_path: Path) -> None:
    """What travels for a shard is a path, a digest and a number, whatever the cache is."""
    from pipeline.tasks import capture_task

    ref = JobRef(str(tmp_path / "job-0123456789abcdef.json"), "0" * 64)
    assert len(cloudpickle.dumps((capture_task, ref, 99_999))) < 300 + len(ref.path)


def test_events_are_one_json_object_a_line(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    errors[1] = [KdpipeError("system-error", "shard 1")]
    with Progress(blocks(3), [1, 2], events=True) as progress:
        campaign = Campaign(
            client, JobRef("nowhere", "0"), out=Path("out"), retries=2, timeout_s=20, progress=progress, task=task
        )
        campaign._poll()
        campaign.run([1, 2])
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert Counter(event["event"] for event in events) == {"begun": 1, "committed": 2, "retried": 1}
    assert (events[0]["shards_done"], events[0]["tokens_left"]) == (1, 32)
    assert (events[-1]["shards_done"], events[-1]["tokens_left"], events[-1]["bytes_written"]) == (3, 0, 200)


def test_a_result_that_is_long_in_coming_holds_up_no_other(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the worker that holds it is frozen, or cut off."""
    gather: Any = client._gather

    async def slow(futures: list[Future[Any]], *args: Any, **kwargs: Any) -> Any:
        _, shard, _ = cast(tuple[str, int, int], futures[0].key)
        while shard == 0 and len(begun) < NUM_SHARDS:
            await asyncio.sleep(0.01)
        return await gather(futures, *args, **kwargs)

    monkeypatch.setattr(client, "_gather", slow)
    assert run(client).num_done == NUM_SHARDS
    assert begun == Counter(range(NUM_SHARDS))


def test_a_worker_that_does_not_answer_keeps_nobody_from_beginning(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.campaign.check_worker", lambda ref: time.sleep(1.0))
    with Progress(blocks(), [], events=True) as progress:
        options: dict[str, Any] = {"out": Path("out"), "retries": 1, "timeout_s": 0.3, "progress": progress}
        Campaign(client, JobRef("nowhere", "0"), **options).check_workers()
    assert "worker-silent" in capsys.readouterr().err


def test_a_connection_that_breaks_costs_no_shard(client: Client) -> None:
    """What was in flight is submitted again, and not counted as failed."""
    watched.append(client)
    progress = run(client, task=disconnecting_task, retries=1)
    assert (progress.num_done, progress.num_failed) == (NUM_SHARDS, 0)
    assert set(begun) == set(range(NUM_SHARDS))
