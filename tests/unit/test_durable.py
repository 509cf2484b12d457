"""Published files are whole; a failed write is one ``cannot-write`` line and leaves everything as it was.

In: the functions of ``cache_spec.durable``, with the system calls they rely on made to fail. Out: what lies in the
folder afterwards.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache_spec.commit import commit_shard, create_cache
from cache_spec.durable import (
    TEMPORARY_PREFIX,
    make_folder,
    publish_new,
    remove_leftovers,
    replace_file,
    sync_folder,
    write_temporary,
    writing,
)
from cache_spec.errors import EXIT_BAD_INPUT, BadInputError
from cache_spec.receipts import read_receipt
from tests.synthetic import make_manifest, make_rows


@contextmanager
def refused() -> Iterator[pytest.ExceptionInfo[BadInputError]]:
    """Expect one ``cannot-write`` error whose message is one line."""
    with pytest.raises(BadInputError) as caught:
        yield caught
    assert caught.value.kind == "cannot-write"
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert caught.value.hint
    assert len(str(caught.value).splitlines()) == 1


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_temporary_file_is_whole_hidden_and_beside_its_target(tmp_path: Path) -> None:
    temporary = write_temporary(tmp_path / "c.0", b"data")
    assert contents(tmp_path) == {temporary.name: b"data"}
    assert temporary.name.startswith(TEMPORARY_PREFIX)
    assert TEMPORARY_PREFIX.startswith(".")


def test_two_writers_of_one_name_have_different_temporary_files(tmp_path: Path) -> None:
    assert write_temporary(tmp_path / "c.0", b"one") != write_temporary(tmp_path / "c.0", b"two")
    assert sorted(contents(tmp_path).values()) == [b"one", b"two"]


def test_publishing_gives_the_final_name_and_leaves_no_temporary(tmp_path: Path) -> None:
    assert publish_new(write_temporary(tmp_path / "c.0", b"data"), tmp_path / "c.0")
    assert contents(tmp_path) == {"c.0": b"data"}


def test_publishing_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "c.0").write_bytes(b"first")
    assert not publish_new(write_temporary(tmp_path / "c.0", b"second"), tmp_path / "c.0")
    assert contents(tmp_path) == {"c.0": b"first"}


def test_publishing_does_not_follow_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "c.0").symlink_to(tmp_path / "elsewhere")
    assert not publish_new(write_temporary(tmp_path / "c.0", b"data"), tmp_path / "c.0")
    assert [path.name for path in tmp_path.iterdir()] == ["c.0"]


def test_replacing_overwrites_whole_and_leaves_no_temporary(tmp_path: Path) -> None:
    for data in (b"old and long", b"new"):
        replace_file(tmp_path / "seal.json", data)
        assert contents(tmp_path) == {"seal.json": data}


def test_every_file_and_folder_is_synced_before_a_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name.split("-")[0])
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "cache").mkdir()
    replace_file(tmp_path / "cache" / "seal.json", b"data")
    assert events == ["sync .tmp", "rename", "sync cache"]


@pytest.mark.parametrize("write", [write_temporary, replace_file])
def test_a_disk_that_is_full_at_sync_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], object]
) -> None:
    (tmp_path / "c.0").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with refused() as caught:
        write(tmp_path / "c.0", b"data")
    assert "No space left on device" in str(caught.value)
    assert str(tmp_path / "c.0") in str(caught.value)
    monkeypatch.undo()
    assert contents(tmp_path) == {"c.0": b"old"}


@pytest.mark.parametrize("write", [write_temporary, replace_file])
def test_a_file_that_the_system_cuts_short_leaves_nothing_behind(
    tmp_path: Path, write: Callable[[Path, bytes], object]
) -> None:
    """A real partial write: the kernel takes the first 4096 bytes and refuses the rest."""
    (tmp_path / "c.0").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with refused() as caught:
            write(tmp_path / "c.0", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(caught.value)
    assert contents(tmp_path) == {"c.0": b"old"}


@pytest.mark.parametrize("size", [4, 3 << 20])
@pytest.mark.parametrize("rot", ["changed", "shorter", "longer"])
def test_bytes_that_read_back_differently_are_refused(
    size: int, rot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rotten(handle: int) -> None:
        if rot == "changed":
            os.pwrite(handle, b"x", size - 1)
        else:
            os.ftruncate(handle, size - 1 if rot == "shorter" else size + 1)

    monkeypatch.setattr(os, "fsync", rotten)
    with refused() as caught:
        write_temporary(tmp_path / "c.0", bytes(size))
    assert "reads back differently" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_publication_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = write_temporary(tmp_path / "c.0", b"data")
    monkeypatch.setattr(os, "link", full_disk)
    with refused():
        publish_new(temporary, tmp_path / "c.0")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seal.json").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full_disk)
    with refused():
        replace_file(tmp_path / "seal.json", b"new")
    assert contents(tmp_path) == {"seal.json": b"old"}


def test_a_folder_that_is_missing_or_is_a_file_is_one_line(tmp_path: Path) -> None:
    with refused():
        write_temporary(tmp_path / "missing" / "c.0", b"data")
    (tmp_path / "file").write_bytes(b"")
    with refused():
        make_folder(tmp_path / "file" / "below")


def test_making_and_syncing_a_folder_may_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
        sync_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_errors_of_another_sort_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 // 0


def test_leftovers_are_removed_where_named_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "manifest.json", tmp_path / "head_ids" / "c.0.0.0", tmp_path / "foreign" / "file"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"kept")
    left = [write_temporary(path, b"of a killed run") for path in kept]
    remove_leftovers([tmp_path, tmp_path / "head_ids", tmp_path / "not there"])
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted([*kept, left[2]])


@pytest.mark.parametrize("at", [3, 9, 12])
def test_a_disk_that_fills_up_amid_a_shard_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The third file, the receipt, or a folder after some files are published; the next run commits the shard."""
    manifest = make_manifest(num_blocks=3)
    rows = make_rows(manifest)
    manifest = create_cache(tmp_path, manifest)
    real_fsync, calls = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            full_disk()
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with refused():
        commit_shard(tmp_path, manifest, 0, rows)
    monkeypatch.undo()
    assert list(tmp_path.rglob(".tmp-*")) == []
    assert read_receipt(tmp_path, manifest, 0) is None
    assert commit_shard(tmp_path, manifest, 0, rows) == read_receipt(tmp_path, manifest, 0)


FILL_A_SMALL_DISK = """
import os, sys
from pathlib import Path
from cache_spec.durable import replace_file, write_temporary
from cache_spec.errors import BadInputError
disk = Path(sys.argv[1])
replace_file(disk / "seal.json", b"old")
for write in (write_temporary, replace_file):
    try:
        write(disk / "seal.json", bytes(1 << 20))
    except BadInputError as error:
        print(error)
    else:
        sys.exit("a full disk went unnoticed")
assert os.listdir(disk) == ["seal.json"], os.listdir(disk)
assert (disk / "seal.json").read_bytes() == b"old"
"""


def test_a_really_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """A tmpfs of 64 KiB in a mount namespace of its own, where the system lets us have one."""
    mount = f'mount -t tmpfs -o size=64k none "{tmp_path}"'
    allowed = shutil.which("unshare") and not subprocess.call(
        ["unshare", "-rm", "sh", "-c", mount], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if not allowed:
        pytest.skip("mounting a small tmpfs is not allowed here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1" "{tmp_path}"', sys.executable, FILL_A_SMALL_DISK],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No space left on device") == len(done.stdout.splitlines()) == 2
