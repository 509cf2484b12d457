"""Writers of one shard that race: two to four processes commit it at once, one of them stopped for a while.

In: how many races. Out: counts. Every writer must end well and be told of the same receipt, and the
shard's files must be those of the whole cache.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.small import SmallCaptures, digests
from benchmarks.faults.tally import Tally
from cache_spec.commit import commit_shard
from cache_spec.durable import remove_leftovers
from cache_spec.layout import array_specs
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from cache_spec.receipts import receipt_path
from cache_spec.targets import Array

_SHARD = 0
_PATIENCE_S, _LONGEST_S = 0.3, 60.0


def race_campaign(small: SmallCaptures, races: int, rng: random.Random) -> dict[str, Any]:
    """Let writers race ``races`` times for the first shard of a copy of a whole cache."""
    cache = small.clean()
    reader = CacheReader.open(cache)
    manifest, specs = reader.manifest, array_specs(reader.manifest)
    first, count = manifest.blocks.shard_range(_SHARD)
    arrays = {name: reader.read(name, range(first, first + count)) for name in specs}
    copy, expected = small.folder / "raced", digests(cache)
    shutil.copytree(cache, copy)
    tally = Tally()
    began = time.perf_counter()
    commit_shard(copy, manifest, _SHARD, arrays)
    longest_s = 4 * (time.perf_counter() - began)
    for race in range(races):
        for path in (receipt_path(copy, _SHARD), *(copy / spec.shard_path(_SHARD) for spec in specs.values())):
            path.unlink()
        num_writers = rng.randint(2, 4)
        tally.counts["writers"] += num_writers
        problem = _race(copy, manifest, arrays, num_writers, stop_after_s=rng.uniform(0, longest_s))
        tally.check(problem is None, f"race {race}: {problem}")
        remove_leftovers([copy, *(copy / name for name in specs), receipt_path(copy, _SHARD).parent])
        tally.check(digests(copy) == expected, f"race {race}: other files")
    shutil.rmtree(copy)
    return tally.report(races=races)


def _race(
    cache: Path, manifest: Manifest, arrays: dict[str, Array], num_writers: int, *, stop_after_s: float
) -> str | None:
    """What went wrong, if anything did; the first writer is stopped until the others are done, if they can be."""
    fork = multiprocessing.get_context("fork")
    start, told = fork.Barrier(num_writers + 1), fork.SimpleQueue()

    def write() -> None:
        start.wait()
        receipt = commit_shard(cache, manifest, _SHARD, arrays)
        told.put(json.dumps(receipt.model_dump(mode="json"), sort_keys=True))

    writers = [fork.Process(target=write) for _ in range(num_writers)]
    for writer in writers:
        writer.start()
    start.wait()
    time.sleep(stop_after_s)
    zombie, others = writers[0], writers[1:]
    assert zombie.pid is not None
    if zombie.is_alive():
        os.kill(zombie.pid, signal.SIGSTOP)
    for other in others:
        # One that holds the lock keeps the others waiting: it must go on first.
        other.join(timeout=_PATIENCE_S)
    if zombie.is_alive():
        os.kill(zombie.pid, signal.SIGCONT)
    for writer in writers:
        writer.join(timeout=_LONGEST_S)
        if writer.exitcode != 0:
            writer.kill()
            return f"a writer ended with {writer.exitcode}"
    return None if len({told.get() for _ in writers}) == 1 else "writers were told of different receipts"
