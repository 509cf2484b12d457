"""A kill at each step of the commit of a shard: just before each call, and amid each write.

In: how many kills, shared out over the steps. Out: counts. The steps are named after the calls of an undisturbed run; a
process dies at its own call, and another one runs the same command.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Any

from benchmarks.faults.calls import Call, calls_told
from benchmarks.faults.forked import forked, outcome, run_forked
from benchmarks.faults.kills import Acknowledged, check_finished
from benchmarks.faults.small import SmallCaptures, digests
from benchmarks.faults.tally import Tally
from cache_spec.durable import TEMPORARY_PREFIX
from cache_spec.layout import array_specs
from cache_spec.receipts import RECEIPTS_FOLDER, read_manifest, receipt_path
from pipeline import cli

_FEW_BLOCKS = 8
"""Of the captures here, in four shards."""


def die() -> None:
    """As by SIGKILL: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class _Commit:
    """The calls of one shard's commit, from the first that touches a file of it to the last of its receipt's folder."""

    def __init__(self, cache: Path, files: set[str], die_at: int | None = None, told: Path | None = None) -> None:
        self.cache, self.files, self.die_at, self.told_path = cache, files, die_at, told
        self.steps: list[str] = []
        self.is_over = False
        self.thread: int | None = None

    def told(self, call: Call) -> None:
        name = call.path.relative_to(self.cache).as_posix()
        folder, _, file = name.rpartition("/")
        is_temporary = file.startswith(TEMPORARY_PREFIX)
        whole = f"{folder}/{file.removeprefix(TEMPORARY_PREFIX).rsplit('-', 2)[0]}" if is_temporary else name
        # Whether it was committed is looked up before anything is made.
        begins = is_temporary and whole in self.files
        # Another thread of the capture reads the next shard meanwhile.
        if self.is_over or self.thread not in (None, get_ident()) or not (self.steps or begins):
            return
        self.thread = get_ident()
        array = whole.split("/")[0] if "/" in whole else whole
        what = f"{array}: {'temporary' if is_temporary else 'file' if whole in self.files else 'folder'}"
        for part in ("before", *(["amid"] if call.name == "write" else [])):
            self.steps.append(f"{part} {call.name} of {what}")
            if len(self.steps) - 1 == self.die_at:
                if part == "amid":
                    call.begin()
                assert self.told_path is not None
                self.told_path.write_text(self.steps[-1])
                die()
        self.is_over = call.name == "fsync" and name == RECEIPTS_FOLDER


def step_campaign(small: SmallCaptures, kills: int, rng: random.Random) -> dict[str, Any]:
    """Die ``kills`` times, equally often at each step of a commit, of a random shard."""
    changes: dict[str, Any] = {"limit_tokens": _FEW_BLOCKS * 16}
    clean = small.clean(**changes)
    expected, manifest = digests(clean), read_manifest(clean)
    out, log, step_path = (small.folder / f"step{end}" for end in ("", ".log", ".txt"))
    command = small.command(out.name, **changes)

    def files(shard: int) -> set[str]:
        arrays = {spec.shard_path(shard) for spec in array_specs(manifest).values()}
        return arrays | {receipt_path(Path(), shard).as_posix()}

    def run(commit: _Commit) -> int:
        with calls_told(out, commit.told):
            return cli.run(command)

    def record() -> None:
        commit = _Commit(out, files(0))
        assert run(commit) == 0
        step_path.write_text("\n".join(commit.steps))

    problem = run_forked(record, log)
    assert problem is None, problem
    steps = step_path.read_text().splitlines()
    shutil.rmtree(out)
    tally, died = Tally(), Counter[str]()
    times = kills // len(steps)
    turns = [
        *(at for at in range(len(steps)) for _ in range(times)),
        *rng.sample(range(len(steps)), kills % len(steps)),
    ]
    for at in turns:
        shard = rng.randrange(manifest.blocks.num_shards)
        child = forked(partial(run, _Commit(out, files(shard), at, step_path)), log)
        child.join()
        when = f"shard {shard}, {steps[at]}"
        tally.check(child.exitcode == -signal.SIGKILL, f"{when}: {outcome(child, log)}")
        told = step_path.read_text()
        died[told] += 1
        tally.check(told == steps[at], f"{when}: died at {told}")
        known = Acknowledged(out)
        known.look(tally, when)
        problem = run_forked(partial(cli.run, command), log)
        tally.check(problem is None, f"{when}: {problem}")
        known.look(tally, when)
        check_finished(out, expected, tally, when)
        shutil.rmtree(out)
    return tally.report(steps=len(steps), kills=sum(died.values()), least_of_a_step=min(died[step] for step in steps))
