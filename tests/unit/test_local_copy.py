"""A cache in a store reads as the one that was put there, through files that are checked, bounded and shared."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_spec.address import BYTES_PER_GB, CopySettings
from cache_spec.encodings import Encoding
from cache_spec.errors import CacheError, KdpipeError
from cache_spec.local_copy import LocalCopy
from cache_spec.reader import CacheReader
from cache_spec.receipts import SEAL_NAME, receipt_object
from cache_spec.store import ObjectStore
from tests.object_stores import RunningS3, upload
from tests.synthetic import ENCODINGS, make_manifest, make_rows, write_cache

BLOCKS = 20


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    manifest = make_manifest(num_blocks=BLOCKS)
    write_cache(tmp_path / "cache", manifest, make_rows(manifest))
    return tmp_path / "cache"


@pytest.fixture
def store(s3: RunningS3, cache: Path, request: pytest.FixtureRequest) -> ObjectStore:
    return upload(cache, request.node.name)


@pytest.fixture
def copies(tmp_path: Path) -> CopySettings:
    return CopySettings(copy_folder=tmp_path / "copies")


def kept(copies: CopySettings) -> list[Path]:
    return [path for path in copies.copies.rglob("c.*") if path.is_file()]


def data_bytes(copies: CopySettings) -> int:
    """On disk, temporary files too: nothing more is made, or removed, while this lock is held.

    A file may get its final name meanwhile, and have two names for a moment.
    """
    if not (copies.copies / ".used").exists():
        return 0
    sizes: dict[int, int] = {}
    with open(copies.copies / ".used") as counted:
        fcntl.flock(counted, fcntl.LOCK_SH)
        for path in copies.copies.rglob("*c.*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def bounded(copies: CopySettings, num_bytes: int) -> CopySettings:
    return copies.model_copy(update={"copy_gb": num_bytes / BYTES_PER_GB})


def same(left: CacheReader, right: CacheReader, blocks: list[int]) -> bool:
    ours, theirs = (reader.batch(blocks, 2.0) for reader in (left, right))
    pairs: list[Any] = [(ours.input_ids_BT, theirs.input_ids_BT), (ours.lengths_B, theirs.lengths_B)]
    pairs.append((ours.hidden_BWD, theirs.hidden_BWD))
    pairs += list(zip(_values(ours.targets), _values(theirs.targets), strict=True))
    return all(np.array_equal(a, b) for a, b in pairs)


def _values(targets: Any) -> list[Any]:
    fields = (getattr(targets, name) for name in targets.__dataclass_fields__)
    return [value for value in fields if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_batches_are_those_of_the_folder(
    s3: RunningS3, tmp_path: Path, copies: CopySettings, encoding: Encoding, request: pytest.FixtureRequest
) -> None:
    manifest = make_manifest(encoding=encoding)
    write_cache(tmp_path / "cache", manifest, make_rows(manifest))
    url = upload(tmp_path / "cache", request.node.name).url
    local, remote = CacheReader.open(tmp_path / "cache"), CacheReader.open(url, copies)
    assert all(same(local, remote, blocks) for blocks in ([6, 0, 3], [1, 1]))
    assert remote.place == url
    names = {path.parent.name for path in kept(copies)}
    assert names == {*remote.batch_arrays(), *(["prototypes"] if encoding.name == "prototype" else [])}


def test_what_was_fetched_is_not_fetched_again(
    store: ObjectStore, cache: Path, copies: CopySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = list(range(BLOCKS))
    CacheReader.open(store.url, copies).batch(everything, 1.0)
    asked: list[str] = []
    get = ObjectStore.get

    def recorded(self: ObjectStore, name: str) -> bytes | None:
        asked.append(name)
        return get(self, name)

    monkeypatch.setattr(ObjectStore, "get", recorded)
    assert same(CacheReader.open(cache), CacheReader.open(store.url, copies), everything)
    assert asked == ["manifest.json", SEAL_NAME]


def test_the_bound_holds_while_threads_read_and_files_go(store: ObjectStore, cache: Path, copies: CopySettings) -> None:
    whole = CacheReader.open(store.url, copies)
    whole.batch(range(BLOCKS), 1.0)
    limit = data_bytes(copies) // 3
    small = bounded(copies.model_copy(update={"copy_folder": copies.copies / "small"}), limit)
    local = CacheReader.open(cache)
    failures: list[object] = []
    done = threading.Event()

    def read(seed: int) -> None:
        try:
            remote = CacheReader.open(store.url, small)
            for blocks in np.random.default_rng(seed).integers(0, BLOCKS, (8, 4)).tolist():
                remote._files.clear()  # as in a cache of more shards than stay open
                if not same(local, remote, blocks):
                    failures.append(blocks)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    largest: list[int] = []

    def look() -> None:
        while not done.is_set():
            largest.append(data_bytes(small))
            done.wait(0.002)

    watcher = threading.Thread(target=look)
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert failures == []
    assert 0 < max(largest) <= limit


def test_what_was_used_last_stays(store: ObjectStore, copies: CopySettings) -> None:
    reader = CacheReader.open(store.url, copies)
    for block in (0, 3, 6, 0):
        reader._files.clear()
        reader.read("input_ids", [block])
    size = data_bytes(copies) // 3
    reader = CacheReader.open(store.url, bounded(copies, 3 * size + size // 2))
    reader.read("input_ids", [9])
    assert {path.name for path in kept(copies)} >= {"c.0.0", "c.3.0"}
    assert len(kept(copies)) == 3


def test_a_bound_below_one_file_is_refused(store: ObjectStore, copies: CopySettings) -> None:
    reader = CacheReader.open(store.url, bounded(copies, 10))
    with pytest.raises(KdpipeError) as caught:
        reader.batch([0], 1.0)
    assert caught.value.kind == "copy-too-small"


def test_two_processes_share_a_copy_under_a_bound(store: ObjectStore, cache: Path, copies: CopySettings) -> None:
    code = (
        "import sys; from cache_spec.reader import CacheReader; from cache_spec.address import CopySettings\n"
        "import numpy as np\n"
        f"reader = CacheReader.open({store.url!r}, CopySettings(copy_folder={str(copies.copies)!r}, copy_gb=8e-6))\n"
        f"local = CacheReader.open({str(cache)!r})\n"
        "for blocks in np.random.default_rng(int(sys.argv[1])).integers(0, 20, (15, 3)).tolist():\n"
        "    reader._files.clear()\n"
        "    ours, theirs = (one.batch(blocks, 1.0) for one in (local, reader))\n"
        "    assert (ours.input_ids_BT == theirs.input_ids_BT).all()\n"
        "    assert (ours.hidden_BWD == theirs.hidden_BWD).all()\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(seed)]) for seed in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert 0 < data_bytes(copies) <= 8000


def test_a_file_damaged_here_is_fetched_again(store: ObjectStore, cache: Path, copies: CopySettings) -> None:
    CacheReader.open(store.url, copies).batch(range(BLOCKS), 1.0)
    for number, path in enumerate(kept(copies)):
        data = bytearray(path.read_bytes())
        data[number % len(data)] ^= 16
        path.write_bytes(data if number % 3 else data[:-1])
    for path in copies.copies.rglob("*.json"):
        path.write_bytes(b"")
    assert same(CacheReader.open(cache), CacheReader.open(store.url, copies), list(range(BLOCKS)))


def test_a_temporary_file_of_a_killed_process_is_in_nobodys_way(
    store: ObjectStore, cache: Path, copies: CopySettings
) -> None:
    copy = LocalCopy.open(store.url, copies)
    folder = copy.path / "input_ids"
    (folder / ".tmp-c.0.0").write_bytes(b"half of it")
    (folder / ".tmp-c.1.0").write_bytes(bytes(3000))
    assert same(CacheReader.open(cache), CacheReader.open(store.url, bounded(copies, 4000)), list(range(BLOCKS)))
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("name", "damage", "kind"),
    [
        ("input_ids/c.1.0", "flip", "shard-digest"),
        ("input_ids/c.1.0", "cut", "truncated-shard"),
        ("input_ids/c.1.0", "delete", "missing-shard"),
        (receipt_object(1), "flip", "digest-mismatch"),
        (receipt_object(1), "delete", "unfinished-cache"),
        ("input_ids/zarr.json", "flip", "file-mismatch"),
        ("input_ids/zarr.json", "delete", "missing-file"),
        ("manifest.json", "delete", "not-a-cache"),
        (SEAL_NAME, "delete", "unfinished-cache"),
        (SEAL_NAME, "flip", "digest-mismatch"),
    ],
)
def test_what_is_damaged_in_the_store_is_named(
    store: ObjectStore, copies: CopySettings, name: str, damage: str, kind: str
) -> None:
    data = bytearray(store.get(name) or b"")
    data[len(data) // 2] ^= 1
    store.delete([name])
    if damage != "delete":
        store.put(name, bytes(data if damage == "flip" else data[:-1]))
    with pytest.raises(CacheError) as caught:
        CacheReader.open(store.url, copies).batch([0, 4], 1.0)
    assert caught.value.kind == kind
    assert caught.value.place.startswith(store.url)
    assert not any(path.name == "c.1.0" and path.parent.name == "input_ids" for path in kept(copies))


def test_an_object_that_arrives_damaged_once_is_asked_for_again(
    store: ObjectStore, cache: Path, copies: CopySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    get = ObjectStore.get

    def damaged_once(self: ObjectStore, name: str) -> bytes | None:
        data = get(self, name)
        if name in seen or name in ("manifest.json", SEAL_NAME) or data is None:
            return data
        seen.add(name)
        return data[:-1] + b"x"

    monkeypatch.setattr(ObjectStore, "get", damaged_once)
    assert same(CacheReader.open(cache), CacheReader.open(store.url, copies), [0, 19])


def test_another_cache_at_the_same_url_is_refused_while_reading_and_kept_apart_after(
    store: ObjectStore, tmp_path: Path, copies: CopySettings
) -> None:
    reader = CacheReader.open(store.url, copies)
    reader.batch([0], 1.0)
    manifest = make_manifest(num_blocks=BLOCKS)
    write_cache(tmp_path / "other", manifest, make_rows(manifest, seed=1))
    upload(tmp_path / "other", store.url.rpartition("/")[2])
    with pytest.raises(CacheError) as caught:
        reader.batch([4], 1.0)
    assert caught.value.kind == "cache-changed"
    assert same(CacheReader.open(tmp_path / "other"), CacheReader.open(store.url, copies), [0, 4])


def test_a_path_that_leads_out_of_the_cache_is_not_fetched(
    s3: RunningS3, tmp_path: Path, cache: Path, copies: CopySettings, request: pytest.FixtureRequest
) -> None:
    manifest = make_manifest(num_blocks=BLOCKS).model_copy(update={"files": {"../../outside": "0" * 64}})
    write_cache(tmp_path / "hostile", manifest, make_rows(manifest))
    store = upload(tmp_path / "hostile", request.node.name)
    with pytest.raises(CacheError) as caught:
        CacheReader.open(store.url, copies)
    assert caught.value.kind == "unsafe-path"


def test_a_read_ahead_fetches_what_is_wanted_within_the_bound_and_hides_no_failure(
    store: ObjectStore, copies: CopySettings
) -> None:
    reader = CacheReader.open(store.url, copies)
    with reader.read_ahead(["input_ids"]) as ahead:
        ahead.want([3, 1], [2])
        _wait_for(lambda: {path.name for path in kept(copies)} == {"c.1.0", "c.2.0", "c.3.0"})
        store.delete(["input_ids/c.5.0"])
        ahead.want([5], [0])
        _wait_for(lambda: len(kept(copies)) == 4)
        with pytest.raises(CacheError, match="missing-shard"):
            reader.read("input_ids", [15])


def test_a_read_ahead_stops_at_the_bound(store: ObjectStore, copies: CopySettings) -> None:
    CacheReader.open(store.url, copies).read("input_ids", [0])
    small = bounded(copies.model_copy(update={"copy_folder": copies.copies / "small"}), int(2.5 * data_bytes(copies)))
    with CacheReader.open(store.url, small).read_ahead(["input_ids"]) as ahead:
        ahead.want([1, 2], [3, 4])
        _wait_for(lambda: not ahead._queue)
        ahead.close()
        for thread in ahead._threads:
            thread.join()
    assert {path.name for path in kept(small)} == {"c.1.0", "c.2.0"}


def _wait_for(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come about")
