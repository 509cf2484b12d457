"""A cache goes to a store and comes back: the same bytes, whatever fails on the way, and never a half one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cache_spec.encodings.prototype import Prototype
from cache_spec.errors import BadInputError, CacheError, WouldLoseDataError
from cache_spec.manifest import MANIFEST_NAME, Manifest
from cache_spec.receipts import SEAL_NAME
from cache_spec.store import ObjectStore, Version
from pipeline.cli import run
from pipeline.pull import pull
from pipeline.push import push
from tests.object_stores import BUCKET, RunningS3
from tests.synthetic import make_manifest, make_rows, write_cache

NUM_FILES = 34


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of two shards, with a table."""
    return written(tmp_path_factory.mktemp("pushed") / "cache")


def written(path: Path, seed: int = 0, **settings: Any) -> Path:
    encoding = Prototype(k=5, prototypes=2, residual_draws=0, calibration_tokens=40)
    sizes: dict[str, Any] = {"num_blocks": 4, "shard_blocks": 2, "window": None}
    manifest = make_manifest(encoding=encoding, **sizes | settings)
    write_cache(path, manifest, make_rows(manifest, seed), seed=seed)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a cache, those that are no part of it apart."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".")}


@pytest.fixture
def url(s3: RunningS3, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture
def pushed(cache: Path, s3: RunningS3) -> str:
    """Where the cache lies for every test that leaves it as it is."""
    url = f"s3://{BUCKET}/pushed"
    push(cache, url, quiet=True)
    return url


def test_what_was_pushed_is_pulled(cache: Path, url: str, tmp_path: Path) -> None:
    first = push(cache, url, quiet=True)
    assert first["sent_objects"] == first["objects"] == len(contents(cache))
    assert first["sent_bytes"] == first["bytes"] == sum(map(len, contents(cache).values()))
    again = push(cache, url, quiet=True)
    assert (again["sent_objects"], again["objects"]) == (0, first["objects"])
    assert pull(url, tmp_path / "pulled", quiet=True)["received_shards"] == 2
    assert contents(tmp_path / "pulled") == contents(cache)
    assert pull(url, tmp_path / "pulled", quiet=True)["received_bytes"] == 0


def test_a_dry_run_counts_and_sends_nothing(cache: Path, url: str) -> None:
    told = push(cache, url, dry_run=True, quiet=True)
    assert told["sent_bytes"] == sum(map(len, contents(cache).values()))
    assert list(ObjectStore(url).list()) == []


def failing_after(num_calls: int, call: Callable[..., Any]) -> Callable[..., Any]:
    left = iter(range(num_calls))

    def wrapped(*given: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return call(*given, **named)

    return wrapped


@pytest.mark.parametrize("num_objects", [0, 12, 22, NUM_FILES - 2, NUM_FILES - 1])
def test_a_push_that_stops_leaves_no_cache_and_goes_on(
    cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_objects: int
) -> None:
    expected = contents(cache)
    assert len(expected) == NUM_FILES
    with monkeypatch.context() as stopped:
        one = failing_after(num_objects, lambda call, *given: call(*given))
        for name in ("put", "put_new", "replace"):
            call = getattr(ObjectStore, name)
            stopped.setattr(ObjectStore, name, lambda *given, call=call: one(call, *given))
        with pytest.raises(KeyboardInterrupt):
            push(cache, url, quiet=True)
    left = {listed.name for listed in ObjectStore(url).list()}
    assert SEAL_NAME not in left
    with pytest.raises(CacheError) as caught:
        pull(url, tmp_path / "pulled", quiet=True)
    assert caught.value.kind == ("unfinished-cache" if MANIFEST_NAME in left else "not-a-cache")
    told = push(cache, url, quiet=True)
    assert told["sent_objects"] >= len(expected) - len(left)
    pull(url, tmp_path / "pulled", quiet=True)
    assert contents(tmp_path / "pulled") == expected


@pytest.mark.parametrize("num_files", [0, 1, 12, 20])
def test_a_pull_that_stops_leaves_an_unfinished_cache_and_goes_on(
    cache: Path, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(os, "fsync", failing_after(2 * num_files, os.fsync))
        with pytest.raises(KeyboardInterrupt):
            pull(pushed, tmp_path, quiet=True)
    assert not (tmp_path / SEAL_NAME).exists()
    pull(pushed, tmp_path, quiet=True)
    assert contents(tmp_path) == contents(cache)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    cache: Path, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(BadInputError) as caught:
            pull(pushed, tmp_path / "pulled", quiet=True)
    assert caught.value.kind == "cannot-write"
    pull(pushed, tmp_path / "pulled", quiet=True)
    assert contents(tmp_path / "pulled") == contents(cache)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("head_gaps/c.1.0.0", "shard-digest"),
        ("receipts/00000001.json", "digest-mismatch"),
        ("zarr.json", "file-mismatch"),
        ("prototypes/c.0.0.0", "table-mismatch"),
        ("manifest.json", "digest-mismatch"),
        ("seal.json", "digest-mismatch"),
    ],
)
@pytest.mark.parametrize("is_gone", [False, True])
def test_what_is_damaged_at_the_store_is_named_and_gets_no_name_here(
    cache: Path, pushed: str, tmp_path: Path, name: str, kind: str, is_gone: bool
) -> None:
    store = ObjectStore(pushed)
    if is_gone:
        store.delete([name])
        kinds = {"missing-shard", "unfinished-cache", "missing-file", "missing-table", "not-a-cache"}
    else:
        data = bytearray(contents(cache)[name])
        data[len(data) // 2] ^= 1
        store.put(name, bytes(data))
        kinds = {kind, "broken-json"}
    try:
        with pytest.raises(CacheError) as caught:
            pull(pushed, tmp_path, quiet=True)
    finally:
        store.put(name, contents(cache)[name])
    assert caught.value.kind in kinds
    assert name in caught.value.place or (is_gone and pushed in caught.value.place)
    assert not (tmp_path / name).exists()
    assert not (tmp_path / SEAL_NAME).exists()


def test_a_shard_that_is_cut_here_is_brought_again(cache: Path, pushed: str, tmp_path: Path) -> None:
    pull(pushed, tmp_path, quiet=True)
    (tmp_path / "head_gaps" / "c.1.0.0").write_bytes(b"")
    assert pull(pushed, tmp_path, quiet=True)["received_shards"] == 1
    assert contents(tmp_path) == contents(cache)


@pytest.mark.parametrize("settings", [{"shard_blocks": 3}, {"seed": 1}])
def test_another_cache_is_neither_overwritten_nor_mixed_in(
    cache: Path, url: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    other = written(tmp_path / "other", **settings)
    push(cache, url, quiet=True)
    before = {listed.name: listed.num_bytes for listed in ObjectStore(url).list()}
    for call in (partial(push, other, url, quiet=True), partial(pull, url, other, quiet=True)):
        with pytest.raises(WouldLoseDataError) as caught:
            call()
        assert caught.value.kind == "other-cache"
    assert {listed.name: listed.num_bytes for listed in ObjectStore(url).list()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(WouldLoseDataError):
        pull(url, tmp_path / "full", quiet=True)


def test_a_shard_that_another_writer_committed_is_not_replaced(cache: Path, url: str) -> None:
    ObjectStore(url).put("receipts/00000001.json", b"another's")
    with pytest.raises(WouldLoseDataError):
        push(cache, url, quiet=True)
    assert ObjectStore(url).get(MANIFEST_NAME) is None


def test_a_store_without_conditions_is_written_all_the_same(
    cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_whatever_is_there(store: ObjectStore, name: str, data: bytes, seen: object = None) -> Version:
        store.put(name, data)
        return Version(None, None)

    for name in ("put_new", "replace"):
        monkeypatch.setattr(ObjectStore, name, put_whatever_is_there)
    push(cache, url, quiet=True)
    pull(url, tmp_path / "pulled", quiet=True)
    assert contents(tmp_path / "pulled") == contents(cache)
    assert {listed.name for listed in ObjectStore(url).list()} == set(contents(cache))


def test_what_a_killed_capture_left_is_no_other_cache(cache: Path, url: str, tmp_path: Path) -> None:
    ObjectStore(url).put("receipts/00000000.json", b'{"claim":"killed"}\n')
    ObjectStore(url).put("head_gaps/c.0.0.0", b"other bytes")
    push(cache, url, quiet=True)
    pull(url, tmp_path / "pulled", quiet=True)
    assert contents(tmp_path / "pulled") == contents(cache)


def test_a_cache_that_is_not_whole_is_not_sent(cache: Path, url: str, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    path = tmp_path / "cache" / "head_gaps" / "c.1.0.0"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CacheError) as caught:
        push(tmp_path / "cache", url, quiet=True)
    assert (caught.value.kind, caught.value.place) == ("shard-digest", str(path))
    (tmp_path / "cache" / SEAL_NAME).unlink()
    with pytest.raises(CacheError) as caught:
        push(tmp_path / "cache", url, quiet=True)
    assert caught.value.kind == "unfinished-cache"
    assert ObjectStore(url).get(MANIFEST_NAME) is None


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", "a/../../outside", "a\\..\\b", "a\0b", ".lock", "seal.json"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(pushed: str, cache: Path, tmp_path: Path, name: str) -> None:
    manifest = Manifest.from_json((cache / MANIFEST_NAME).read_bytes(), "here")
    hostile = manifest.model_copy(update={"files": {**manifest.files, name: "0" * 64}})
    ObjectStore(pushed).put(MANIFEST_NAME, hostile.to_json())
    try:
        with pytest.raises(CacheError) as caught:
            pull(pushed, tmp_path / "here", quiet=True)
    finally:
        ObjectStore(pushed).put(MANIFEST_NAME, manifest.to_json())
    assert caught.value.kind == "unsafe-path"
    assert list(tmp_path.iterdir()) == []


def test_the_commands_print_json_and_one_line(
    cache: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["push", str(cache), url, "--json"]) == 0
    assert run(["push", str(cache), url]) == 0
    assert f"{url}: 0 objects of 0 bytes sent, {NUM_FILES} objects" in capsys.readouterr().out
    assert run(["pull", url, str(tmp_path / "x"), "--json"]) == 0
    assert run(["push", str(cache), url, "--private"]) == 3
    assert run(["push", str(cache), "ftp://x"]) == 3
    assert "Traceback" not in capsys.readouterr().err
