"""A disk that fails: the n-th call that changes it is refused, or writes only a part.

In: a capture, and how many calls to try. Out: counts. A capture must end in a one-line error that says what could not
be written, and the same command must then make the same cache.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.faults.kills import digests
from benchmarks.faults.recorded import calls_replaced
from cache_spec.errors import KdpipeError
from pipeline.capture import capture
from pipeline.config import CaptureConfig

_CODES = (errno.ENOSPC, errno.EIO)
_NEVER = 0


class _Disk:
    """Counts the calls that change files below a folder, and fails one of them."""

    def __init__(self, root: Path, fails_at: int, code: int) -> None:
        self.root, self.fails_at, self.code = root, fails_at, code
        self.calls = 0

    def call(self, path: Any, before: Callable[[], object] = lambda: None) -> None:
        """Before a call on ``path``; ``before`` is done before the failure."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not Path(os.fsdecode(path)).absolute().is_relative_to(self.root):
            return
        self.calls += 1
        if self.calls == self.fails_at:
            before()
            raise OSError(self.code, os.strerror(self.code), os.fsdecode(path))


class _File(io.FileIO):
    """An unbuffered file whose writes are counted; the one that fails leaves half of its bytes."""

    disk: _Disk

    def write(self, data: Any, /) -> int:
        self.disk.call(os.fsdecode(self.name), lambda: super(_File, self).write(memoryview(data)[: len(data) // 2]))
        return super().write(data)


@contextmanager
def failing(root: Path, fails_at: int = _NEVER, code: int = errno.EIO) -> Iterator[_Disk]:
    """Fail one call of this process that changes what is below ``root``, and no other."""
    disk = _Disk(root, fails_at, code)
    names = ("fsync", "link", "rename", "replace", "mkdir")
    real = {name: getattr(os, name) for name in names}
    real_open = builtins.open

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
            disk.call(path)
            return call(path, *args, **kwargs)

        return counting

    def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or not any(letter in mode for letter in "wax+"):
            return real_open(file, mode, *args, **kwargs)
        disk.call(file)
        if not mode.endswith("b") or "+" in mode:
            return real_open(file, mode, *args, **kwargs)
        made = _File(file, mode.removesuffix("b"))
        made.disk = disk
        return io.BufferedWriter(made)

    with calls_replaced({name: counted(call) for name, call in real.items()}, open_file):
        yield disk


def disk_campaign(folder: Path, settings: dict[str, Any], num_calls: int, rng: random.Random) -> dict[str, Any]:
    """Fail ``num_calls`` different calls of a capture, one in each run, or all that there are."""
    home = folder / "disk"
    home.mkdir()

    def run(name: str, **fails: int) -> _Disk:
        with failing(home, **fails) as disk:
            capture(CaptureConfig(**settings, out=home / name), quiet=True)
        return disk

    total = run("clean").calls
    expected = digests(home / "clean")
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for at in sorted(rng.sample(range(1, total + 1), min(num_calls, total))):
        code = rng.choice(_CODES)
        what = f"call {at}, {errno.errorcode[code]}"
        try:
            run("failed", fails_at=at, code=code)
            # Some libraries and clean-ups do without what they cannot write.
            counts["went_on"] += 1
        except KdpipeError:
            counts["refused"] += 1
        except Exception as error:
            wrong.append(f"{what}: {error!r}")
        try:
            run("failed")
        except KdpipeError as error:
            wrong.append(f"{what}: no resume: {error}")
        else:
            if digests(home / "failed") != expected:
                wrong.append(f"{what}: other files after a resume")
        shutil.rmtree(home / "failed")
    shutil.rmtree(home)
    return {"calls_of_a_capture": total, **counts, "wrong": len(wrong), "first_wrong": wrong[:5]}
