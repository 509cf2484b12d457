"""Files that are either whole and on disk, or not there: temporary name, fsync, publish, fsync of the folder.

In: bytes and a path. Out: a published file, or a ``cannot-write`` error with everything as it was before.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cache_spec.errors import BadInputError, WouldLoseDataError

TEMPORARY_PREFIX = ".tmp-"
_PIECE_BYTES = 1 << 20
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` (full disk, no permission, read-only) into one ``cannot-write`` error naming ``path``."""
    try:
        yield
    except OSError as error:
        raise BadInputError(
            "cannot-write",
            path,
            found=error.strerror or str(error),
            hint="free space or fix permissions, then run the same command again",
        ) from error


def taken_lock(folder: Path, name: str, kind: str) -> FileLock:
    """The lock of that name in a folder, taken; WouldLoseDataError of ``kind`` where another process holds it."""
    lock = FileLock(folder / name)
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            hint = "another process is writing it; wait for it, or stop it"
            raise WouldLoseDataError(kind, folder, hint=hint) from None
    return lock


def make_folder(path: Path) -> None:
    """Create a folder and its parents durably, if they are not there."""
    with writing(path):
        if not path.is_dir():
            if path.parent != path:
                make_folder(path.parent)
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_temporary(path: Path, data: bytes) -> Path:
    """Write ``data``, synced and read back, under a temporary name beside ``path``; returns that name."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with writing(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if not _holds(temporary, data):
                raise OSError("what was written reads back differently")
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    return temporary


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file is exactly ``data``, read piece by piece: shards are large, and this is a second copy."""
    with open(path, "rb", buffering=0) as file:
        pieces = iter(lambda: file.read(_PIECE_BYTES), b"")
        at = 0
        for piece in pieces:
            if data[at : at + len(piece)] != piece:
                return False
            at += len(piece)
    return at == len(data)


def publish_new(temporary: Path, path: Path) -> bool:
    """Give a temporary file its final name; False, with the temporary removed, if ``path`` exists already."""
    with writing(path):
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # No hard links here: a rename replaces, so look first; the caller's lock keeps others away meanwhile.
            if path.exists():
                return False
            os.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Write or overwrite a small file atomically and durably."""
    temporary = write_temporary(path, data)
    with writing(path):
        try:
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Delete temporary files that a killed run left in ``folders``; folders inside them are not entered."""
    for folder in folders:
        with writing(folder):
            for name in os.listdir(folder) if folder.is_dir() else ():
                if name.startswith(TEMPORARY_PREFIX) and (folder / name).is_file():
                    (folder / name).unlink(missing_ok=True)
