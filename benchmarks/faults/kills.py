"""Captures that are killed: SIGKILL at random moments, and the same command again, until it may finish.

In: how many kills. Out: counts of those after which something acknowledged was lost or torn, or the end was unlike an
undisturbed one's. One capture is killed again and again: each process goes on where the one before it died.
"""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults.forked import forked, outcome, run_forked
from benchmarks.faults.small import SmallCaptures, digests
from benchmarks.faults.tally import Tally
from cache_spec.manifest import MANIFEST_NAME
from cache_spec.receipts import RECEIPTS_FOLDER, committed_shards, read_manifest, receipt_path
from cache_spec.validate import check_shard, verify_cache
from pipeline import cli


@dataclass
class Acknowledged:
    """The receipts that a capture has written: none may ever be lost, change, or stand for what is not whole."""

    cache: Path
    receipts: dict[int, bytes] = field(default_factory=dict)

    def look(self, tally: Tally, when: str) -> None:
        """Compare with what was there before, and read every new shard whole."""
        if not (self.cache / MANIFEST_NAME).exists():
            tally.check(not self.receipts, f"{when}: the manifest is lost")
            return
        manifest = read_manifest(self.cache)
        found = {s: receipt_path(self.cache, s).read_bytes() for s in committed_shards(self.cache, manifest)}
        for shard, receipt in self.receipts.items():
            tally.check(found.get(shard) == receipt, f"{when}: shard {shard} is lost or another")
        for shard in found.keys() - self.receipts.keys():
            problems = check_shard(self.cache, manifest, shard).problems
            tally.check(not problems, f"{when}: shard {shard} is torn: {problems[:1]}")
        self.receipts = found


def check_finished(cache: Path, expected: dict[str, str], tally: Tally, when: str) -> None:
    """A finished cache must be whole and have the files of an undisturbed one, no more and no fewer."""
    problems = verify_cache(cache)
    tally.check(not problems, f"{when}: {problems[:1]}")
    found = digests(cache)
    differing = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    tally.check(not differing, f"{when}: other files: {differing[:3]}")


def moment(cache: Path) -> str:
    """What a killed capture was about."""
    if not (cache / MANIFEST_NAME).exists():
        return "killed_before_the_manifest"
    done, total = len(list((cache / RECEIPTS_FOLDER).glob("0*.json"))), read_manifest(cache).blocks.num_shards
    return "killed_before_a_shard" if not done else f"killed_{'among' if done < total else 'after'}_the_shards"


def duration_s(small: SmallCaptures) -> float:
    """Of an undisturbed capture."""
    log = small.folder / "timed.log"
    began = time.perf_counter()
    problem = run_forked(partial(cli.run, small.command("timed")), log)
    assert problem is None, problem
    shutil.rmtree(small.folder / "timed")
    return time.perf_counter() - began


def kill_campaign(small: SmallCaptures, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill captures of one process ``kills`` times."""
    expected = digests(small.clean())
    longest_s = duration_s(small)
    out, log, tally = small.folder / "killed", small.folder / "killed.log", Tally()
    counts, known = tally.counts, Acknowledged(out)
    while True:
        process = forked(partial(cli.run, small.command(out.name)), log)
        process.join(timeout=rng.uniform(0, longest_s / 2) if counts["kills"] < kills else None)
        process.kill()
        process.join()
        when = f"after {counts['kills']} kills"
        if process.exitcode is not None and process.exitcode >= 0:
            counts["finished_captures"] += 1
            tally.check(process.exitcode == 0, f"{when}: {outcome(process, log)}")
            known.look(tally, when)
            check_finished(out, expected, tally, when)
            shutil.rmtree(out)
            known = Acknowledged(out)
            if counts["kills"] >= kills:
                return tally.report(kills=counts["kills"])
        else:
            counts["kills"] += 1
            counts[moment(out)] += 1
            known.look(tally, when)
