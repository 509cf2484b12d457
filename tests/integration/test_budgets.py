"""Budgets, evaluation while training, and checkpoints in the background: what stops a run, and what it tells."""

from __future__ import annotations

import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.reader import CacheReader
from tests.runs import (
    assert_same_run,
    metric_lines,
    run_settings,
    save_run_cache,
    save_run_teacher,
    weights_of,
)
from train import checkpoint, steps
from train.budget import schedule_step
from train.checkpoint import load_latest
from train.config import TrainConfig
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import evaluate_models
from train.loop import train
from train.run import step_plan

LENGTHS = [8, 3, 1, 7, 8, 5, 2, 8, 6, 4, 1, 8, 8, 2, 5, 7, 3, 8, 1, 6, 4, 5]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return save_run_cache(tmp_path_factory.mktemp("cache"), teacher, lengths=LENGTHS)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return save_run_cache(tmp_path_factory.mktemp("held-out"), teacher, seed=5)


@pytest.fixture
def settings(cache: Path, teacher: Path, tmp_path: Path) -> dict[str, Any]:
    return run_settings(cache, teacher, tmp_path / "run")


# --- tokens


@pytest.mark.parametrize("max_tokens", [1, 20, sum(LENGTHS), sum(LENGTHS) + 1, sum(LENGTHS) + 40, 10**6])
def test_a_budget_of_tokens_ends_with_the_step_that_reaches_it(settings: dict[str, Any], max_tokens: int) -> None:
    settings |= {"accumulate": 1, "dropout": 0.0, "schedule": "linear", "warmup": 0.0, "checkpoint_every": 100}
    result = train(TrainConfig(**(settings | {"max_tokens": max_tokens})), quiet=True)
    lines = metric_lines(settings["out"])
    if max_tokens == 10**6:
        assert (result["stopped_by"], result["tokens"]) == ("epochs", 2 * sum(LENGTHS))
        return
    assert result["stopped_by"] == "max_tokens"
    assert lines[-1]["tokens"] >= max_tokens
    assert all(line["tokens"] < max_tokens for line in lines[:-1])
    # The schedule knows: its last step is one step above zero.
    assert lines[-1]["lr"] == pytest.approx(6e-4 / len(lines))


def test_a_budget_of_tokens_counts_what_all_ranks_take(settings: dict[str, Any]) -> None:
    reader = CacheReader.open(settings["cache"])
    one = TrainConfig(**(settings | {"batch_blocks": 1, "accumulate": 4, "max_tokens": 60}))
    two = one.model_copy(update={"accumulate": 2})
    assert step_plan(two, reader, 2).total_steps == step_plan(one, reader).total_steps > 1


# --- hours


class Clock:
    """Time that passes by an hour whenever a step asks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        self.seconds += 3600.0
        return self.seconds


def test_a_budget_of_hours_stops_early_with_a_student_and_says_so(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.loop.time", types.SimpleNamespace(perf_counter=Clock().perf_counter))
    settings |= {"warmup": 0.0}
    result = train(TrainConfig(**(settings | {"max_hours": 4.5})), quiet=True)
    assert (result["stopped_by"], result["steps"], result["seconds"]) == ("max_hours", 5, 5 * 3600.0)
    kept = load_latest(settings["out"] / "checkpoints")
    assert kept is not None
    assert kept.position.step == 5
    assert "stopped by | max_hours" in (settings["out"] / "student" / "README.md").read_text()
    # The rate follows the clock: a step of 12 takes more than a fifth of the hours.
    rates = [line["lr"] for line in metric_lines(settings["out"])]
    assert rates == pytest.approx([6e-4 * (1 - int(12 * hours / 4.5) / 12) for hours in range(5)])
    # The hours are spent, whoever asks again; more of them are something to do, and those before count.
    assert train(TrainConfig(**(settings | {"max_hours": 4.5})), quiet=True) == result
    more = train(TrainConfig(**(settings | {"max_hours": 7.0})), quiet=True)
    assert (more["stopped_by"], more["steps"], more["seconds"]) == ("max_hours", 7, 7 * 3600.0)
    assert train(TrainConfig(**settings), quiet=True)["stopped_by"] == "epochs"


def test_the_schedule_follows_whichever_is_further() -> None:
    assert schedule_step(7, 100, seconds=1e9, max_hours=None) == 7
    assert schedule_step(7, 100, seconds=1800, max_hours=1.0) == 50
    assert schedule_step(70, 100, seconds=1800, max_hours=1.0) == 70
    assert schedule_step(70, 100, seconds=1e9, max_hours=1.0) == 99


# --- evaluation while training


def test_evaluation_changes_nothing_and_is_what_evaluate_says_of_the_student(
    settings: dict[str, Any], tmp_path: Path, held_out: Path
) -> None:
    train(TrainConfig(**(settings | {"out": tmp_path / "plain"})), quiet=True)
    watched = {"evaluate_cache": held_out, "evaluate_every": 5, "tensorboard": True}
    result = train(TrainConfig(**(settings | watched)), quiet=True)
    plain, ours = weights_of(tmp_path / "plain"), weights_of(settings["out"])
    assert all(torch.equal(tensor, plain[name]) for name, tensor in ours.items())
    lines = metric_lines(settings["out"])
    assert [line for line in lines if "loss" in line] == metric_lines(tmp_path / "plain")
    found = [line for line in lines if "evaluate/loss" in line]
    assert [line["step"] for line in found] == [5, 10, 12]
    assert found[0]["evaluate/loss"] != found[-1]["evaluate/loss"]
    asked = EvaluateConfig(
        models=(str(settings["out"] / "student"),), cache=held_out, temperature=2.0, batch_blocks=2, device="cpu"
    )
    measured = evaluate_models(asked, quiet=True)[0]["cache"]
    last = {"loss": "loss_nats", "kl": "kl_to_teacher", "agreement": "agreement", "ece": "ece"}
    assert result["evaluation"] == pytest.approx({name: measured[key] for name, key in last.items()}, rel=1e-6)
    card = (settings["out"] / "student" / "README.md").read_text()
    manifest = CacheReader.open(settings["cache"]).manifest
    assert "## Evaluation on held-out text" in card
    for name, value in {
        "teacher": manifest.teacher.name,
        "cache fingerprint": manifest.fingerprint,
        "encoding": manifest.encoding.name,
        "temperature": "2",
        "kl_weight": "0.9",
        "cosine_weight": "0.5",
        "kl": f"{result['evaluation']['kl']:.6g}",
    }.items():
        assert f"\n| {name} | {value}" in card
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(settings["out"] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("evaluate/agreement")] == [5, 10, 12]


def test_a_held_out_cache_of_another_teacher_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = save_run_teacher(tmp_path / "other", seed=2)
    foreign = save_run_cache(tmp_path / "foreign", other)
    with pytest.raises(BadInputError, match=r"evaluate-cache.*same teacher"):
        train(TrainConfig(**(settings | {"evaluate_cache": foreign})), quiet=True)
    assert not settings["out"].exists()


# --- checkpoints in the background


def test_checkpoints_in_the_background_are_those_of_the_moment(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk: the weights move on while a checkpoint is written, and it holds those of its step."""
    train(TrainConfig(**(settings | {"out": tmp_path / "at-once", "async_checkpoint": False, "max_steps": 3})))
    real_write = checkpoint._write_tensors
    moved = threading.Event()

    def slow(*args: Any) -> None:
        assert threading.current_thread().name == "kdpipe-checkpoint"
        assert moved.wait(30)
        real_write(*args)

    real_step, taken = steps._next_micro, []

    def counting(*args: Any) -> Any:
        micro = real_step(*args)
        taken.append(micro.step)
        if micro.step == 5:
            moved.set()
        return micro

    kept: list[dict[str, torch.Tensor]] = []
    real_publish = checkpoint.publish

    def publish(folder: Path, snapshot: checkpoint.Snapshot) -> Path:
        path = real_publish(folder, snapshot)
        loaded = load_latest(folder)
        assert loaded is not None
        kept.append({name: tensor.clone() for name, tensor in loaded.tensors.items()})
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tensors", slow)
        patch.setattr(steps, "_next_micro", counting)
        patch.setattr("train.writer.publish", publish)
        train(TrainConfig(**settings), quiet=True)
    whole = settings | {"out": tmp_path / "whole", "async_checkpoint": False, "checkpoint_every": 100}
    train(TrainConfig(**whole), quiet=True)
    assert_same_run(tmp_path / "whole", settings["out"])
    stopped = settings | {"out": tmp_path / "stopped", "async_checkpoint": False}
    with monkeypatch.context() as patch:
        patch.setattr("train.writer.publish", stop_after(checkpoint.publish))
        with pytest.raises(StopHere):
            train(TrainConfig(**stopped), quiet=True)
    wanted = load_latest(tmp_path / "stopped" / "checkpoints")
    assert wanted is not None
    assert wanted.position.step == 3
    assert kept[0].keys() == wanted.tensors.keys()
    assert all(torch.equal(kept[0][name], tensor) for name, tensor in wanted.tensors.items())


class StopHere(BaseException):
    """What nothing catches."""


def stop_after(publish: Any) -> Any:
    def once(*args: Any) -> None:
        publish(*args)
        raise StopHere

    return once


def test_a_failed_write_in_the_background_fails_the_next_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = checkpoint._write_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        real_write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tensors", full)
        with pytest.raises(KdpipeError, match="No space left"):
            train(TrainConfig(**settings), quiet=True)
    assert [path.name for path in (settings["out"] / "checkpoints").iterdir()] == ["step-00000003"]
    assert not any(thread.name == "kdpipe-checkpoint" for thread in threading.enumerate())
    assert metric_lines(settings["out"])[-1]["step"] < 12
    assert train(TrainConfig(**settings), quiet=True)["steps"] == 12


# --- Weights & Biases


def test_metrics_go_to_wandb_where_it_is_installed_and_named(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any, Any]] = []
    stub = types.SimpleNamespace(
        log=lambda values, step: calls.append(("log", values, step)),
        finish=lambda: calls.append(("finish", None, None)),
    )

    def init(**given: Any) -> Any:
        calls.append(("init", given, None))
        return stub

    module: Any = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    train(TrainConfig(**(settings | {"wandb": "distillation", "max_steps": 3})), quiet=True)
    assert calls[0][0] == "init"
    assert (calls[0][1]["project"], calls[0][1]["resume"]) == ("distillation", "allow")
    assert calls[0][1]["config"]["learning_rate"] == 6e-4
    assert [(name, step) for name, _, step in calls[1:]] == [("log", 1), ("log", 2), ("log", 3), ("finish", None)]
    assert {"train/loss", "train/lr"} <= calls[1][1].keys()


def test_wandb_that_is_not_installed_is_one_line(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(BadInputError, match=r"missing-package: wandb.*kdpipe\[wandb\]"):
        train(TrainConfig(**(settings | {"wandb": "distillation"})), quiet=True)
