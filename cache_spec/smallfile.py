"""Small files of a cache, read with a bound: whatever lies in their place, memory and patience are not spent on it.

In: a path and how much there may be. Out: bytes or their digest; OSError for a pipe, a device or a file that is larger.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path

MAX_MANIFEST_BYTES = 1 << 23
"""Of the largest JSON file that is parsed: some 30,000 sources."""
MAX_RECEIPT_BYTES = 1 << 18
"""Of a receipt or a seal."""
MAX_SMALL_FILE_BYTES = 1 << 28
"""Of a tokenizer's file."""


def read_small(path: Path, max_bytes: int = MAX_MANIFEST_BYTES) -> bytes:
    """The bytes of a plain file of at most ``max_bytes``."""
    with _opened(path, max_bytes) as file:
        return file.read(max_bytes)


def small_file_digest(path: Path) -> str:
    """SHA-256 of a plain file of at most ``MAX_SMALL_FILE_BYTES``, as 64 hexadecimal digits."""
    with _opened(path, MAX_SMALL_FILE_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path, max_bytes: int) -> BufferedReader:
    # A pipe without a writer would be waited for without end.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode) and found.st_size <= max_bytes:
        return open(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if stat.S_ISREG(found.st_mode):
        raise OSError(errno.EFBIG, f"{found.st_size} bytes, more than {max_bytes}", path)
    raise OSError(errno.EINVAL, "not a plain file", path)
