"""Power that fails: what the disk may hold after any moment of a capture, as far as POSIX promises nothing better.

In: a capture, run once while its file operations are recorded. Out: for every prefix of them, states that a power loss
there may leave, each as a folder. A name lasts once its folder is synced, a file's bytes once the file is; what is not
synced may be there or not, each name by itself, and bytes may be there in part.

Only calls are seen, not what is written between them: bytes that are not synced yet are taken from the next time that
the file is looked at.
"""

from __future__ import annotations

import builtins
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Policy = str
POLICIES = ("none", "names", "some")
"""What lasts of that which was not synced: nothing; all names, of empty files; some names, and parts of files."""


class _Name(NamedTuple):
    """A name comes to mean a node, or none; ``left`` is the name that it has no more, at the same moment."""

    folder: int
    name: str
    node: int | None
    left: tuple[int, str] | None = None


class _Written(NamedTuple):
    node: int


class _Synced(NamedTuple):
    node: int
    data: bytes | None
    """None for a folder."""


class _Said(NamedTuple):
    """Something was acknowledged to whoever called."""

    what: int


@dataclass
class Recording:
    """The operations on files below one folder, in order."""

    root: Path
    operations: list[Any] = field(default_factory=list)
    last_data: dict[int, bytes] = field(default_factory=dict)
    _nodes: dict[Path, int] = field(default_factory=dict)
    folders: set[int] = field(default_factory=set)
    _count: int = 0

    def __post_init__(self) -> None:
        self._made(self.root, is_folder=True)

    def says(self, what: int) -> None:
        """Note that something is acknowledged here."""
        self.operations.append(_Said(what))

    def _made(self, path: Path, *, is_folder: bool) -> int:
        node, self._count = self._count, self._count + 1
        self._nodes[path] = node
        if is_folder:
            self.folders.add(node)
        return node

    def _place(self, path: Path) -> tuple[int, str]:
        return self._nodes[path.parent], path.name

    def made(self, path: Path, *, is_folder: bool) -> None:
        folder, name = self._place(path)
        self.operations.append(_Name(folder, name, self._made(path, is_folder=is_folder)))

    def written(self, path: Path) -> None:
        if path not in self._nodes:
            self.made(path, is_folder=False)
        self.operations.append(_Written(self._nodes[path]))

    def synced(self, path: Path) -> None:
        self.looked_at(path)
        node = self._nodes[path]
        self.operations.append(_Synced(node, None if node in self.folders else self.last_data[node]))

    def linked(self, source: Path, path: Path) -> None:
        folder, name = self._place(path)
        self._nodes[path] = self._nodes[source]
        self.operations.append(_Name(folder, name, self._nodes[path]))

    def moved(self, source: Path, path: Path) -> None:
        folder, name = self._place(path)
        left = self._place(source)
        self._nodes[path] = self._nodes.pop(source)
        self.operations.append(_Name(folder, name, self._nodes[path], left))

    def looked_at(self, path: Path) -> None:
        if not path.exists():
            return
        if path not in self._nodes:
            # A library that does not call Python's functions made it.
            self.made(path, is_folder=path.is_dir())
            self.written(path)
        if path.is_file():
            self.last_data[self._nodes[path]] = path.read_bytes()

    def gone(self, path: Path) -> None:
        folder, name = self._place(path)
        del self._nodes[path]
        self.operations.append(_Name(folder, name, None))

    def finish(self) -> None:
        """Look at all files that are left."""
        for path in list(self._nodes):
            self.looked_at(path)


@contextmanager
def calls_replaced(calls: dict[str, Callable[..., Any]], open_file: Callable[..., Any]) -> Iterator[None]:
    """Put others in the place of functions of ``os``, by name, and of ``open``."""
    real, real_open = {name: getattr(os, name) for name in calls}, builtins.open

    def put(functions: dict[str, Any], opens: Any) -> None:
        for name, function in functions.items():
            setattr(os, name, function)
        builtins.open = io.open = opens

    put(calls, open_file)
    try:
        yield
    finally:
        put(real, real_open)


@contextmanager
def recording(root: Path) -> Iterator[Recording]:
    """Record what this process does to files below ``root``, an empty folder that is on disk."""
    record = Recording(root)
    names = ("open", "fsync", "link", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")
    real = {name: getattr(os, name) for name in names}
    real_open = builtins.open

    def inside(path: Any, dir_fd: int | None = None) -> Path | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        whole = Path(os.fsdecode(path))
        if dir_fd is not None:
            whole = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / whole
        whole = whole.absolute()
        return whole if whole.is_relative_to(root) else None

    def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        result = real_open(file, mode, *args, **kwargs)
        path = None if isinstance(file, int) else inside(file)
        if path is not None and any(letter in mode for letter in "wax+"):
            record.written(path)
        return result

    def os_open(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        result: int = real["open"](name, flags, *args, **kwargs)
        path = inside(name, kwargs.get("dir_fd"))
        if path is not None and flags & (os.O_WRONLY | os.O_RDWR):
            record.written(path)
        return result

    def fsync(handle: Any) -> None:
        real["fsync"](handle)
        path = inside(handle if isinstance(handle, int) else handle.fileno())
        if path is not None:
            record.synced(path)

    def link(source: Any, target: Any, **kwargs: Any) -> None:
        real["link"](source, target, **kwargs)
        from_path, to_path = inside(source), inside(target)
        if from_path is not None and to_path is not None:
            record.linked(from_path, to_path)

    def moving(call: Callable[..., None]) -> Callable[..., None]:
        def move(source: Any, target: Any, **kwargs: Any) -> None:
            from_path, to_path = inside(source), inside(target)
            for path in (from_path, to_path):
                if path is not None:
                    record.looked_at(path)
            call(source, target, **kwargs)
            if from_path is not None and to_path is not None:
                record.moved(from_path, to_path)

        return move

    def making(name: Any, *args: Any, **kwargs: Any) -> None:
        real["mkdir"](name, *args, **kwargs)
        if (path := inside(name, kwargs.get("dir_fd"))) is not None:
            record.made(path, is_folder=True)

    def taking(call: Callable[..., None]) -> Callable[..., None]:
        def take(name: Any, *args: Any, **kwargs: Any) -> None:
            path = inside(name, kwargs.get("dir_fd"))
            if path is not None:
                record.looked_at(path)
            call(name, *args, **kwargs)
            if path is not None:
                record.gone(path)

        return take

    fakes: dict[str, Callable[..., Any]] = {
        "open": os_open,
        "fsync": fsync,
        "link": link,
        "rename": moving(real["rename"]),
        "replace": moving(real["replace"]),
        "unlink": taking(real["unlink"]),
        "remove": taking(real["remove"]),
        "mkdir": making,
        "rmdir": taking(real["rmdir"]),
    }
    with calls_replaced(fakes, open_file):
        yield record
    record.finish()


@dataclass(frozen=True)
class State:
    """What a power loss leaves."""

    after: int
    """Operations before it."""
    policy: Policy
    folders: tuple[str, ...]
    files: dict[str, bytes]
    said: frozenset[int]
    """What had been acknowledged."""

    def write(self, folder: Path) -> None:
        """Make it, in an empty folder."""
        for name in self.folders:
            (folder / name).mkdir()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def state_after(record: Recording, count: int, policy: Policy, rng: random.Random) -> State:
    """What is left of the first ``count`` operations."""
    durable: dict[int, dict[str, int]] = {0: {}}
    pending: dict[int, list[_Name]] = {}
    data: dict[int, bytes] = {}
    dirty: set[int] = set()
    said: set[int] = set()
    for operation in record.operations[:count]:
        if isinstance(operation, _Said):
            said.add(operation.what)
        elif isinstance(operation, _Written):
            dirty.add(operation.node)
        elif isinstance(operation, _Name):
            pending.setdefault(operation.folder, []).append(operation)
        elif operation.data is not None:
            data[operation.node] = operation.data
            dirty.discard(operation.node)
        else:
            for change in pending.pop(operation.node, []):
                _apply(durable, change)
    for changes in pending.values():
        for change in changes:
            if policy == "names" or (policy == "some" and rng.random() < 0.5):
                _apply(durable, change)

    def content(node: int) -> bytes:
        if node not in dirty:
            return data.get(node, b"")
        if policy == "some":
            coming = record.last_data.get(node, b"")
            return coming[: rng.randrange(len(coming) + 1)]
        return b"" if policy == "names" else data.get(node, b"")

    folders: list[str] = []
    files: dict[str, bytes] = {}

    def walk(node: int, prefix: str) -> None:
        for name, child in sorted(durable.get(node, {}).items()):
            if child in record.folders:
                folders.append(prefix + name)
                walk(child, f"{prefix}{name}/")
            else:
                files[prefix + name] = content(child)

    walk(0, "")
    return State(count, policy, tuple(folders), files, frozenset(said))


def _apply(durable: dict[int, dict[str, int]], change: _Name) -> None:
    entries = durable.setdefault(change.folder, {})
    if change.node is None:
        entries.pop(change.name, None)
    else:
        entries[change.name] = change.node
    if change.left is not None:
        durable.setdefault(change.left[0], {}).pop(change.left[1], None)
