"""The power fails in a capture: every state that the disk may be left in is read, and some are captured on.

In: a number of states. Out: counts. A state is wrong if its cache can be read and is not whole, if something lacks that
had been acknowledged, or if the same command cannot go on from it to the same arrays.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.faults.recorded import POLICIES, Recording, State, recording, state_after
from benchmarks.faults.small import SmallCaptures, digests
from benchmarks.faults.tally import Tally
from cache_spec.commit import publish_shard
from cache_spec.errors import KdpipeError
from cache_spec.manifest import MANIFEST_NAME
from cache_spec.receipts import committed_shards, read_manifest
from cache_spec.validate import verify_cache
from pipeline.capture import capture
from pipeline.config import CaptureConfig

FINISHED = -1
"""What is acknowledged when a capture returns, beside the shards that are committed."""
_RESUMED = 100
_NOT_DONE_YET = {"unfinished-cache", "unexpected-file"}
"""What a cache may say of itself that is not finished: shards without receipts, and files of nobody."""


def power_campaign(small: SmallCaptures, num_states: int, rng: random.Random) -> dict[str, Any]:
    """Record one capture, and look at ``num_states`` states that it may leave; one in a hundred of them goes on."""
    home, tally = small.folder / "recorded", Tally()
    home.mkdir()
    with recording(home) as record, _saying(record):
        capture(small.config(f"{home.name}/cache"), quiet=True)
        record.says(FINISHED)
    expected = digests(home / "cache")
    states = list(_states(record, num_states, rng))
    resumed = set(rng.sample(range(len(states)), -(-len(states) // _RESUMED)))
    place = small.folder / "state"
    for number, state in enumerate(states):
        place.mkdir()
        state.write(place)
        when = f"after operation {state.after}, {state.policy} lasting"
        kind, problem = _look(place / "cache", state)
        tally.counts[kind] += 1
        tally.check(problem is None, f"{when}: {problem}")
        if problem is None and number in resumed:
            problem = _go_on(small.config(f"{place.name}/cache"), expected)
            tally.check(problem is None, f"{when}: {problem}")
            tally.counts["resumed"] += 1
        shutil.rmtree(place)
    return tally.report(operations=len(record.operations), states=len(states))


@contextmanager
def _saying(record: Recording) -> Iterator[None]:
    """Note each shard as acknowledged when its commit returns."""

    def publish(cache: Path, manifest: Any, packed: Any) -> Any:
        receipt = publish_shard(cache, manifest, packed)
        record.says(receipt.shard)
        return receipt

    with mock.patch("pipeline.place.publish_shard", publish):
        yield


def _states(record: Recording, num_states: int, rng: random.Random) -> Iterator[State]:
    """Distinct states: after each operation by each policy, or of some of these; of random parts, if it takes more."""
    total = len(record.operations)
    moments = [(count, policy) for policy in POLICIES for count in range(total + 1)]
    if num_states < len(moments):
        moments = [(total, POLICIES[0]), *rng.sample(moments, num_states)]
    more = ((rng.randrange(total + 1), "some") for _ in range(16 * num_states))
    seen: set[int] = set()
    for count, policy in itertools.chain(moments, more):
        if len(seen) >= num_states:
            return
        state = state_after(record, count, policy, rng)
        key = hash((state.folders, tuple(state.files.items()), state.said))
        if key not in seen:
            seen.add(key)
            yield state


def _look(cache: Path, state: State) -> tuple[str, str | None]:
    """(what it is, what is wrong with it)."""
    if not (cache / MANIFEST_NAME).exists():
        return "absent", f"lost: {sorted(state.said)}" if state.said else None
    try:
        lost = state.said - {FINISHED} - set(committed_shards(cache, read_manifest(cache)))
    except KdpipeError as error:
        return "unreadable", str(error)
    if lost:
        return "unfinished", f"shards lost: {sorted(lost)}"
    problems = verify_cache(cache)
    if not problems:
        return "finished", None
    worse = [str(problem) for problem in problems if problem.kind not in _NOT_DONE_YET]
    if FINISHED in state.said:
        return "unfinished", f"it was finished: {problems[0]}"
    return "unfinished", worse[0] if worse else None


def _go_on(config: CaptureConfig, expected: dict[str, str]) -> str | None:
    try:
        capture(config, quiet=True)
    except KdpipeError as error:
        return f"no resume: {error}"
    return None if digests(config.out) == expected else "other files after a resume"
