"""Training from, and evaluation against, a tiny cache of every encoding; tails and temperatures that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import GPT2Config, PreTrainedTokenizerFast

from cache_spec.errors import WouldLoseDataError
from cache_spec.manifest import sha256_hex
from tests.refusals import refused
from tests.synthetic import ENCODINGS, make_manifest, make_rows, write_cache
from train.config import TrainConfig
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import evaluate_models
from train.loop import train

VOCABULARY, WIDTH, TOKENS, BLOCKS = 50, 16, 8, 12
TAILS = {"topk": "bucket", "prototype": "prototype"}
"""What a tail does where nothing is said."""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_cache(tmp_path_factory.mktemp("caches") / name, name) for name in ENCODINGS}


def make_cache(folder: Path, name: str, *, window: int = 4) -> Path:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.save_pretrained(folder / "teacher")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", unk_token="w1")
    fast.save_pretrained(folder / "tokenizer")
    manifest = make_manifest(
        num_blocks=BLOCKS,
        block_tokens=TOKENS,
        shard_blocks=4,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        encoding=ENCODINGS[name],
        window=window,
    )
    files = {
        str(path.relative_to(folder)): sha256_hex(path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    }
    rows = make_rows(manifest)
    rows["block_lengths"][-1] = 5
    corpus = manifest.corpus.model_copy(update={"num_tokens": BLOCKS * TOKENS - 3})
    write_cache(folder, manifest.model_copy(update={"files": files, "corpus": corpus}), rows)
    return folder


def settings(cache: Path, out: Path, **changed: Any) -> TrainConfig:
    given: dict[str, Any] = {"cache": cache, "out": out, "student": "config", "device": "cpu", "tensorboard": False}
    given |= {"batch_blocks": 3, "epochs": 10, "learning_rate": 1e-2, "dropout": 0.0, "log_every": 1}
    return TrainConfig(**given | changed)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ENCODINGS)
def test_a_student_learns_from_every_encoding_and_is_evaluated_against_it(
    caches: dict[str, Path], tmp_path: Path, name: str, temperature: float
) -> None:
    result = train(settings(caches[name], tmp_path / "run", temperature=temperature), quiet=True)
    first, last = lines(tmp_path / "run")[0], result["last_step"]
    assert last["loss"] < 0.9 * first["loss"]
    assert last["kl"] < first["kl"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["tail"] == TAILS.get(name)
    models = (str(tmp_path / "run" / "student"),)
    (row,) = evaluate_models(
        EvaluateConfig(models=models, cache=caches[name], temperature=temperature, device="cpu"), quiet=True
    )
    figures = row["cache"]
    compared = [figures[key] for key in ("kl_to_teacher", "agreement", "overlap")]
    assert figures["kl_is"] == {"topk": "lower-bound", "prototype": "lower-bound", "hidden": "exact"}.get(name)
    assert all(value is None for value in compared) == (name in ("sampled", "sparsified"))
    assert figures["loss_nats"] > 0
    assert 0 <= figures["ece"] <= 1


def test_weights_follow_their_schedules_and_are_logged(caches: dict[str, Path], tmp_path: Path) -> None:
    changed = {"kl_schedule": "linear:1:0:0.5", "ce_schedule": "linear:0:2", "hidden_schedule": "first:0.5"}
    config = settings(caches["topk"], tmp_path / "run", max_steps=4, cosine_weight=0.5, schedule="wsd", **changed)
    train(config, quiet=True)
    logged = lines(tmp_path / "run")
    assert [line["kl_weight"] for line in logged] == pytest.approx([0.9, 0, 0, 0])
    assert [line["ce_weight"] for line in logged] == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])
    assert [line["cosine_weight"] for line in logged] == [0.5, 0.5, 0, 0]
    assert [{"kl", "ce", "cosine"} & set(line) for line in logged] == [
        {"kl", "cosine"},
        {"ce", "cosine"},
        {"ce"},
        {"ce"},
    ]
    for line in logged:
        loss = sum(line[f"{name}_weight"] * line.get(name, 0.0) for name in ("kl", "ce", "cosine"))
        assert line["loss"] == pytest.approx(loss, rel=1e-5)


def test_centred_hidden_losses_train_and_need_two_windows(caches: dict[str, Path], tmp_path: Path) -> None:
    config = settings(caches["topk"], tmp_path / "run", hidden_centre=True, mse_weight=1.0, cosine_weight=0.5)
    result = train(config, quiet=True)
    assert result["last_step"]["mse"] < lines(tmp_path / "run")[0]["mse"]
    wide = make_cache(tmp_path / "cache", "topk", window=TOKENS)
    config = settings(wide, tmp_path / "other", hidden_centre=True, mse_weight=1.0)
    refused("bad-window", train, config, quiet=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "uniform", "gold", "prototype"])
def test_every_treatment_of_the_tail_trains_and_is_written_down(
    caches: dict[str, Path], tmp_path: Path, tail: str
) -> None:
    train(settings(caches["prototype"], tmp_path / "run", tail=tail, max_steps=2), quiet=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["tail"] == tail
    assert f"| tail | {tail} |" in (tmp_path / "run" / "student" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("topk", {"divergence": "reverse"}),
        ("prototype", {"divergence": "reverse", "tail": "bucket"}),
        ("hidden", {"divergence": "reverse"}),
        ("topk", {"divergence": "js", "js_beta": 0.2}),
        ("topk", {"divergence": "js", "tail": "renormalise"}),
        ("topk", {"divergence": "js", "tail": "uniform"}),
        ("hidden", {"divergence": "js"}),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_learns_by_every_divergence_that_its_targets_have(
    caches: dict[str, Path], tmp_path: Path, name: str, changed: dict[str, Any], temperature: float
) -> None:
    config = settings(caches[name], tmp_path / "run", temperature=temperature, ce_weight=0.0, **changed)
    result = train(config, quiet=True)
    assert 0 <= result["last_step"]["kl"] < 0.9 * lines(tmp_path / "run")[0]["kl"]


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        *(
            (name, {"divergence": kind}, "at random")
            for name in ("sampled", "sparsified")
            for kind in ("reverse", "js")
        ),
        ("prototype", {"divergence": "js"}, "residual draws"),
        ("topk", {"divergence": "js", "tail": "gold"}, "next token"),
        ("topk", {"divergence": "reverse", "tail": "renormalise"}, "infinite"),
        ("topk", {"divergence": "reverse", "tail": "uniform"}, "spread tail"),
    ],
)
def test_a_divergence_without_a_right_value_is_refused_before_anything_is_made(
    caches: dict[str, Path], tmp_path: Path, name: str, changed: dict[str, Any], said: str
) -> None:
    config = settings(caches[name], tmp_path / "run", **changed)
    assert said in refused("unsupported-divergence", train, config, quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_tail_that_is_meant_by_none_goes_on_when_it_is_named(caches: dict[str, Path], tmp_path: Path) -> None:
    first = settings(caches["prototype"], tmp_path / "run", max_steps=2)
    train(first, quiet=True)
    train(first.model_copy(update={"tail": "prototype"}), quiet=True)
    with pytest.raises(WouldLoseDataError) as caught:
        train(first.model_copy(update={"tail": "bucket"}), quiet=True)
    assert (caught.value.expected, caught.value.found) == ("tail = prototype", "tail = bucket")


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        *((name, tail) for name in ("sampled", "sparsified", "hidden") for tail in ("bucket", "gold", "prototype")),
        ("topk", "prototype"),
    ],
)
def test_a_tail_that_the_encoding_does_not_have_is_refused(
    caches: dict[str, Path], tmp_path: Path, name: str, tail: str
) -> None:
    message = refused("no-tail", train, settings(caches[name], tmp_path / "run", tail=tail), quiet=True)
    assert name in message
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("name", ENCODINGS)
def test_only_hidden_states_serve_a_temperature_outside_the_grid(
    caches: dict[str, Path], tmp_path: Path, name: str
) -> None:
    config = settings(caches[name], tmp_path / "run", temperature=1.5, max_steps=2)
    if name == "hidden":
        assert train(config, quiet=True)["steps"] == 2
        return
    refused("undeclared-temperature", train, config, quiet=True)


@pytest.mark.parametrize("name", ["prototype", "hidden"])
def test_tables_of_the_cache_are_in_no_checkpoint_and_no_student(
    caches: dict[str, Path], tmp_path: Path, name: str
) -> None:
    train(settings(caches[name], tmp_path / "run", max_steps=2), quiet=True)
    files = list((tmp_path / "run").rglob("*.safetensors"))
    assert len(files) > 1
    for path in files:
        with safe_open(path, "pt") as tensors:
            assert not [key for key in tensors.keys() if "targets" in key or "tail" in key]  # noqa: SIM118


def test_hidden_states_teach_what_dense_distillation_does(caches: dict[str, Path], tmp_path: Path) -> None:
    """The divergence that training logs in its first step is that of the very student it starts from."""
    config = settings(caches["hidden"], tmp_path / "run", max_steps=1, batch_blocks=BLOCKS, ce_weight=0.0)
    train(config.model_copy(update={"learning_rate": 1e-12}), quiet=True)
    (row,) = evaluate_models(
        EvaluateConfig(models=(str(tmp_path / "run" / "student"),), cache=caches["hidden"], device="cpu"), quiet=True
    )
    assert row["cache"]["kl_to_teacher"] == pytest.approx(lines(tmp_path / "run")[0]["kl"], rel=1e-5)
