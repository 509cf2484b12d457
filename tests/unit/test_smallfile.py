"""Small files are read with a bound, and nothing that lies in their place is waited for."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cache_spec.smallfile import MAX_SMALL_FILE_BYTES, read_small, small_file_digest


def test_a_plain_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_small(path, 100) == b"x" * 100
    assert small_file_digest(path) == hashlib.sha256(b"x" * 100).hexdigest()


def test_what_is_no_small_plain_file_is_refused(tmp_path: Path) -> None:
    large, pipe, endless = tmp_path / "large", tmp_path / "pipe", tmp_path / "endless"
    large.touch()
    os.truncate(large, MAX_SMALL_FILE_BYTES + 1)
    os.mkfifo(pipe)
    endless.symlink_to("/dev/zero")
    for path in (large, pipe, endless, tmp_path, tmp_path / "none"):
        with pytest.raises(OSError):
            read_small(path)
        with pytest.raises(OSError):
            small_file_digest(path)
