"""Masked language models end to end: text and a BERT go in, a smaller one that reloads comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cache_spec.reader import CacheReader
from cache_spec.validate import verify_cache
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from tests.models import ENCODINGS, make_folder, write_words
from tests.processes import on_ranks
from tests.refusals import refusal
from tests.runs import assert_same_run, metric_lines, weights_of
from train.config import TrainConfig
from train.dataset import CacheDataset
from train.distiller import Distiller, LossWeights
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import evaluate_models
from train.loop import train
from train.run import first_student
from train.trainer import KDTrainer

VOCABULARY = 60


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3}
    return make_folder(tmp_path_factory.mktemp("bert") / "teacher", "bert", VOCABULARY, spread=5.0, **sizes)


def cached(folder: Path, teacher: Path, *, seed: int = 0, **changes: Any) -> Path:
    text = write_words(folder / f"text-{seed}.jsonl", num_documents=40, words=30, vocab_size=VOCABULARY, seed=seed)
    settings: dict[str, Any] = {
        "teacher": str(teacher),
        "text": (str(text),),
        "out": folder / "cache",
        "block_tokens": 16,
        "last_block": "each",
        "hidden_window": 1,
        "batch_blocks": 4,
        "shard_blocks": 32,
        "device": "cpu",
        **({"encoding": "topk", "k": 16} if "encoding" not in changes else {}),
    }
    config = CaptureConfig(**settings | changes)
    capture(config, quiet=True)
    return config.out


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return cached(tmp_path_factory.mktemp("cached"), teacher, mask_positions="all")


def settings(cache: Path, teacher: Path, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "cache": cache,
        "out": out,
        "teacher": str(teacher),
        "num_layers": 2,
        "kl_weight": 1.0,
        "ce_weight": 0.2,
        "cosine_weight": 0.2,
        "temperature": 2.0,
        "learning_rate": 3e-3,
        "batch_blocks": 16,
        "epochs": 4,
        "log_every": 1,
        "device": "cpu",
        "tensorboard": False,
    }
    return TrainConfig(**values | changes)


def test_a_student_learns_and_reloads_as_what_it_is(tmp_path: Path, cache: Path, teacher: Path) -> None:
    held_out = cached(tmp_path, teacher, seed=1, out=tmp_path / "held-out", mask_positions="all", mask_seed=3)
    config = settings(cache, teacher, tmp_path / "run", evaluate_cache=held_out)
    result = train(config, quiet=True)
    lines = [line for line in metric_lines(config.out) if "loss" in line]
    for name in ("loss", "kl", "ce", "cosine"):
        assert sum(line[name] for line in lines[-3:]) < sum(line[name] for line in lines[:3]), name
    student = config.out / "student"
    model: Any = transformers.AutoModelForMaskedLM.from_pretrained(student)
    assert type(model).__name__ == "BertForMaskedLM"
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (2, VOCABULARY)
    assert "pipeline_tag: fill-mask" in (student / "README.md").read_text()
    assert "mask_share" in (student / "README.md").read_text()
    (row,) = evaluate_models(EvaluateConfig(models=(str(student),), cache=held_out, device="cpu", temperature=2.0))
    figures = row["cache"]
    assert figures["num_tokens"] < 0.25 * figures["num_positions"]
    assert figures["num_positions"] == CacheReader.open(held_out).manifest.corpus.num_tokens
    assert figures["kl_to_teacher"] == pytest.approx(result["evaluation"]["kl"], rel=1e-4)
    assert figures["loss_nats"] == pytest.approx(result["evaluation"]["loss"], rel=1e-4)
    # The figures in full, by the model itself, one block at a time.
    reader = CacheReader.open(held_out)
    sum_nats, number = 0.0, 0
    for block in range(reader.manifest.blocks.num_blocks):
        batch = reader.batch([block], 2.0)
        assert batch.masked is not None
        length = int(batch.lengths_B[0])
        read, true = (
            torch.from_numpy(ids[:, :length].astype("int64")) for ids in (batch.masked.read_ids_BT, batch.input_ids_BT)
        )
        labels = torch.where(torch.from_numpy(batch.masked.selected_BT[:, :length]), true, -100)
        with torch.no_grad():
            logits = model.eval()(input_ids=read).logits
        sum_nats += float(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
        number += int((labels != -100).sum())
    assert figures["num_tokens"] == number
    assert figures["loss_nats"] == pytest.approx(sum_nats / number, rel=1e-4)


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name != "topk"])
def test_every_encoding_of_masked_positions_teaches(tmp_path: Path, teacher: Path, encoding: str) -> None:
    cache = cached(tmp_path, teacher, encoding=encoding, **ENCODINGS[encoding])
    assert verify_cache(cache) == []
    config = settings(cache, teacher, tmp_path / "run")
    train(config, quiet=True)
    lines = [line["kl"] for line in metric_lines(config.out) if "kl" in line]
    assert sum(lines[-3:]) < sum(lines[:3])


def test_a_run_of_masked_positions_alone_is_that_of_a_cache_of_them(tmp_path: Path, cache: Path, teacher: Path) -> None:
    only = cached(tmp_path, teacher, out=tmp_path / "only")
    whole = settings(cache, teacher, tmp_path / "whole", max_steps=3, kl_positions="masked")
    part = settings(only, teacher, tmp_path / "part", max_steps=3)
    train(whole, quiet=True)
    train(part, quiet=True)
    assert_same_run(whole.out, part.out)
    every = settings(cache, teacher, tmp_path / "every", max_steps=3)
    train(every, quiet=True)
    with pytest.raises(AssertionError):
        assert_same_run(whole.out, every.out)


@pytest.mark.parametrize("student", ["config", "checkpoint"])
def test_a_distilbert_learns_from_a_bert(tmp_path: Path, cache: Path, teacher: Path, student: str) -> None:
    sizes = {"model_type": "distilbert", "n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 48}
    changes: dict[str, Any] = {"student": "config", "student_config": sizes}
    if student == "checkpoint":
        folder = make_folder(tmp_path / "start", "distilbert", VOCABULARY)
        changes = {"student": "checkpoint", "checkpoint": str(folder)}
    config = settings(cache, teacher, tmp_path / "run", **{"num_layers": None, "max_steps": 12} | changes)
    train(config, quiet=True)
    model: Any = transformers.AutoModelForMaskedLM.from_pretrained(config.out / "student")
    assert type(model).__name__ == "DistilBertForMaskedLM"
    lines = [line["loss"] for line in metric_lines(config.out) if "loss" in line]
    assert sum(lines[-3:]) < sum(lines[:3])


def test_frozen_embeddings_stay_as_they_start(tmp_path: Path, cache: Path, teacher: Path) -> None:
    frozen = {"freeze_position_embeddings": True, "freeze_token_type_embeddings": True}
    config = settings(cache, teacher, tmp_path / "run", max_steps=2, **frozen)
    train(config, quiet=True)
    old, new = (
        transformers.AutoModelForMaskedLM.from_pretrained(folder).bert.embeddings
        for folder in (teacher, config.out / "student")
    )
    assert torch.equal(old.position_embeddings.weight, new.position_embeddings.weight)
    assert torch.equal(old.token_type_embeddings.weight, new.token_type_embeddings.weight)
    assert not torch.equal(old.word_embeddings.weight[:VOCABULARY], new.word_embeddings.weight)
    sizes = {"model_type": "distilbert", "n_layers": 1, "dim": 32, "n_heads": 2, "hidden_dim": 48}
    changes = {"student": "config", "student_config": sizes, "num_layers": None, **frozen}
    without = settings(cache, teacher, tmp_path / "without", **changes)
    assert refusal(train, without).kind == "no-token-type-embeddings"


def test_students_and_caches_of_two_kinds_are_refused(tmp_path: Path, cache: Path, teacher: Path) -> None:
    causal_teacher = make_folder(tmp_path / "gpt2", "gpt2", VOCABULARY)
    causal = tmp_path / "causal"
    text = write_words(tmp_path / "text.jsonl", vocab_size=VOCABULARY)
    given: dict[str, Any] = {"encoding": "topk", "k": 8, "block_tokens": 16, "hidden_window": 0, "device": "cpu"}
    capture(CaptureConfig(teacher=str(causal_teacher), text=(str(text),), out=causal, **given), quiet=True)
    fresh = {"student": "config", "num_layers": None}
    gpt2 = settings(cache, teacher, tmp_path / "a", student_config={"model_type": "gpt2"}, **fresh)
    assert refusal(train, gpt2).kind == "not-a-masked-lm"
    bert = settings(causal, teacher, tmp_path / "b", student_config={"model_type": "bert"}, cosine_weight=0.0, **fresh)
    assert refusal(train, bert).kind == "not-a-causal-lm"
    unused = settings(causal, causal_teacher, tmp_path / "c", kl_positions="masked", cosine_weight=0.0)
    assert refusal(train, unused).kind == "no-masking"
    held_out = settings(cache, teacher, tmp_path / "d", evaluate_cache=causal)
    assert refusal(train, held_out).kind == "evaluate-cache"

    def evaluated(model: Path, **on: Any) -> Any:
        return evaluate_models(EvaluateConfig(models=(str(model),), device="cpu", **on))

    assert refusal(evaluated, causal_teacher, cache=cache).kind == "not-a-masked-lm"
    assert refusal(evaluated, teacher, cache=causal).kind == "not-a-causal-lm"
    assert refusal(evaluated, teacher, text=(str(text),)).kind == "not-a-causal-lm"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_ranks_train_what_one_would(tmp_path: Path, cache: Path, teacher: Path, strategy: str) -> None:
    shared: dict[str, Any] = {"max_steps": 3, "dropout": 0.0, "batch_blocks": 3, "learning_rate": 1e-3}
    train(settings(cache, teacher, tmp_path / "one", accumulate=2, **shared), quiet=True)
    two = settings(cache, teacher, tmp_path / "two", strategy=strategy, **shared)
    on_ranks(2, lambda _: train(two, quiet=True))
    ours, theirs = weights_of(tmp_path / "one"), weights_of(two.out)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_a_trainer_of_ones_own_has_the_loss_of_our_loop(tmp_path: Path, cache: Path, teacher: Path) -> None:
    config = settings(cache, teacher, tmp_path / "run", max_steps=2, dropout=0.0, batch_blocks=4, accumulate=2)
    config = config.model_copy(update={"kl_positions": "masked", "seed": 3, "warmup": 0.0, "schedule": "constant"})
    train(config, quiet=True)
    reader = CacheReader.open(cache)
    weights = LossWeights(kl=config.kl_weight, ce=config.ce_weight, cosine=config.cosine_weight)
    student = first_student(config, reader).model
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        logging_steps=1,
        seed=3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = KDTrainer(
        Distiller.of_cache(reader, student, weights=weights, temperature=2.0),
        arguments,
        train_dataset=CacheDataset(cache, temperature=2.0, masked_only=True),
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    ours = [line["loss"] for line in metric_lines(config.out) if "loss" in line]
    assert theirs == pytest.approx(ours, rel=1e-3)
