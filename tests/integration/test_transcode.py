"""A cache from a richer one: what a capture would have kept, or a refusal that says what it would take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_spec import commit
from cache_spec.encodings import Encoding
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.topk import TopK
from cache_spec.errors import WouldLoseDataError
from cache_spec.layout import target_arrays
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from cache_spec.receipts import committed_shards, read_manifest
from cache_spec.targets import HeadTargets
from cache_spec.validate import verify_cache
from pipeline import cli
from pipeline.capture import capture
from pipeline.config import TranscodeConfig
from pipeline.recompute import compare_with_teacher
from pipeline.transcode import transcode
from tests.integration.test_capture import contents
from tests.integration.test_encodings import meaning, settings
from tests.models import ENCODINGS, make_folder, write_words
from tests.refusals import refused
from tests.synthetic import ENCODINGS as RECORDS
from tests.synthetic import make_manifest, make_rows, write_cache


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, text whose last block is kept, and a cache of encoding ``hidden``."""
    folder = tmp_path_factory.mktemp("rich")
    make_folder(folder / "teacher", spread=4.0)
    write_words(folder / "text.jsonl")
    capture(settings(folder, "hidden", folder / "hidden", last_block="keep"), quiet=True)
    return folder


def synthetic(folder: Path, encoding: Encoding, **sizes: Any) -> Path:
    manifest = make_manifest(encoding=encoding, **sizes)
    write_cache(folder, manifest, make_rows(manifest))
    return folder


def made(cache: Path, out: Path, **changes: Any) -> CacheReader:
    transcode(TranscodeConfig(cache=cache, out=out, device="cpu", **changes), quiet=True)
    assert verify_cache(out) == []
    return CacheReader.open(out)


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name != "hidden"])
def test_from_hidden_states_everything_is_made_as_a_capture_would(rich: Path, tmp_path: Path, encoding: str) -> None:
    captured = settings(rich, encoding, tmp_path / "captured", last_block="keep")
    capture(captured, quiet=True)
    changes = dict(ENCODINGS[encoding])
    if encoding == "prototype":
        changes = {"k": 8, "residual_draws": 4, "prototypes_from": captured.out}
    reader, other = (
        made(rich / "hidden", tmp_path / "made", encoding=encoding, **changes),
        CacheReader.open(captured.out),
    )
    assert reader.manifest.fingerprint == other.manifest.fingerprint
    assert reader.manifest.provenance["transcoded_from"] == read_manifest(rich / "hidden").fingerprint
    blocks = range(reader.manifest.blocks.num_blocks)
    for name in reader.specs:
        # float16 moves a value over the edge of its step, or a draw to a neighbour, only here and there.
        same = (reader.read(name, blocks) == other.read(name, blocks)).mean()
        assert same >= (0.9 if name in target_arrays(reader.manifest) else 0.5), (name, same)
    for temperature in (1.0, 2.0):
        distance = np.abs(meaning(reader, temperature) - meaning(other, temperature)).sum(-1).mean() / 2
        assert distance < 0.01
    assert compare_with_teacher(tmp_path / "made", str(rich / "teacher"), gguf_file=None, num_batches=3) == []


def test_prototypes_are_learnt_from_hidden_states(rich: Path, tmp_path: Path) -> None:
    capture(settings(rich, "prototype", tmp_path / "captured", last_block="keep"), quiet=True)
    reader = made(rich / "hidden", tmp_path / "made", encoding="prototype", **ENCODINGS["prototype"])
    other = CacheReader.open(tmp_path / "captured")
    np.testing.assert_allclose(reader.prototypes(2.0), other.prototypes(2.0), atol=1e-3)


def test_hidden_states_serve_any_temperature_and_any_window(rich: Path, tmp_path: Path) -> None:
    reader = made(
        rich / "hidden",
        tmp_path / "a",
        encoding="topk",
        k=100,
        temperatures=(0.5, 3.0),
        hidden_window=2,
        hidden_dtype="float16",
    )
    assert reader.manifest.temperatures == (0.5, 3.0)
    full = CacheReader.open(rich / "hidden")
    assert np.abs(meaning(reader, 3.0) - meaning(full, 3.0)).sum(-1).max() / 2 < 0.05
    blocks = range(full.manifest.blocks.num_blocks)
    pairs = full.read("last_hidden", blocks).astype(np.float32)[:-1].reshape(len(blocks) - 1, 8, 2, -1).mean(2)
    np.testing.assert_allclose(reader.read("hidden", blocks[:-1]).astype(np.float32), pairs, rtol=2e-3, atol=1e-3)


def test_hidden_states_become_int8_within_half_a_step(rich: Path, tmp_path: Path) -> None:
    reader = made(rich / "hidden", tmp_path / "int8", last_hidden_dtype="int8", hidden_dtype="int8")
    full = CacheReader.open(rich / "hidden")
    blocks = range(full.manifest.blocks.num_blocks)
    codes, scale = reader.read("last_hidden", blocks), reader.read("last_hidden_scale", blocks)[..., None]
    assert (np.abs(codes * scale - full.read("last_hidden", blocks).astype(np.float32)) <= scale * 0.51).all()
    np.testing.assert_array_equal(reader.output_head()[0], full.output_head()[0])
    assert reader.manifest.encoding == full.manifest.encoding.model_copy(update={"dtype": "int8"})


@pytest.mark.parametrize("encoding", [TopK(k=12), Prototype(k=12, prototypes=3, calibration_tokens=9)])
def test_a_smaller_head_keeps_every_probability_and_gives_the_rest_to_the_tail(
    tmp_path: Path, encoding: Encoding
) -> None:
    old = CacheReader.open(synthetic(tmp_path / "old", encoding))
    new = made(tmp_path / "old", tmp_path / "new", encoding="topk", k=4)
    assert new.manifest.encoding == TopK(k=4)
    blocks = range(old.manifest.blocks.num_blocks)
    half_step = np.expm1(TopK(k=4).odds_step_nats / 2)
    for temperature in (1.0, 2.0):
        before, after = (reader.batch(blocks, temperature).targets for reader in (old, new))
        assert isinstance(before, HeadTargets)
        assert isinstance(after, HeadTargets)
        np.testing.assert_array_equal(after.ids_BTK, before.ids_BTK[..., :4])
        np.testing.assert_array_equal(after.logprobs_BTK, before.logprobs_BTK[..., :4])
        wide_BTK, narrow_BTK = (_head(targets, temperature) for targets in (before, after))
        # All that is rounded anew is the tail's log odds.
        np.testing.assert_allclose(narrow_BTK, wide_BTK[..., :4], rtol=half_step + 1e-5)


def _head(targets: HeadTargets, temperature: float) -> Any:
    powers = np.exp(targets.logprobs_BTK.astype(np.float64) / temperature)
    mass = 1 / (1 + np.exp(-targets.tail_log_odds_BT.astype(np.float64)))
    return (1 - mass)[..., None] * powers / powers.sum(-1, keepdims=True)


def test_coarser_steps_round_what_is_there(tmp_path: Path) -> None:
    old = CacheReader.open(synthetic(tmp_path / "old", TopK(k=5)))
    new = made(tmp_path / "old", tmp_path / "new", levels=32, odds_step_nats=0.25)
    blocks = range(old.manifest.blocks.num_blocks)
    before, after = (reader.batch(blocks, 2.0).targets for reader in (old, new))
    assert isinstance(before, HeadTargets)
    assert isinstance(after, HeadTargets)
    roots = [np.exp(targets.logprobs_BTK / 2) for targets in (before, after)]
    assert np.abs(roots[0] - roots[1]).max() <= 0.5 / 32 + 1e-6
    assert np.abs(before.tail_log_odds_BT - after.tail_log_odds_BT).max() <= 0.125


def test_prototypes_stay_right_without_draws_and_at_some_temperatures(tmp_path: Path) -> None:
    old = CacheReader.open(synthetic(tmp_path / "old", RECORDS["prototype"], temperatures=(0.5, 1.0, 2.0)))
    new = made(tmp_path / "old", tmp_path / "new", residual_draws=0, temperatures=(1.0, 2.0), hidden_window=0)
    assert new.manifest.hidden is None
    blocks = range(old.manifest.blocks.num_blocks)
    for temperature in (1.0, 2.0):
        np.testing.assert_array_equal(new.prototypes(temperature), old.prototypes(temperature))
        before, after = (reader.batch(blocks, temperature).targets for reader in (old, new))
        assert isinstance(before, HeadTargets)
        assert isinstance(after, HeadTargets)
        # Ranks are stored, by the first temperature's prototypes; the ids behind them are the same.
        np.testing.assert_array_equal(after.ids_BTK, before.ids_BTK)
        np.testing.assert_array_equal(after.tail_log_odds_BT, before.tail_log_odds_BT)
        np.testing.assert_array_equal(after.prototype_BT, before.prototype_BT)
        assert after.residual_ids_BTS is None


@pytest.mark.parametrize("encoding", RECORDS)
def test_every_encoding_can_lose_temperatures_and_pooled_states(tmp_path: Path, encoding: str) -> None:
    old = CacheReader.open(synthetic(tmp_path / "old", RECORDS[encoding]))
    new = made(tmp_path / "old", tmp_path / "new", temperatures=(2.0,), hidden_window=0)
    assert (new.manifest.encoding, new.manifest.hidden) == (old.manifest.encoding, None)
    blocks = range(old.manifest.blocks.num_blocks)
    before, after = (reader.batch(blocks, 2.0).targets for reader in (old, new))
    for name in before.__slots__:
        left, right = getattr(before, name), getattr(after, name)
        assert (left is None and right is None) or np.array_equal(left, right), name


@pytest.mark.parametrize("old_dtype", ["float16", "int8"])
def test_a_wider_window_is_the_mean_of_its_real_tokens(tmp_path: Path, old_dtype: str) -> None:
    manifest = make_manifest(window=2, hidden_dtype=old_dtype)
    rows = make_rows(manifest)
    rows["block_lengths"][-1] = 5
    blocks = manifest.blocks.model_copy(update={"last_block": "keep"})
    corpus = manifest.corpus.model_copy(update={"num_tokens": manifest.corpus.num_tokens - 3})
    write_cache(tmp_path / "old", manifest.model_copy(update={"blocks": blocks, "corpus": corpus}), rows)
    new = made(tmp_path / "old", tmp_path / "new", hidden_window=4, hidden_dtype=old_dtype)
    every = range(blocks.num_blocks)
    before, after = (r.batch(every, 1.0).hidden_BWD for r in (CacheReader.open(tmp_path / "old"), new))
    assert before is not None
    assert after is not None
    weights = np.clip(new.lengths(every).astype(int)[:, None] - np.arange(4) * 2, 0, 2).reshape(-1, 2, 2, 1)
    wide = before.astype(np.float32).reshape(len(before), 2, 2, -1)
    expected = (wide * weights).sum(2) / weights.sum(2).clip(1)
    atol = 0.51 * float(new.read("hidden_scale", every).max()) if old_dtype == "int8" else 2e-3
    np.testing.assert_allclose(after, expected, atol=atol)


def test_a_stopped_transcoding_goes_on_to_the_same_bytes(
    rich: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(cache: Path, manifest: Manifest, shard: int, rows: Any) -> Any:
        if shard == 2:
            raise KeyboardInterrupt
        return commit.commit_shard(cache, manifest, shard, rows)

    changes: dict[str, Any] = {"encoding": "prototype", **ENCODINGS["prototype"]}
    made(rich / "hidden", tmp_path / "clean", **changes)
    config = TranscodeConfig(cache=rich / "hidden", out=tmp_path / "again", device="cpu", **changes)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.transcode.commit_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            transcode(config, quiet=True)
    assert committed_shards(config.out, read_manifest(config.out)) == [0, 1]
    assert transcode(config, quiet=True)["shards_captured_now"] == 5
    assert contents(config.out) == contents(tmp_path / "clean")
    (config.out / "prototypes" / "c.0.0.0").unlink()
    (config.out / "head_gaps" / "c.1.0.0").unlink()
    assert transcode(config, quiet=True)["shards_captured_now"] == 1
    assert contents(config.out) == contents(tmp_path / "clean")
    assert transcode(config, quiet=True)["shards_captured_now"] == 0


@pytest.mark.parametrize(
    ("encoding", "changes", "needed"),
    [
        ("topk", {"encoding": "sampled"}, "topk to sampled, expected a cache of encoding hidden"),
        ("topk", {"encoding": "hidden"}, "topk to hidden, expected a cache of encoding hidden"),
        ("topk", {"encoding": "prototype"}, "expected a cache of encoding hidden"),
        ("topk", {"k": 6}, "expected a head of at least 6 tokens, or a cache of encoding hidden"),
        ("topk", {"levels": 256}, "expected at least 256 levels"),
        ("topk", {"odds_step_nats": 0.001}, "expected odds_step_nats of at most 0.001"),
        ("topk", {"temperatures": (1.0, 3.0)}, "temperature 3, expected one of 1, 2, or a cache of encoding hidden"),
        ("topk", {"hidden_window": 2}, "expected hidden states of a window that divides 2"),
        ("prototype", {"k": 4}, "prototype to prototype, expected a cache of encoding hidden"),
        ("prototype", {"residual_draws": 2}, "expected a cache of encoding hidden"),
        ("prototype", {"prototypes": 2}, "expected a cache of encoding hidden"),
        ("sampled", {"draws": 6}, "expected a cache of encoding hidden"),
        ("sparsified", {"k": 3}, "expected a cache of encoding hidden"),
        ("hidden", {"last_hidden_dtype": "float16"}, "expected a cache of encoding hidden in float16"),
    ],
)
def test_what_a_cache_does_not_hold_is_refused(
    tmp_path: Path, encoding: str, changes: dict[str, Any], needed: str
) -> None:
    synthetic(tmp_path / "old", RECORDS[encoding])
    config = TranscodeConfig(cache=tmp_path / "old", out=tmp_path / "new", **changes)
    said = refused("cannot-transcode", transcode, config, quiet=True)
    assert needed in said
    assert "run cache-teacher with the teacher" in said
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("unused-setting", {"draws": 3}),
        ("unused-setting", {"hidden_window": 0, "hidden_dtype": "int8"}),
        ("bad-window", {"hidden_window": 3}),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    synthetic(tmp_path / "old", RECORDS["topk"])
    refused(kind, transcode, TranscodeConfig(cache=tmp_path / "old", out=tmp_path / "new", **changes), quiet=True)
    assert not (tmp_path / "new").exists()


def test_an_unfinished_cache_is_no_source(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_cache(tmp_path / "old", manifest, make_rows(manifest), seal=False)
    config = TranscodeConfig(cache=tmp_path / "old", out=tmp_path / "new", k=2)
    refused("unfinished-cache", transcode, config, quiet=True)


def test_a_folder_of_another_origin_is_left_alone(rich: Path, tmp_path: Path) -> None:
    captured = settings(rich, "topk", tmp_path / "captured", last_block="keep")
    capture(captured, quiet=True)
    transcoded = TranscodeConfig(cache=rich / "hidden", out=tmp_path / "made", encoding="topk", k=8, device="cpu")
    transcode(transcoded, quiet=True)
    with pytest.raises(WouldLoseDataError, match=r"other-settings.*transcoded_from: .*, now a teacher"):
        capture(captured.model_copy(update={"out": tmp_path / "made"}), quiet=True)
    with pytest.raises(WouldLoseDataError, match=r"other-settings.*transcoded_from: a teacher, now"):
        transcode(transcoded.model_copy(update={"out": tmp_path / "captured"}), quiet=True)
    with pytest.raises(WouldLoseDataError, match=r"other-settings.*encoding.k: 8, now 4"):
        transcode(transcoded.model_copy(update={"k": 4}), quiet=True)


def test_the_command_tells_its_cost_and_then_its_result(
    rich: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["transcode", str(rich / "hidden"), "--out", str(tmp_path / "new"), "--encoding", "sampled", "--json"]
    assert cli.run([*arguments, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "new").exists()
    assert cli.run(arguments) == 0
    real = json.loads(capsys.readouterr().out)
    assert told["tokens"] == real["tokens"]
    assert told["bytes_per_token"] == pytest.approx(real["bytes_per_token"], rel=0.1)
    assert cli.run(["inspect", str(tmp_path / "new")]) == 0
    assert "made from    cache" in capsys.readouterr().out
