"""Anything after anything: captures, kills, resumes, verifications, transcodings, damage and repairs in random order.

In: how many steps. Out: counts by rule. Hypothesis chooses the steps; what must be true of a cache after each is the
state of the machine. A cache that ``verify`` finds nothing in must have the files of an undisturbed one; one that
nothing was done to must verify when it is finished; one whose manifest is left can be made whole again.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from benchmarks.faults.calls import Call, calls_told
from benchmarks.faults.flips import read_outcome, values_read
from benchmarks.faults.forked import forked, outcome
from benchmarks.faults.kills import Acknowledged
from benchmarks.faults.small import BLOCK_TOKENS, ENCODINGS, SmallCaptures, digests, said_by
from benchmarks.faults.steps import die
from benchmarks.faults.tally import Tally
from cache_spec.manifest import MANIFEST_NAME
from cache_spec.receipts import SEAL_NAME
from cache_spec.validate import verify_cache
from pipeline import cli

_BLOCKS = 6
_CALLS = 400
"""More than a capture here makes."""
_STEPS = 40
"""Of each run of the machine."""
_RUNS = 20
"""Of each seed: the first of them does nothing but the first rule."""
_KILLED = -signal.SIGKILL


class _CacheMachine(RuleBasedStateMachine):
    """One cache, and another that is transcoded from it."""

    small: ClassVar[SmallCaptures]
    counts: ClassVar[Counter[str]]
    expected: ClassVar[dict[str, tuple[dict[str, str], dict[str, Any]]]]
    transcoded: ClassVar[dict[str, dict[str, str]]]

    def __init__(self) -> None:
        super().__init__()
        self.home = self.small.folder / "machine"
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        self.cache, self.other = self.home / "cache", self.home / "other"
        self.encoding = "topk"
        self.start_over()

    def teardown(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    def start_over(self) -> None:
        for cache in (self.cache, self.other):
            shutil.rmtree(cache, ignore_errors=True)
        self.known = Acknowledged(self.cache)
        self.is_finished = self.is_damaged = self.is_manifest_damaged = False

    @property
    def command(self) -> list[str]:
        return self.small.command("machine/cache", self.encoding, limit_tokens=_BLOCKS * BLOCK_TOKENS)

    @property
    def transcoding(self) -> list[str]:
        return ["transcode", str(self.cache), "--out", str(self.other), "--temperatures", "1.0", "--device", "cpu"]

    def run(self, command: list[str], *codes: int) -> int:
        code, said = said_by(command)
        assert code in codes, f"{command[0]}: exit code {code}: {said}"
        assert not code or said.count("\n") <= 1 or command[0] in ("verify", "repair"), said
        return code

    def killed(self, command: list[str], root: Path, at: int) -> None:
        """Run it in a process that dies before its call ``at``, if it makes so many."""
        log = self.small.folder / "machine.log"

        def body() -> int:
            with calls_told(root, partial(_countdown, [at])):
                return cli.run(command)

        process = forked(body, log)
        process.join()
        assert process.exitcode in (0, 3, 4, _KILLED), outcome(process, log)
        self.counts["kills"] += process.exitcode == _KILLED

    def look(self) -> None:
        """What must be true of the cache whatever was done."""
        tally = Tally()
        if not self.is_damaged:
            self.known.look(tally, "now")
        assert not tally.wrong, tally.wrong

    @initialize(encoding=st.sampled_from(ENCODINGS))
    def choose(self, encoding: str) -> None:
        self.encoding = encoding

    @rule()
    def capture(self) -> None:
        self.counts["captures"] += 1
        code = self.run(self.command, *((0, 3, 4) if self.is_damaged else (0,)))
        self.is_finished = self.is_finished or code == 0
        self.look()

    @rule(at=st.integers(1, _CALLS))
    def killed_capture(self, at: int) -> None:
        self.counts["killed_captures"] += 1
        self.killed(self.command, self.cache, at)
        self.is_finished = self.is_finished and (self.cache / SEAL_NAME).exists()
        self.look()

    @precondition(lambda self: (self.cache / MANIFEST_NAME).exists())
    @rule()
    def verify(self) -> None:
        self.counts["verifications"] += 1
        found = verify_cache(self.cache)
        if not found:
            assert digests(self.cache) == self.expected[self.encoding][0], "nothing found, and other files"
        if self.is_finished and not self.is_damaged:
            assert not found, found[:1]

    @precondition(lambda self: self.is_finished)
    @rule()
    def read(self) -> None:
        self.counts["readings"] += 1
        told = read_outcome(self.cache, self.expected[self.encoding][1])
        assert told == "read_the_same" or (self.is_damaged and told == "refused"), told

    @precondition(lambda self: self.is_finished)
    @rule()
    def transcode(self) -> None:
        self.counts["transcodings"] += 1
        code = self.run(self.transcoding, *((0, 3, 4) if self.is_damaged else (0,)))
        if code == 0:
            assert verify_cache(self.other) == []
            assert digests(self.other) == self.transcoded_digests(), "transcoded to other files"

    @precondition(lambda self: self.is_finished)
    @rule(at=st.integers(1, _CALLS))
    def killed_transcode(self, at: int) -> None:
        self.counts["killed_transcodings"] += 1
        self.killed(self.transcoding, self.other, at)

    def transcoded_digests(self) -> dict[str, str]:
        if self.encoding not in self.transcoded:
            clean = self.small.clean(self.encoding, limit_tokens=_BLOCKS * BLOCK_TOKENS)
            out = self.small.folder / f"transcoded-{self.encoding}"
            self.run(["transcode", str(clean), "--out", str(out), *self.transcoding[4:]], 0)
            type(self).transcoded[self.encoding] = digests(out)
        return self.transcoded[self.encoding]

    @precondition(lambda self: (self.cache / MANIFEST_NAME).exists())
    @rule(which=st.integers(0, 1 << 16), at=st.integers(0, 1 << 20), how=st.sampled_from(("flip", "cut", "delete")))
    def damage(self, which: int, at: int, how: str) -> None:
        files = [p for p in sorted(self.cache.rglob("*")) if p.is_file() and not _is_hidden(p, self.cache)]
        path = files[which % len(files)]
        data = path.read_bytes()
        if not data:
            return
        self.counts["damages"] += 1
        place = at % len(data)
        if how == "delete":
            path.unlink()
        else:
            changed = data[:place] if how == "cut" else data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            path.write_bytes(changed)
        self.is_damaged = True
        self.is_manifest_damaged = self.is_manifest_damaged or path.name == MANIFEST_NAME

    @precondition(lambda self: (self.cache / MANIFEST_NAME).exists())
    @rule()
    def repair(self) -> None:
        """Of a cache that is whole, damaged or begun; what is left to make, the capture makes."""
        self.counts["repairs"] += 1
        self.run(self.repairing, 0, 1, 3)
        self.is_finished = self.is_finished and not self.is_damaged
        self.look()

    @property
    def repairing(self) -> list[str]:
        return ["repair", str(self.cache), "--teacher", str(self.small.folder / "teacher")]

    @precondition(lambda self: self.is_damaged)
    @rule()
    def make_whole(self) -> None:
        """Capture, repair, capture: enough for all but a manifest."""
        self.counts["made_whole"] += 1
        if self.is_manifest_damaged:
            self.start_over()
            return
        for command in (self.command, self.repairing, self.command):
            self.run(command, 0, 1, 3, 4)
        found = verify_cache(self.cache)
        assert not found, found[:1]
        assert digests(self.cache) == self.expected[self.encoding][0], "made whole with other files"
        self.is_damaged, self.is_finished, self.known = False, True, Acknowledged(self.cache)
        self.look()

    @precondition(lambda self: self.is_finished)
    @rule()
    def remove(self) -> None:
        self.counts["removals"] += 1
        self.start_over()


def _is_hidden(path: Path, cache: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(cache).parts)


def _countdown(left: list[int], _call: Call) -> None:
    left[0] -= 1
    if left[0] == 0:
        die()


def machine_campaign(small: SmallCaptures, num_steps: int, rng: random.Random) -> dict[str, Any]:
    """Let the machine take ``num_steps`` steps, and some more to end its last run."""
    tally = Tally()
    _CacheMachine.small, _CacheMachine.counts = small, tally.counts
    _CacheMachine.expected, _CacheMachine.transcoded = {}, {}
    for encoding in ENCODINGS:
        clean = small.clean(encoding, limit_tokens=_BLOCKS * BLOCK_TOKENS)
        _CacheMachine.expected[encoding] = digests(clean), values_read(clean)
    checked = settings(
        max_examples=min(_RUNS, 1 + num_steps // _STEPS),
        stateful_step_count=min(_STEPS, num_steps),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def steps() -> int:
        return sum(count for name, count in tally.counts.items() if name != "kills")

    while steps() < num_steps and len(tally.wrong) < 20:
        number = rng.getrandbits(32)
        try:
            run_state_machine_as_test(seed(number)(_CacheMachine), settings=checked)
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            tally.check(False, f"seed {number}: {error!r:.300} {notes[-1500:]}")
    return tally.report(steps=steps())
