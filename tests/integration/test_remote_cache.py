"""Training, measuring and checking on a cache in a store end as they do on the folder that was put there."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import train.loop
import train.steps
from cache_spec.address import BYTES_PER_GB, CopySettings
from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.reader import CacheReader
from cache_spec.receipts import receipt_object
from cache_spec.store import ObjectStore
from cache_spec.verify_stored import verify_stored
from pipeline.cli import cli
from tests.object_stores import BUCKET, RunningS3, upload
from tests.runs import BLOCKS, assert_same_run, run_settings, save_run_cache, save_run_teacher
from tests.synthetic import ENCODINGS, make_manifest, make_rows, write_cache
from train.batches import StepPlan, micro_batches
from train.config import TrainConfig
from train.dataset import BlockSampler, CacheDataset, CacheLoader
from train.loop import train as train_student
from train.report import cache_facts
from train.report.config import ReportConfig
from train.report.facts import report_facts

COPY_GB = 8e-6
"""Room for some two windows of the cache's shards."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return save_run_cache(tmp_path_factory.mktemp("cache"), teacher)


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory, cache: Path, teacher: Path) -> Path:
    out = tmp_path_factory.mktemp("local") / "run"
    train_student(TrainConfig(**run_settings(cache, teacher, out)), quiet=True)
    return out


@pytest.fixture
def store(s3: RunningS3, cache: Path, request: pytest.FixtureRequest) -> ObjectStore:
    return upload(cache, f"remote/{request.node.name}")


@pytest.fixture
def remote(store: ObjectStore, teacher: Path, tmp_path: Path) -> TrainConfig:
    settings = run_settings(Path(), teacher, tmp_path / "run")
    copies = {"copy_folder": tmp_path / "copies", "copy_gb": COPY_GB}
    return TrainConfig(**{**settings, **copies, "cache": store.url, "read_ahead": 1})


def test_a_run_is_that_of_the_folder_while_the_store_stands_still_for_a_while(
    s3: RunningS3, remote: TrainConfig, local_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    take_step = train.steps.take_step

    def freezing(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            s3.process.send_signal(signal.SIGSTOP)
            threading.Timer(1.0, s3.process.send_signal, [signal.SIGCONT]).start()
        return take_step(*given)

    monkeypatch.setattr(train.loop, "take_step", freezing)
    try:
        train_student(remote, quiet=True)
    finally:
        s3.process.send_signal(signal.SIGCONT)
    assert_same_run(local_run, remote.out)
    assert not list(remote.copies.rglob("block_loss/c.*"))
    assert 0 < sum(path.stat().st_size for path in remote.copies.rglob("c.*")) <= COPY_GB * BYTES_PER_GB


def test_a_run_that_lost_its_store_goes_on_when_it_is_back(
    remote: TrainConfig, local_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = ObjectStore.get
    taken = threading.Event()

    def lost(self: ObjectStore, name: str) -> bytes | None:
        if taken.is_set():
            raise KdpipeError("store-failed", name)
        return get(self, name)

    keep = train.loop._keep

    def kept(run: Any, *given: Any) -> None:
        keep(run, *given)
        taken.set()

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "get", lost)
        patched.setattr(train.loop, "_keep", kept)
        with pytest.raises(KdpipeError) as caught:
            train_student(remote.model_copy(update={"checkpoint_every": 1}), quiet=True)
    assert caught.value.kind == "store-failed"
    assert list((remote.out / "checkpoints").glob("step-*"))
    assert not (remote.out / "result.json").exists()
    train_student(remote, quiet=True)
    assert_same_run(local_run, remote.out)


def test_a_bound_below_a_window_is_slow_but_right_and_said(
    store: ObjectStore, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = CacheReader.open(cache)
    copies = CopySettings(copy_folder=tmp_path / "copies", copy_gb=4e-6)
    plan = StepPlan(num_blocks=local.manifest.blocks.num_blocks, batch_blocks=4, accumulate=1, epochs=2)
    settings: dict[str, Any] = {"first_step": 0, "temperature": 1.0, "seed": 3, "window_shards": 3}
    readers = (local, CacheReader.open(store.url, copies))
    for ours, theirs in zip(*(micro_batches(reader, plan, **settings) for reader in readers), strict=True):
        assert torch.equal(ours.batch.input_ids_BT, theirs.batch.input_ids_BT)
        assert ours.blocks.tolist() == theirs.blocks.tolist()
    assert sum("do not fit in --copy-gb" in record.message for record in caplog.records) == 1


def test_a_loader_of_a_store_spawns_its_workers(store: ObjectStore, tmp_path: Path) -> None:
    dataset = CacheDataset(store.url, copy=CopySettings(copy_folder=tmp_path / "copies"))
    sampler = BlockSampler(dataset, batch_blocks=4, window_shards=2)
    loader = CacheLoader(dataset, sampler, num_workers=1)
    assert "Spawn" in type(loader.multiprocessing_context).__name__
    blocks = [len(batch.lengths_B) for batch in CacheLoader(dataset, sampler)]
    assert sum(blocks) == len(dataset)
    assert dataset._opened is not None
    dataset._opened = -1, dataset._opened[1]
    with pytest.raises(BadInputError) as caught:
        dataset[0]
    assert caught.value.kind == "forked-reader"


def test_what_is_wrong_in_a_store_is_found_where_it_is(s3: RunningS3, tmp_path: Path) -> None:
    manifest = make_manifest(num_blocks=BLOCKS, encoding=ENCODINGS["prototype"])
    write_cache(tmp_path / "cache", manifest, make_rows(manifest))
    store, tmp_path = upload(tmp_path / "cache", "remote/damaged"), tmp_path / "copies"
    assert verify_stored(store.url, tmp_path) == []
    data = bytearray(store.get("input_ids/c.1.0") or b"")
    data[3] ^= 1
    store.put("input_ids/c.1.0", bytes(data))
    store.put("stray", b"")
    store.put(".hidden/stray", b"")
    store.delete(["head_gaps/c.2.0.0", receipt_object(3), "hidden/zarr.json", "prototypes/c.0.0.0"])
    problems = verify_stored(store.url, tmp_path)
    found = {(problem.kind, problem.place.removeprefix(f"{store.url}/")) for problem in problems}
    assert found >= {
        ("shard-digest", "input_ids/c.1.0"),
        ("missing-shard", "head_gaps/c.2.0.0"),
        ("missing-file", "hidden/zarr.json"),
        ("missing-table", "prototypes/c.0.0.0"),
        ("unexpected-file", "stray"),
        ("unfinished-cache", store.url),
    }
    assert not any(".hidden" in place for _, place in found)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_of_endless_shards_in_a_store_is_refused_at_once(s3: RunningS3, tmp_path: Path) -> None:
    store = ObjectStore(f"s3://{BUCKET}/remote/endless")
    manifest = make_manifest(num_blocks=2**50, encoding=ENCODINGS["topk"])
    store.put("manifest.json", manifest.to_json())
    assert [problem.kind for problem in verify_stored(store.url, tmp_path)] == ["unfinished-cache"]


def test_commands_take_an_address(
    store: ObjectStore, cache: Path, local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDPIPE_HOME", str(tmp_path / "home"))

    def said(*words: str) -> dict[str, Any]:
        result = CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False)
        facts: dict[str, Any] = json.loads(result.stdout)
        return facts

    assert said("inspect", store.url) == {**said("inspect", str(cache)), "cache": store.url}
    here, there = (said("verify", address)["problems"] for address in (str(cache), store.url))
    assert [problem["kind"] for problem in here] == [problem["kind"] for problem in there] == ["bad-length"]
    model = ["evaluate", "--models", str(local_run / "student"), "--device", "cpu", "--cache"]
    ours, theirs = (said(*model, address)["models"][0]["cache"] for address in (str(cache), store.url))
    clock = {"cache", "tokens_per_s"}
    assert {k: v for k, v in ours.items() if k not in clock} == {k: v for k, v in theirs.items() if k not in clock}
    assert theirs["cache"] == store.url
    assert list((tmp_path / "home" / "copies").rglob("c.*"))
    with pytest.raises(BadInputError, match="not-a-folder"):
        CliRunner().invoke(cli, ["repair", store.url], catch_exceptions=False)


def test_a_report_of_an_address_is_that_of_the_folder(
    store: ObjectStore, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, copies = tmp_path / "report.html", tmp_path / "copies"
    # Of the folder as many shards are decoded as are fetched of the store.
    monkeypatch.setattr(cache_facts, "_DECODED_SHARDS", cache_facts._FETCHED_SHARDS)
    remote = report_facts(ReportConfig(out=out, cache=store.url, copy_folder=copies))["cache"]
    local = report_facts(ReportConfig(out=out, cache=cache))["cache"]
    assert remote["cache"] == store.url
    assert remote["sample"]["examples"][0]["tokens"]
    assert remote | {"cache": None} == local | {"cache": None}
