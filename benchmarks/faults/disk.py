"""A disk that fails: the n-th call is refused, or writes only a part.

In: a capture, and how many calls to try. Out: counts. A capture must end in a one-line error that says what could not
be done, or do without it, and the same command must then make the same cache. Of a write that ends early without an
error the rest must be written.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from typing import Any

from benchmarks.faults.calls import Call, Short, calls_told
from benchmarks.faults.small import SmallCaptures, digests, said_by
from benchmarks.faults.tally import Tally
from cache_spec.errors import EXIT_BAD_INPUT, EXIT_FAILED

FAULTS = ("ENOSPC", "EIO", "short")
_NEVER = 0


class _Disk:
    """Counts the calls that a fault can befall, and fails one of them."""

    def __init__(self, fault: str, fails_at: int) -> None:
        self.fault, self.fails_at, self.calls = fault, fails_at, 0

    def told(self, call: Call) -> None:
        if not {"ENOSPC": call.changes, "EIO": True, "short": call.name == "write"}[self.fault]:
            return
        self.calls += 1
        if self.calls != self.fails_at:
            return
        if self.fault == "short":
            raise Short
        call.begin()
        code = getattr(errno, self.fault)
        raise OSError(code, os.strerror(code), str(call.path))


def disk_campaign(small: SmallCaptures, num_calls: int, rng: random.Random, *, fault: str) -> dict[str, Any]:
    """Fail ``num_calls`` different calls of a capture, one in each run, or all that there are."""
    home, tally = small.folder / f"disk-{fault}", Tally()
    home.mkdir()
    expected = digests(small.clean())
    out = home / "cache"
    command = small.command(f"{home.name}/cache")

    def run(fails_at: int = _NEVER) -> tuple[_Disk, int, str]:
        """The disk, the command's exit code and what it said."""
        disk = _Disk(fault, fails_at)
        with calls_told(home, disk.told):
            return disk, *said_by(command)

    total = run()[0].calls
    tally.check(digests(out) == expected, "other files without a fault")
    shutil.rmtree(out)
    chosen = sorted(rng.sample(range(1, total + 1), min(num_calls, total)))
    for at in chosen:
        what = f"call {at}, {fault}"
        try:
            _, code, said = run(at)
        except Exception as error:
            tally.check(False, f"{what}: {error!r}")
        else:
            # Some libraries and clean-ups do without what they cannot write.
            tally.counts["refused" if code else "went_on"] += 1
            is_clear = code in (EXIT_FAILED, EXIT_BAD_INPUT) and re.fullmatch(r"error: [a-z-]+: .+\n", said)
            tally.check(is_clear if code else digests(out) == expected, f"{what}: exit code {code}: {said}")
            tally.check(not code or fault != "short", f"{what}: {said}")
        _, code, said = run()
        tally.check(code == 0, f"{what}: no resume: {said}")
        tally.check(digests(out) == expected, f"{what}: other files after a resume")
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(home)
    return tally.report(calls_of_a_capture=total, failed_calls=len(chosen))
