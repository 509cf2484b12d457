"""Each call of this process that reads or changes files below a folder, told before it is done.

In: a folder, and what to do at each call: nothing, raise what the disk would, or die. Out: the calls, in order.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.recorded import calls_replaced

_NAMES = ("fsync", "link", "rename", "replace", "mkdir", "unlink")


class Call(NamedTuple):
    """What is about to be done."""

    name: str
    """``read`` and ``create`` are of ``open``; ``write`` is of some bytes; others have their names in ``os``."""
    path: Path
    """Absolute; what a file descriptor stands for."""
    begin: Callable[[], object] = lambda: None
    """Does the first half of a write."""

    @property
    def changes(self) -> bool:
        return self.name != "read"


class Short(Exception):
    """Raised at a write: only its first half is done, and its caller is told so, as a disk may."""


class _File(io.FileIO):
    """An unbuffered file whose writes are told."""

    told: Callable[[Call], object]

    def write(self, data: Any, /) -> int:
        half = memoryview(data)[: max(1, len(data) // 2)]

        def begin() -> int:
            return super(_File, self).write(half)

        try:
            self.told(Call("write", Path(os.fsdecode(self.name)).absolute(), begin))
        except Short:
            return begin()
        return super().write(data)


@contextmanager
def calls_told(root: Path, told: Callable[[Call], object]) -> Iterator[None]:
    """Tell of every call on what is below ``root``; what ``told`` raises is raised in its place."""
    real = {name: getattr(os, name) for name in _NAMES}
    real_open = builtins.open

    def inside(path: Any) -> Path | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        whole = Path(os.fsdecode(path)).absolute()
        return whole if whole.is_relative_to(root) else None

    def telling(name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dir_fd") is None and (place := inside(path)) is not None:
                told(Call(name, place))
            return real[name](path, *args, **kwargs)

        return call

    def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        place = None if isinstance(file, int) else inside(file)
        if place is None:
            return real_open(file, mode, *args, **kwargs)
        creates = any(letter in mode for letter in "wax+")
        told(Call("create" if creates else "read", place))
        if not creates or not mode.endswith("b") or "+" in mode:
            return real_open(file, mode, *args, **kwargs)
        made = _File(file, mode.removesuffix("b"))
        made.told = told
        return io.BufferedWriter(made)

    with calls_replaced({name: telling(name) for name in real}, open_file):
        yield
