"""Text to cache on real (tiny) teachers: right values, resumed runs, refusals; nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
import transformers

from cache_spec import commit, durable, receipts
from cache_spec.encodings.topk import TopK
from cache_spec.errors import BadInputError, KdpipeError, WouldLoseDataError
from cache_spec.reader import CacheReader
from cache_spec.receipts import committed_shards
from cache_spec.targets import HeadTargets
from cache_spec.validate import verify_cache
from pipeline import shard
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from pipeline.folder import LOCK_NAME, STAGING_NAME
from pipeline.inspect import describe, inspect_cache
from pipeline.progress import Progress
from pipeline.recompute import compare_with_teacher
from pipeline.teacher import load_teacher
from tests.models import FAMILIES, make_folder, write_words

SETTINGS: dict[str, Any] = {
    "encoding": "topk",
    "block_tokens": 16,
    "k": 8,
    "hidden_window": 4,
    "batch_blocks": 2,
    "shard_blocks": 5,
    "device": "cpu",
}


@pytest.fixture
def config(tmp_path: Path) -> CaptureConfig:
    teacher = make_folder(tmp_path / "teacher", spread=4.0)
    text = write_words(tmp_path / "text.jsonl")
    return CaptureConfig(teacher=str(teacher), text=(str(text),), out=tmp_path / "cache", **SETTINGS)


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache that decides what a reader sees; provenance is in the manifest alone."""
    files = [p for p in cache.rglob("*") if p.is_file() and not p.relative_to(cache).as_posix().startswith(".")]
    return {p.relative_to(cache).as_posix(): p.read_bytes() for p in files if p.name != "manifest.json"}


def changed(config: CaptureConfig, **settings: Any) -> CaptureConfig:
    return config.model_copy(update=settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_holds_what_the_teacher_says(tmp_path: Path, family: str) -> None:
    folder = make_folder(tmp_path / "teacher", family, spread=4.0)
    text = write_words(tmp_path / "text.jsonl")
    result = capture(CaptureConfig(teacher=str(folder), text=(str(text),), out=tmp_path / "cache", **SETTINGS))
    assert verify_cache(tmp_path / "cache") == []
    reader = CacheReader.open(tmp_path / "cache")
    manifest = reader.manifest
    assert (manifest.teacher.vocab_size, manifest.teacher.padded_vocab_size) == (100, 120)
    assert manifest.corpus.num_tokens == result["tokens"] == 12 * 41 // 16 * 16
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    blocks = list(range(manifest.blocks.num_blocks))
    for temperature in manifest.temperatures:
        batch = reader.batch(blocks, temperature)
        ids_BT = torch.from_numpy(batch.input_ids_BT.astype(np.int64))
        with torch.no_grad():
            logits = model(ids_BT).logits[..., :100].double() / temperature
        targets = batch.targets
        assert isinstance(targets, HeadTargets)
        assert isinstance(manifest.encoding, TopK)
        probs = logits.softmax(-1).gather(-1, torch.from_numpy(targets.ids_BTK.astype(np.int64))).numpy()
        tail = 1 / (1 + np.exp(-targets.tail_log_odds_BT))
        np.testing.assert_allclose(tail, 1 - probs.sum(-1), atol=manifest.encoding.odds_step_nats / 8 + 1e-5)
        if temperature == 1:
            found = np.exp(targets.logprobs_BTK / 2)
            np.testing.assert_allclose(found, np.sqrt(probs), atol=0.5 / manifest.encoding.levels + 1e-5)


def test_every_token_of_every_document_is_there_once(config: CaptureConfig) -> None:
    capture(changed(config, last_block="keep"))
    reader = CacheReader.open(config.out)
    blocks = list(range(reader.manifest.blocks.num_blocks))
    ids, lengths = reader.read("input_ids", blocks), reader.lengths(blocks)
    stream = np.concatenate([row[:length] for row, length in zip(ids, lengths, strict=True)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.teacher)
    lines = [json.loads(line)["text"] for line in Path(config.text[0]).read_text().splitlines()]
    assert stream.tolist() == [i for line in lines for i in [*tokenizer(line)["input_ids"], 1]]


def test_a_stopped_capture_resumes_to_the_same_bytes(config: CaptureConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(config)
    real = commit.publish_shard

    def stops(cache: Path, manifest: Any, packed: Any) -> Any:
        if packed.receipt.shard == 2:
            raise KeyboardInterrupt
        return real(cache, manifest, packed)

    again = changed(config, out=config.out.with_name("again"))
    monkeypatch.setattr("pipeline.place.publish_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        capture(again)
    monkeypatch.setattr("pipeline.place.publish_shard", real)
    assert committed_shards(again.out, inspect_manifest(again)) == [0, 1]
    assert capture(again)["shards_captured_now"] == inspect_manifest(again).blocks.num_shards - 2
    assert contents(again.out) == contents(config.out)


def test_encoding_beside_the_teacher_gives_the_same_bytes_and_its_failure_fails_the_shard(
    config: CaptureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(config)
    again = changed(config, out=config.out.with_name("again"))
    monkeypatch.setattr(shard, "overlaps", lambda device: True)
    capture(again)
    assert contents(again.out) == contents(config.out)
    poison(Path(config.teacher))
    with pytest.raises(BadInputError, match="non-finite-logits: block 0"):
        capture(changed(config, out=config.out.with_name("poisoned")))
    assert committed_shards(config.out.with_name("poisoned"), inspect_manifest(config)) == []


def inspect_manifest(config: CaptureConfig) -> Any:
    return receipts.read_manifest(config.out)


def test_a_workers_failure_reaches_the_user_and_spares_the_rest(config: CaptureConfig) -> None:
    poison(Path(config.teacher))
    with pytest.raises(BadInputError, match="non-finite-logits: block 0"):
        capture(changed(config, workers=1))


def test_a_finished_capture_is_left_alone_without_loading_the_teacher(
    config: CaptureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(config)
    before = contents(config.out)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("pipeline.capture.load_teacher", never)
    assert capture(config)["shards_captured_now"] == 0
    assert contents(config.out) == before
    assert not (config.out / STAGING_NAME).exists()


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"k": 7}, "encoding.k: 8, now 7"),
        ({"encoding": "sampled"}, "encoding.name: topk, now sampled"),
        ({"hidden_dtype": "float16"}, "hidden.dtype: int8, now float16"),
        ({"temperatures": (1.0,)}, r"temperatures: \[1.0, 2.0\], now \[1.0\]"),
        ({"hidden_window": 0}, "hidden"),
        ({"block_tokens": 8}, "blocks.block_tokens: 16, now 8"),
        ({"batch_blocks": 4}, "compute.batch_blocks: 2, now 4"),
        ({"limit_tokens": 160}, "blocks.limit_tokens: None, now 160"),
        ({"dtype": "bfloat16"}, "compute.dtype: float32, now bfloat16"),
    ],
)
def test_a_setting_that_changes_bytes_is_refused_with_what_differs(
    config: CaptureConfig, settings: dict[str, Any], difference: str
) -> None:
    capture(config)
    before = contents(config.out)
    with pytest.raises(WouldLoseDataError, match=f"other-settings.*{difference}"):
        capture(changed(config, **settings))
    assert contents(config.out) == before


def test_changed_text_or_another_teacher_is_refused(config: CaptureConfig, tmp_path: Path) -> None:
    capture(config)
    write_words(Path(config.text[0]), seed=1)
    with pytest.raises(WouldLoseDataError, match=r"corpus.sources"):
        capture(config)
    write_words(Path(config.text[0]))
    other = make_folder(tmp_path / "other", spread=3.0)
    with pytest.raises(WouldLoseDataError, match=r"teacher.weights_sha256"):
        capture(changed(config, teacher=str(other)))


def test_a_moved_teacher_is_the_same_teacher(config: CaptureConfig) -> None:
    capture(config)
    moved = Path(config.teacher).rename(Path(config.teacher).with_name("moved"))
    assert capture(changed(config, teacher=str(moved)))["shards_captured_now"] == 0


def test_a_folder_with_something_else_is_refused(config: CaptureConfig) -> None:
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("years of work")
    with pytest.raises(WouldLoseDataError, match=r"not-a-cache.*thesis.txt"):
        capture(config)
    with pytest.raises(WouldLoseDataError, match="not-a-folder"):
        capture(changed(config, out=config.out / "thesis.txt"))
    assert (config.out / "thesis.txt").read_text() == "years of work"


def test_a_cache_that_is_being_written_is_refused(config: CaptureConfig) -> None:
    config.out.mkdir()
    with filelock.FileLock(config.out / LOCK_NAME), pytest.raises(WouldLoseDataError, match="cache-in-use"):
        capture(config)


def poison(teacher: Path) -> None:
    """Make a saved teacher answer NaN."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    model.save_pretrained(teacher)


def test_a_teacher_of_nans_fails_loudly_and_names_the_block(config: CaptureConfig) -> None:
    poison(Path(config.teacher))
    with pytest.raises(BadInputError, match="non-finite-logits: block 0"):
        capture(config)
    assert committed_shards(config.out, inspect_manifest(config)) == []


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    config: CaptureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        if (config.out / "receipts" / "00000001.json").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KdpipeError, match=r"cannot-write.*No space left on device"):
        capture(config)
    monkeypatch.setattr(os, "fsync", real)
    done = committed_shards(config.out, inspect_manifest(config))
    assert 0 < len(done) < inspect_manifest(config).blocks.num_shards
    capture(config)
    assert verify_cache(config.out) == []


def test_the_teacher_reads_the_next_shard_while_the_last_is_committed(
    config: CaptureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(config)
    again = changed(config, out=config.out.with_name("again"))
    num_batches, real = threading.Semaphore(0), commit.publish_shard
    of_a_shard = len(shard.batches(inspect_manifest(config), 0))

    def read(_progress: Progress, _num_tokens: int) -> None:
        num_batches.release()

    def watched(cache: Path, manifest: Any, packed: Any) -> Any:
        if packed.receipt.shard == 0:  # every batch of this shard, and one of the next
            assert all(num_batches.acquire(timeout=60) for _ in range(of_a_shard + 1))
        return real(cache, manifest, packed)

    monkeypatch.setattr(Progress, "read", read)
    monkeypatch.setattr("pipeline.place.publish_shard", watched)
    capture(again)
    assert contents(again.out) == contents(config.out)


def test_a_shard_that_cannot_be_committed_stops_the_teacher_at_its_next_batch(
    config: CaptureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, waiting = threading.Event(), threading.Event()
    read: list[int] = []

    def broken(*_: object) -> Any:
        assert waiting.wait(timeout=60)
        failed.set()
        raise OSError(errno.EIO, "broken")

    def count(_progress: Progress, num_tokens: int) -> None:
        read.append(num_tokens)
        if len(read) > of_a_shard:  # of the second shard
            waiting.set()
            assert failed.wait(timeout=60)
            time.sleep(0.05)  # for the thread that failed to say so

    of_a_shard = -(-config.shard_blocks // config.batch_blocks)
    monkeypatch.setattr("pipeline.place.publish_shard", broken)
    monkeypatch.setattr(Progress, "read", count)
    with pytest.raises(OSError, match="broken"):
        capture(config)
    assert len(read) == of_a_shard + 1


@pytest.mark.parametrize(
    "lost", ["head_ids/c.0.0.0", "receipts/00000001.json", "hidden", "tokenizer", "head_gaps/zarr.json"]
)
@pytest.mark.parametrize("sealed", [True, False])
def test_what_is_missing_is_captured_again(config: CaptureConfig, lost: str, sealed: bool) -> None:
    capture(config)
    before = contents(config.out)
    path = config.out / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not sealed:
        (config.out / "seal.json").unlink()
    capture(config)
    assert verify_cache(config.out) == []
    assert contents(config.out) == before


def test_a_capture_killed_before_its_manifest_leaves_nothing_to_another(
    config: CaptureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = durable.replace_file

    def stops(path: Path, data: bytes) -> None:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr("cache_spec.commit.replace_file", stops)
    with pytest.raises(KeyboardInterrupt):
        capture(config)
    monkeypatch.setattr("cache_spec.commit.replace_file", real)
    capture(changed(config, hidden_window=0))
    assert verify_cache(config.out) == []


def test_staged_blocks_of_a_finished_capture_do_not_stay(config: CaptureConfig) -> None:
    capture(config)
    (config.out / STAGING_NAME).mkdir()
    capture(config)
    assert not (config.out / STAGING_NAME).exists()


@pytest.mark.parametrize("name", [".git/.tmp-object", ".staging/important", "tokenizer/mine.json", ".tmp-folder/x"])
def test_hidden_files_and_familiar_names_of_others_are_left_alone(config: CaptureConfig, name: str) -> None:
    foreign = config.out / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(WouldLoseDataError, match="not-a-cache"):
        capture(config)
    assert foreign.read_text() == "mine"


def test_a_shard_beyond_any_memory_is_refused_before_the_text_is_read(config: CaptureConfig) -> None:
    with pytest.raises(BadInputError, match=r"chunk-too-large.*--shard-blocks"):
        capture(changed(config, shard_blocks=10**9))
    assert not config.out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_one_line(config: CaptureConfig) -> None:
    config.out.mkdir(mode=0o500)
    with pytest.raises(BadInputError, match="cannot-write"):
        capture(config)


def test_a_vocabulary_smaller_than_k_and_a_block_too_long_are_refused(config: CaptureConfig) -> None:
    with pytest.raises(BadInputError, match="bad-encoding: encoding topk, found k 101 is above the vocabulary of 100"):
        capture(changed(config, k=101))
    with pytest.raises(BadInputError, match="block-too-long"):
        capture(changed(config, block_tokens=128))


def test_inspect_tells_loss_tail_mass_and_bytes(config: CaptureConfig) -> None:
    capture(config)
    facts = inspect_cache(config.out)
    assert facts["finished"]
    assert facts["tokens_done"] == facts["corpus"]["num_tokens"]
    assert facts["bytes_per_token"] == pytest.approx(sum(facts["bytes_per_token_by_array"].values()))
    targets = sum(facts["bytes_per_token_by_array"][name] for name in ("head_ids", "head_gaps", "tail_log_odds"))
    assert facts["target_bytes_per_token"] == pytest.approx(targets)
    reader = CacheReader.open(config.out)
    batch = reader.batch(range(reader.manifest.blocks.num_blocks), 2.0)
    assert isinstance(batch.targets, HeadTargets)
    tail = 1 / (1 + np.exp(-batch.targets.tail_log_odds_BT.astype(np.float64)))
    assert facts["mean_tail_mass"]["2"] == pytest.approx(float(tail.mean()), rel=1e-3)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(config.teacher).eval()
    ids = torch.from_numpy(batch.input_ids_BT.astype(np.int64))
    with torch.no_grad():
        logprobs = model(ids).logits[:, :-1, :100].log_softmax(-1)
    loss = -logprobs.gather(-1, ids[:, 1:, None]).mean()
    assert facts["teacher_loss_nats"] == pytest.approx(float(loss), rel=1e-5)
    assert any("perplexity" in line for line in describe(facts))


def test_deep_verification_agrees_with_the_teacher_and_only_with_it(config: CaptureConfig, tmp_path: Path) -> None:
    capture(changed(config, last_block="keep"))
    assert compare_with_teacher(config.out, config.teacher, gguf_file=None, num_batches=100) == []
    other = make_folder(tmp_path / "other", spread=3.0)
    with pytest.raises(BadInputError, match="other-teacher"):
        compare_with_teacher(config.out, str(other), gguf_file=None, num_batches=1)


def test_deep_verification_finds_targets_of_another_model(config: CaptureConfig, monkeypatch: Any) -> None:
    capture(config)
    real = load_teacher

    def changed_teacher(*args: Any, **kwargs: Any) -> Any:
        teacher = real(*args, **kwargs)
        with torch.no_grad():
            teacher.model.transformer.ln_f.weight.mul_(1.5)
        return teacher

    monkeypatch.setattr("pipeline.recompute.load_teacher", changed_teacher)
    problems = compare_with_teacher(config.out, config.teacher, gguf_file=None, num_batches=1)
    assert {problem.kind for problem in problems} == {"teacher-disagrees"}
