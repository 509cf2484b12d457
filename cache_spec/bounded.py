"""A folder of files that can be had again, shared by any number of processes, and kept below a bound.

In: paths, and what fetches their content. Out: open files. A file gets its name when it is whole; whoever holds the
lock of its temporary name makes it, and all others wait for that one. What was not opened for longest is let go, under
the lock of one file that also counts the bytes; who has a file open goes on reading it.

FOLDER/.used                    bytes below FOLDER, never too few: a killed process may leave some that are not there
FOLDER/COPY/NAME/c.SHARD.0.0    a file that may be let go; all others stay and are not counted
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cache_spec.durable import TEMPORARY_PREFIX, writing
from cache_spec.errors import BadInputError

_USED_NAME = ".used"
_DATA_PREFIX = "c."
# Of the bound: as much more goes at once, so that not every new file costs a look at all others.
_SLACK = 16


# Of a file that somebody writes: used later than all others.
_HELD = 1 << 63


class _Kept(NamedTuple):
    used_ns: int
    num_bytes: int
    path: str


class BoundedFolder:
    """Files below ``root``; those whose name begins with ``c.`` take at most ``limit_bytes`` together."""

    def __init__(self, root: Path, limit_bytes: int | None) -> None:
        self.root, self.limit_bytes = root, limit_bytes

    def open(self, path: Path, fetch: Callable[[], bytes]) -> int:
        """Descriptor of a file to read; where it is not there it is made of what ``fetch`` returns.

        Raises BadInputError ``copy-too-small`` for a file beyond the bound, ``cannot-write``, what ``fetch`` raises.
        """
        handle = _opened(path)
        if handle is not None:
            return handle
        with _claimed(path) as claim:
            handle = _opened(path)
            if handle is not None:
                return handle
            data = fetch()
            with writing(path):
                if path.name.startswith(_DATA_PREFIX):
                    self._reserve(path, claim.handle, len(data))
                with open(claim.handle, "wb", closefd=False) as file:
                    file.write(data)
                # A folder that is listed while a name changes may show both names, or none.
                with self._counting():
                    return claim.publish()

    def read(self, path: Path, fetch: Callable[[], bytes]) -> bytes:
        """Content of a file, made like that of ``open``."""
        with os.fdopen(self.open(path, fetch), "rb") as file:
            return file.read()

    def discard(self, path: Path) -> None:
        """Let go of a file that turned out to be damaged."""
        with writing(path):
            path.unlink(missing_ok=True)

    def _reserve(self, path: Path, temporary: int, num_bytes: int) -> None:
        """Count bytes that are about to be written, and make room for them; the open temporary file gets its size."""
        if self.limit_bytes is not None and num_bytes > self.limit_bytes:
            expected = f"room for one file of {num_bytes:,} bytes"
            raise BadInputError(
                "copy-too-small", path, expected=expected, found=f"{self.limit_bytes:,}", hint="raise --copy-gb"
            )
        with self._counting() as handle:
            text = os.pread(handle, 32, 0)
            used = int(text) if text.strip().isdigit() else self._make_room(None)
            if self.limit_bytes is not None and used + num_bytes > self.limit_bytes:
                used = self._make_room(self.limit_bytes - num_bytes)
            os.pwrite(handle, f"{used + num_bytes:<31}\n".encode(), 0)
            os.ftruncate(temporary, num_bytes)

    @contextmanager
    def _counting(self) -> Iterator[int]:
        """Hold the file that counts: whatever is counted appears, gets its name and goes under its lock alone."""
        handle = os.open(self.root / _USED_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def _make_room(self, most_bytes: int | None) -> int:
        """Let files go until at most ``most_bytes`` are left, and a little more; returns the bytes that are left."""
        kept = sorted(_kept(self.root))
        total = sum(file.num_bytes for file in kept)
        if most_bytes is None or total <= most_bytes:
            return total
        assert self.limit_bytes is not None
        for file in kept:
            if file.used_ns == _HELD or total <= max(0, most_bytes - self.limit_bytes // _SLACK):
                break
            with suppress(FileNotFoundError):
                os.unlink(file.path)
            total -= file.num_bytes
        return total


def _opened(path: Path) -> int | None:
    """Descriptor of a file, marked as just used; None if it is not there."""
    with writing(path):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with suppress(PermissionError):  # another user's copy
            os.utime(handle)
        return handle


class _Claim:
    """The temporary file beside ``path``, held by this thread alone."""

    def __init__(self, path: Path, temporary: Path, handle: int) -> None:
        self.path, self.temporary, self.handle = path, temporary, handle
        self.published = False

    def publish(self) -> int:
        """Give the file its name; returns its descriptor."""
        os.rename(self.temporary, self.path)
        self.published = True
        os.lseek(self.handle, 0, os.SEEK_SET)
        fcntl.flock(self.handle, fcntl.LOCK_UN)
        return self.handle


@contextmanager
def _claimed(path: Path) -> Iterator[_Claim]:
    """Wait until nobody else makes a file, and make sure that nobody else does."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    with writing(path):
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # the folder went meanwhile
                continue
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, temporary):
                break
            os.close(handle)  # whom we waited for has published it, or given up
        os.ftruncate(handle, 0)
    claim = _Claim(path, temporary, handle)
    try:
        yield claim
    finally:
        if not claim.published:
            temporary.unlink(missing_ok=True)
            os.close(handle)


def _is_at(handle: int, path: str | Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _kept(root: Path) -> Iterator[_Kept]:
    """Every file that is counted, the oldest use first when sorted; temporary ones of killed processes are removed."""
    for copy in _folders(root):
        for folder in _folders(copy):
            for entry in os.scandir(folder):
                is_temporary = entry.name.startswith(f"{TEMPORARY_PREFIX}{_DATA_PREFIX}")
                if not is_temporary and not entry.name.startswith(_DATA_PREFIX):
                    continue
                with suppress(FileNotFoundError):  # it may go meanwhile
                    if not is_temporary or not _is_abandoned(entry.path):
                        found = entry.stat(follow_symlinks=False)
                        yield _Kept(_HELD if is_temporary else found.st_mtime_ns, found.st_size, entry.path)


def _folders(path: str | Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [e.path for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")]
    except FileNotFoundError:
        return []


def _is_abandoned(path: str) -> bool:
    """Whether nobody holds a temporary file, which is then removed."""
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(handle, path):
            os.unlink(path)
        return True
    except BlockingIOError:  # somebody writes it
        return False
    finally:
        os.close(handle)
