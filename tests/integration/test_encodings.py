"""Every encoding from text to cache on a tiny teacher: right meaning, resumed runs, workers, tables, refusals."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cache_spec import commit
from cache_spec.encodings import ENCODINGS as REGISTRY
from cache_spec.errors import WouldLoseDataError
from cache_spec.reader import CacheReader
from cache_spec.receipts import committed_shards, read_manifest
from cache_spec.targets import Array, Tail, dense
from cache_spec.validate import verify_cache
from pipeline import calibrate, cli, cluster
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from pipeline.estimate import estimate
from pipeline.inspect import describe, inspect_cache
from pipeline.recompute import compare_with_teacher
from pipeline.teacher import load_teacher
from tests.integration.test_capture import SETTINGS, contents
from tests.models import ENCODINGS, make_folder, write_words
from tests.refusals import refused

COMMON = {name: value for name, value in SETTINGS.items() if name not in ("encoding", "k")}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, text, and a cache of each encoding; nobody writes to them."""
    folder = tmp_path_factory.mktemp("captured")
    make_folder(folder / "teacher", spread=4.0)
    write_words(folder / "text.jsonl")
    for encoding in ENCODINGS:
        capture(settings(folder, encoding, folder / encoding), quiet=True)
    return folder


def settings(folder: Path, encoding: str, out: Path, **changes: Any) -> CaptureConfig:
    values = {"teacher": str(folder / "teacher"), "text": (str(folder / "text.jsonl"),), "out": out, **COMMON}
    return CaptureConfig(**{**values, "encoding": encoding, **ENCODINGS[encoding], **changes})


def meaning(reader: CacheReader, temperature: float, tail: Tail = "renormalise") -> Array:
    """The full distribution of every token of a cache, [B, T, V]."""
    encoding, batch = reader.manifest.encoding, reader.batch(range(reader.manifest.blocks.num_blocks), temperature)
    return dense(
        batch.targets,
        temperature=temperature,
        vocab_size=reader.manifest.teacher.vocab_size,
        tail="prototype" if encoding.name == "prototype" else tail,
        prototypes_CV=reader.prototypes(temperature) if encoding.name == "prototype" else None,
        head=reader.output_head() if encoding.name == "hidden" else None,
    )


def test_the_registry_is_what_the_command_line_offers() -> None:
    assert set(ENCODINGS) == set(REGISTRY)
    for encoding in REGISTRY:
        CaptureConfig(teacher="t", text=("x",), out=Path("o"), encoding=encoding)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_cache_means_what_the_teacher_says(captured: Path, encoding: str, temperature: float) -> None:
    assert verify_cache(captured / encoding) == []
    reader = CacheReader.open(captured / encoding)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(captured / "teacher").eval()
    blocks = range(reader.manifest.blocks.num_blocks)
    with torch.no_grad():
        logits = model(torch.from_numpy(reader.read("input_ids", blocks).astype(np.int64))).logits[..., :100]
    expected_BTV = (logits.double() / temperature).softmax(-1).numpy()
    found_BTV = meaning(reader, temperature, "uniform")
    np.testing.assert_allclose(found_BTV.sum(-1), 1, atol=1e-5)
    # Half the summed difference: of each token, and of the mean over all 480, where what is unbiased comes out small.
    each = np.abs(found_BTV - expected_BTV).sum(-1).mean() / 2
    mean = np.abs((found_BTV - expected_BTV).mean((0, 1))).sum() / 2
    limits = {
        "topk": {1.0: (0.2, 0.12), 2.0: (0.25, 0.15)},
        "prototype": {1.0: (0.3, 0.05), 2.0: (0.4, 0.05)},
        "sampled": {1.0: (0.55, 0.05), 2.0: (0.8, 0.05)},
        "sparsified": {1.0: (0.55, 0.05), 2.0: (0.9, 0.09)},
        "hidden": {1.0: (2e-4, 2e-5), 2.0: (2e-4, 2e-5)},
    }
    assert each < limits[encoding][temperature][0]
    assert mean < limits[encoding][temperature][1]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_inspect_and_deep_verification_know_every_encoding(captured: Path, encoding: str) -> None:
    facts = inspect_cache(captured / encoding)
    by_array = facts["bytes_per_token_by_array"]
    assert facts["target_bytes_per_token"] == pytest.approx(sum(by_array[name] for name in facts["target_arrays"]))
    assert (facts["table_bytes"] != {}) == (encoding in ("prototype", "hidden"))
    whole = sum(by_array.values()) + facts["table_bytes_per_token"]
    assert facts["bytes_per_token"] == pytest.approx(whole)
    assert (facts["mean_tail_mass"] != {}) == (encoding in ("topk", "prototype"))
    assert any(line.startswith(f"targets      {encoding}") for line in describe(facts))
    assert compare_with_teacher(captured / encoding, str(captured / "teacher"), gguf_file=None, num_batches=3) == []


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_deep_verification_finds_targets_of_another_model(
    captured: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed_teacher(*args: Any, **kwargs: Any) -> Any:
        teacher = load_teacher(*args, **kwargs)
        with torch.no_grad():
            teacher.model.transformer.ln_f.weight.mul_(1.5)
        return teacher

    monkeypatch.setattr("pipeline.recompute.load_teacher", changed_teacher)
    problems = compare_with_teacher(captured / encoding, str(captured / "teacher"), gguf_file=None, num_batches=30)
    places = " ".join(problem.place for problem in problems)
    told = {"topk": "head", "prototype": "head", "sampled": "draws", "sparsified": "draws", "hidden": "last_hidden"}
    assert told[encoding] in places
    assert "block_loss" in places


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_dry_run_tells_the_size_of_every_encoding(captured: Path, encoding: str, tmp_path: Path) -> None:
    told = estimate(settings(captured, encoding, tmp_path / "cache", batch_blocks=5))
    real = inspect_cache(captured / encoding)
    # Prototypes are not learnt for an estimate, and tables are told as they are before compression.
    limit = 0.3 if encoding == "prototype" else 0.1
    assert told["target_bytes_per_token"] == pytest.approx(real["target_bytes_per_token"], rel=limit)
    assert set(told["table_bytes"]) == set(real["table_bytes"])
    assert all(told["table_bytes"][name] >= 0.8 * size for name, size in real["table_bytes"].items())
    assert not (tmp_path / "cache").exists()


def test_workers_write_the_same_bytes_as_one_process(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster.local_cluster(2) as workers:

        @contextlib.contextmanager
        def the_same(_num_workers: int, **_: Any) -> Iterator[Any]:
            yield workers

        monkeypatch.setattr(cluster, "local_cluster", the_same)
        for encoding in ENCODINGS:
            capture(settings(captured, encoding, tmp_path / encoding, workers=2), quiet=True)
            assert contents(tmp_path / encoding) == contents(captured / encoding), encoding


def test_a_stopped_calibration_starts_again_and_a_stopped_capture_keeps_its_tables(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(captured, "prototype", tmp_path / "cache")

    def stops(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def stops_at_two(cache: Path, manifest: Any, packed: Any) -> Any:
        return stops() if packed.receipt.shard == 2 else commit.publish_shard(cache, manifest, packed)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "calibrate", stops)
        with pytest.raises(KeyboardInterrupt):
            capture(config, quiet=True)
    assert not (config.out / "manifest.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.place.publish_shard", stops_at_two)
        with pytest.raises(KeyboardInterrupt):
            capture(config, quiet=True)
    assert committed_shards(config.out, read_manifest(config.out)) == [0, 1]
    monkeypatch.setattr(calibrate, "calibrate", stops)
    assert capture(config, quiet=True)["shards_captured_now"] == 4
    assert contents(config.out) == contents(captured / "prototype")


@pytest.mark.parametrize(
    ("encoding", "lost"),
    [
        ("hidden", "output_head"),
        ("hidden", "output_head/c.0.0"),
        ("prototype", "prototypes"),
        ("prototype", "prototype_classifier/c.0.0"),
    ],
)
@pytest.mark.parametrize("how", ["removed", "changed"])
def test_a_damaged_table_is_made_again(captured: Path, tmp_path: Path, encoding: str, lost: str, how: str) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(captured / encoding, cache)
    path = cache / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink() if how == "removed" else path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify_cache(cache) != []
    capture(settings(captured, encoding, cache), quiet=True)
    assert verify_cache(cache) == []
    assert contents(cache) == contents(captured / encoding)


def test_prototypes_that_do_not_come_out_the_same_are_refused(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, real = tmp_path / "cache", calibrate.calibrate
    shutil.copytree(captured / "prototype", cache)
    (cache / "prototypes" / "c.0.0.0").unlink()
    before = contents(cache)

    def others(*args: Any) -> dict[str, Array]:
        tables = real(*args)
        return {**tables, "prototypes": tables["prototypes"][:, ::-1].copy()}

    monkeypatch.setattr(calibrate, "calibrate", others)
    said = refused("table-mismatch", capture, settings(captured, "prototype", cache), quiet=True)
    assert "put the table back from a copy of the cache" in said
    assert contents(cache) == before


def test_prototypes_can_be_taken_from_another_cache(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("prototypes were learnt")

    monkeypatch.setattr(calibrate, "calibrate", never)
    own = {"k": 8, "residual_draws": 4, "prototypes_from": captured / "prototype"}
    values = {"teacher": str(captured / "teacher"), "text": (str(captured / "text.jsonl"),), **COMMON}
    config = CaptureConfig(out=tmp_path / "same", encoding="prototype", **values, **own)
    capture(config, quiet=True)
    assert contents(tmp_path / "same") == contents(captured / "prototype")
    config = CaptureConfig(out=tmp_path / "one", encoding="prototype", **values | {"temperatures": (2.0,)}, **own)
    capture(config, quiet=True)
    assert verify_cache(tmp_path / "one") == []
    one, all_of_them = (CacheReader.open(path) for path in (tmp_path / "one", captured / "prototype"))
    np.testing.assert_array_equal(one.prototypes(2.0), all_of_them.prototypes(2.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 7}, "expected k 7, found 8"),
        ({"temperatures": (1.0, 3.0)}, "expected prototypes at temperature 3"),
        ({"prototypes": 4}, "prototypes 4, expected 3"),
        ({"prototypes_from": "topk"}, "expected a cache of encoding prototype, found encoding topk"),
        ({"teacher": "other"}, "expected teacher "),
    ],
)
def test_prototypes_of_something_else_are_refused(
    captured: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    if "teacher" in changes:
        changes = {"teacher": str(make_folder(tmp_path / "other", spread=3.0))}
    source = captured / changes.pop("prototypes_from", "prototype")
    values = {"teacher": str(captured / "teacher"), "text": (str(captured / "text.jsonl"),), **COMMON, "k": 8}
    config = CaptureConfig(
        out=tmp_path / "cache", encoding="prototype", prototypes_from=source, **{**values, **changes}
    )
    assert said in refused("other-prototypes", capture, config, quiet=True)
    assert not config.out.exists()


def test_too_few_tokens_for_the_prototypes_are_one_line(captured: Path, tmp_path: Path) -> None:
    config = settings(captured, "prototype", tmp_path / "cache", prototypes=64, calibration_tokens=20)
    assert "ask for fewer --prototypes" in refused("too-few-tokens", capture, config, quiet=True)


@pytest.mark.parametrize(
    ("encoding", "changes", "difference"),
    [
        ("prototype", {"prototypes": 4}, "encoding.prototypes: 3, now 4"),
        ("prototype", {"calibration_tokens": 200}, "encoding.calibration_tokens: 300, now 200"),
        ("prototype", {"seed": 1}, "encoding.seed: 0, now 1"),
        ("sampled", {"draws": 21}, "encoding.draws: 20, now 21"),
        ("sparsified", {"levels": 99}, "encoding.levels: 4096, now 99"),
        ("hidden", {"last_hidden_dtype": "int8"}, "encoding.dtype: float16, now int8"),
    ],
)
def test_an_encodings_setting_cannot_change_under_way(
    captured: Path, encoding: str, changes: dict[str, Any], difference: str
) -> None:
    config = settings(captured, encoding, captured / encoding, **changes)
    with pytest.raises(WouldLoseDataError, match=difference):
        capture(config, quiet=True)


def test_pooled_and_last_hidden_states_in_int8_are_near_those_in_float16(captured: Path, tmp_path: Path) -> None:
    config = settings(captured, "hidden", tmp_path / "int8", last_hidden_dtype="int8", hidden_dtype="int8")
    capture(config, quiet=True)
    assert verify_cache(config.out) == []
    coarse, fine = CacheReader.open(config.out), CacheReader.open(captured / "hidden")
    blocks = range(fine.manifest.blocks.num_blocks)
    pooled = [reader.batch(blocks, 1.0).hidden_BWD for reader in (coarse, fine)]
    assert pooled[0] is not None
    scale = coarse.read("hidden_scale", blocks)[:, None]
    assert (np.abs(pooled[0] - pooled[1]) <= scale / 2 + 1e-3).all()
    assert np.abs(meaning(coarse, 2.0) - meaning(fine, 2.0)).sum(-1).max() / 2 < 0.05


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_student_learns_from_every_encoding(
    captured: Path, tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def kdpipe(*arguments: object) -> Any:
        capsys.readouterr()
        code = cli.run([*map(str, arguments), "--device", "cpu", "--json"])
        streams = capsys.readouterr()
        assert code == 0, streams.err
        return json.loads(streams.out)

    train = ["train-student", "--cache", captured / encoding, "--out", tmp_path, "--teacher", captured / "teacher"]
    train += ["--num-layers", 1, "--batch-blocks", 4, "--temperature", 2, "--cosine-weight", 0.5]
    assert kdpipe(*train)["steps"] == 8
    models = ["--models", tmp_path / "student", "--models", captured / "teacher"]
    rows = kdpipe("evaluate", *models, "--cache", captured / encoding)["models"]
    student, teacher = (row["cache"]["kl_to_teacher"] for row in rows)
    # Draws say nothing of the divergence from what they were drawn from.
    if encoding in ("sampled", "sparsified"):
        assert student is None
    else:
        assert student > teacher == pytest.approx(0, abs=0.02)
