"""Whole training runs on a tiny cache: resume is bitwise, interruption is safe, and what does not fit is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as untyped_logging

from cache_spec.errors import EXIT_FAILED, BadInputError, CacheError, KdpipeError, WouldLoseDataError
from cache_spec.reader import CacheReader
from tests.runs import (
    BLOCKS,
    TOKENS,
    assert_same_run,
    metric_lines,
    run_settings,
    save_run_cache,
    save_run_teacher,
    weights_of,
)
from train.batches import READ_AHEAD, MicroBatch, StepPlan, ahead, micro_batches
from train.checkpoint import load_latest
from train.config import TrainConfig
from train.distiller import Distiller
from train.loop import train
from train.memory import out_of_memory_at
from train.planning import plan
from train.run import pick_device, pick_precision
from train.run_files import CheckpointError

transformers_logging: Any = untyped_logging


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models on a busy machine: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return save_run_cache(tmp_path_factory.mktemp("cache"), teacher)


@pytest.fixture
def settings(cache: Path, teacher: Path, tmp_path: Path) -> dict[str, Any]:
    return run_settings(cache, teacher, tmp_path / "run")


class Killed(BaseException):
    """What nothing catches."""


class StopAt:
    """Raises a signal, or an error that nobody expects, when the loop asks for a micro-batch of a step."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how, self.fired = step, how, False

    def __call__(self, items: Iterator[MicroBatch], depth: int = READ_AHEAD) -> Iterator[MicroBatch]:
        inner = ahead(items, depth)
        try:
            for item in inner:
                if item.step == self.step and not self.fired:
                    self.fired = True
                    if self.how == "kill":
                        raise Killed
                    os.kill(os.getpid(), getattr(signal, self.how))
                yield item
        finally:
            inner.close()


@pytest.mark.parametrize(("how", "step"), [("SIGINT", 0), ("SIGTERM", 4), ("kill", 2), ("kill", 10)])
def test_an_interrupted_and_resumed_run_is_bitwise_the_uninterrupted_one(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, step: int
) -> None:
    whole = settings | {"out": tmp_path / "whole"}
    result = train(TrainConfig(**whole), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.ahead", StopAt(step, how))
        with pytest.raises(Killed if how == "kill" else KeyboardInterrupt):
            train(TrainConfig(**settings), quiet=True)
    kept = load_latest(settings["out"] / "checkpoints")
    if how == "kill":
        assert (kept.position.step if kept else 0) == step // 3 * 3
    else:
        assert kept is not None
        assert kept.position.step == step
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    torch.manual_seed(12345)
    resumed = train(TrainConfig(**settings), quiet=True)
    assert_same_run(tmp_path / "whole", settings["out"])
    assert {k: v for k, v in resumed.items() if "second" not in k and k != "tokens_per_s"} == {
        k: v for k, v in result.items() if "second" not in k and k != "tokens_per_s"
    }


def test_a_run_takes_every_token_of_every_epoch_and_exports(settings: dict[str, Any]) -> None:
    result = train(TrainConfig(**settings), quiet=True)
    assert result["steps"] == 12
    assert result["tokens"] == 2 * (BLOCKS * TOKENS - 3)
    assert json.loads((settings["out"] / "result.json").read_text()) == result
    last = json.loads((settings["out"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["last_step"] == {name: last[name] for name in ("loss", "kl", "ce", "cosine")}
    assert not result.keys() & result["last_step"].keys()
    model = AutoModelForCausalLM.from_pretrained(settings["out"] / "student")
    assert model.config.n_layer == 2
    assert model.num_parameters() == result["parameters"]
    assert not any(t.name == "kdpipe-read-ahead" for t in threading.enumerate())


def test_resume_needs_no_teacher_at_all(
    settings: dict[str, Any], tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    settings |= {"teacher": str(moved)}
    monkeypatch.setattr("train.loop.ahead", StopAt(4, "SIGINT"))
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings), quiet=True)
    shutil.rmtree(moved)
    assert train(TrainConfig(**settings), quiet=True)["steps"] == 12


def test_a_finished_run_does_nothing(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    result = train(TrainConfig(**settings), quiet=True)
    before = {path: path.stat().st_mtime_ns for path in settings["out"].rglob("*") if path.name != ".lock"}
    with caplog.at_level("INFO", logger="kdpipe"):
        assert train(TrainConfig(**settings), quiet=True) == result
    assert "finished already" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in settings["out"].rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize(
    "lost",
    [
        lambda out: shutil.rmtree(out / "student"),
        lambda out: (out / "student" / "model.safetensors").unlink(),
        lambda out: (out / "result.json").write_text("{}"),
        lambda out: (out / "result.json").write_text('{"steps": 12'),
    ],
)
def test_a_lost_export_or_result_is_made_again(settings: dict[str, Any], lost: Callable[[Path], object]) -> None:
    train(TrainConfig(**settings), quiet=True)
    before = weights_of(settings["out"])
    before_result = json.loads((settings["out"] / "result.json").read_text())
    lost(settings["out"])
    assert train(TrainConfig(**settings), quiet=True) == before_result
    assert json.loads((settings["out"] / "result.json").read_text()) == before_result
    assert all(torch.equal(t, before[n]) for n, t in weights_of(settings["out"]).items())


def test_micro_batching_does_not_change_the_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for number, (batch, accumulate) in enumerate([(8, 1), (4, 2), (1, 8)]):
        out = tmp_path / f"run{number}"
        changed = {"batch_blocks": batch, "accumulate": accumulate, "dropout": 0.0, "out": out, "max_steps": 3}
        train(TrainConfig(**(settings | changed)), quiet=True)
        runs.append(metric_lines(out))
    for other in runs[1:]:
        for line, reference in zip(other, runs[0], strict=True):
            assert line == pytest.approx(reference, rel=2e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"seed": 7}, "seed"),
        ({"precision": "bf16"}, "precision"),
        ({"max_steps": 5}, "max_steps"),
        ({"max_tokens": 99}, "max_tokens"),
        ({"accumulate": 3}, "step_blocks"),
    ],
)
def test_other_settings_are_refused_on_resume(settings: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    train(TrainConfig(**settings), quiet=True)
    with pytest.raises(WouldLoseDataError, match=said):
        train(TrainConfig(**(settings | changes)), quiet=True)


def test_harmless_settings_may_change(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings), quiet=True)
    train(TrainConfig(**(settings | {"log_every": 7, "checkpoint_every": 1, "precision": "fp32"})), quiet=True)


def test_a_folder_of_something_else_is_refused(settings: dict[str, Any]) -> None:
    settings["out"].mkdir()
    (settings["out"] / "thesis.tex").write_text("years of work")
    with pytest.raises(WouldLoseDataError, match=r"thesis\.tex"):
        train(TrainConfig(**settings), quiet=True)
    assert [path.name for path in settings["out"].iterdir()] == ["thesis.tex"]


def test_a_run_folder_is_held_by_one_training(settings: dict[str, Any]) -> None:
    from filelock import FileLock

    settings["out"].mkdir()
    with FileLock(settings["out"] / ".lock"), pytest.raises(WouldLoseDataError, match="run-in-use"):
        train(TrainConfig(**settings), quiet=True)


def test_an_undeclared_temperature_is_refused_before_anything_is_written(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match="undeclared-temperature"):
        train(TrainConfig(**(settings | {"temperature": 3.0})), quiet=True)
    assert not settings["out"].exists()


def test_non_finite_loss_stops_before_the_optimizer(settings: dict[str, Any]) -> None:
    with pytest.raises(KdpipeError, match=r"non-finite-loss: step \d+.*blocks \d+"):
        train(TrainConfig(**(settings | {"learning_rate": 1e30, "max_grad_norm": 1e30})), quiet=True)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"device": "tpu9"}, "no-such-device"), ({"device": "cuda:77"}, "no-such-device")],
)
def test_devices_that_are_not_there_are_refused(settings: dict[str, Any], changes: dict[str, Any], kind: str) -> None:
    with pytest.raises(BadInputError, match=kind):
        train(TrainConfig(**(settings | changes)), quiet=True)


def test_bf16_trains_and_keeps_fp32_weights(settings: dict[str, Any]) -> None:
    train(TrainConfig(**(settings | {"precision": "bf16", "max_steps": 4})), quiet=True)
    assert {tensor.dtype for tensor in weights_of(settings["out"]).values()} == {torch.float32}


def test_a_wider_student_of_another_family_is_projected_and_resumes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {
        "student": "config",
        "num_layers": 1,
        "dropout": 0.2,
        "student_config": {
            "model_type": "llama",
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 16,
        },
    }
    train(TrainConfig(**(settings | {"out": tmp_path / "whole"})), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.ahead", StopAt(5, "kill"))
        with pytest.raises(Killed):
            train(TrainConfig(**settings), quiet=True)
    train(TrainConfig(**settings), quiet=True)
    assert_same_run(tmp_path / "whole", settings["out"])
    assert not any("projection" in name for name in weights_of(settings["out"]))


def test_a_finished_student_is_a_checkpoint_to_go_on_from(settings: dict[str, Any], tmp_path: Path) -> None:
    train(TrainConfig(**settings), quiet=True)
    again = settings | {
        "student": "checkpoint",
        "checkpoint": str(settings["out"] / "student"),
        "num_layers": None,
        "out": tmp_path / "again",
        "max_steps": 2,
    }
    train(TrainConfig(**again), quiet=True)


def test_frozen_positions_stay(settings: dict[str, Any], teacher: Path) -> None:
    train(TrainConfig(**(settings | {"freeze_position_embeddings": True, "weight_decay": 0.1})), quiet=True)
    name = "transformer.wpe.weight"
    ours = weights_of(settings["out"])
    theirs = load_file(teacher / "model.safetensors")
    assert torch.equal(ours[name], theirs[name])
    assert not torch.equal(ours["transformer.wte.weight"], theirs["transformer.wte.weight"])


def test_a_damaged_checkpoint_is_never_started_over(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.ahead", StopAt(4, "SIGINT"))
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**settings), quiet=True)
    file = settings["out"] / "checkpoints" / "step-00000004" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged-checkpoint"):
        train(TrainConfig(**settings), quiet=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "{ not json\n"),
        ("student_config/config.json", "{ not json\n"),
        ("student_config/config.json", '{"model_type": "gpt2", "n_embd": 0, "n_head": 0}'),
        ("metrics.jsonl", "{ not json\n"),
        ("metrics.jsonl", "5\n"),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", '{"step": "1"}\n'),
    ],
)
def test_damaged_run_files_are_one_line(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.ahead", StopAt(4, "SIGINT"))
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**settings), quiet=True)
    (settings["out"] / name).write_text(text)
    with pytest.raises(CheckpointError, match="damaged-run") as caught:
        train(TrainConfig(**settings), quiet=True)
    assert "\n" not in str(caught.value)


def test_a_broken_shard_reaches_the_training_thread(settings: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "cache"
    shutil.copytree(cache, broken)
    shard = next((broken / "head_ids").glob("c.*"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError):
        train(TrainConfig(**(settings | {"cache": broken})), quiet=True)
    assert not any(thread.name == "kdpipe-read-ahead" for thread in threading.enumerate())


def test_tensorboard_is_written_and_purged(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings |= {"tensorboard": True}
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.ahead", StopAt(5, "kill"))
        with pytest.raises(Killed):
            train(TrainConfig(**settings), quiet=True)
    train(TrainConfig(**settings), quiet=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(settings["out"] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


def test_batches_of_a_resumed_plan_are_those_of_the_whole(cache: Path) -> None:
    reader = CacheReader.open(cache)
    steps = StepPlan(num_blocks=BLOCKS, batch_blocks=3, accumulate=2, epochs=3)
    assert (steps.steps_per_epoch, steps.total_steps) == (4, 12)
    whole = list(micro_batches(reader, steps, first_step=0, temperature=1.0, seed=3, window_shards=2))
    for first in (1, 4, 7):
        rest = list(micro_batches(reader, steps, first_step=first, temperature=1.0, seed=3, window_shards=2))
        wanted = [micro for micro in whole if micro.step >= first]
        assert len(rest) == len(wanted)
        for ours, theirs in zip(rest, wanted, strict=True):
            np.testing.assert_array_equal(ours.blocks, theirs.blocks)
            assert torch.equal(ours.batch.input_ids_BT, theirs.batch.input_ids_BT)
            assert (ours.step, ours.epoch, ours.counts, ours.ends_step) == (
                theirs.step,
                theirs.epoch,
                theirs.counts,
                theirs.ends_step,
            )
    for epoch in range(3):
        blocks = np.concatenate([micro.blocks for micro in whole if micro.epoch == epoch])
        assert sorted(blocks.tolist()) == list(range(BLOCKS))
    last = [micro for micro in whole if micro.step == 3]
    assert sum(len(micro.blocks) for micro in last) == 4
    lengths = reader.lengths(np.concatenate([micro.blocks for micro in last])).astype(int)
    assert last[0].counts.kl_tokens == lengths.sum()
    assert last[0].counts.ce_tokens == (lengths - 1).sum()
    assert last[0].counts.hidden_windows == (-(-lengths // 4)).sum()


def test_closing_stops_the_thread_and_errors_come_in_order() -> None:
    def items() -> Iterator[Any]:
        yield from range(3)
        raise ValueError("here")

    got: list[Any] = []
    with pytest.raises(ValueError, match="here"):
        got.extend(ahead(items()))
    assert got == [0, 1, 2]

    def endless() -> Iterator[Any]:
        number = 0
        while True:
            yield (number := number + 1)

    stream = ahead(endless())
    next(stream)
    stream.close()
    assert not any(thread.name == "kdpipe-read-ahead" for thread in threading.enumerate())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_sigkill_at_any_moment_resumes_bitwise(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"epochs": 8, "checkpoint_every": 2}
    train(TrainConfig(**(settings | {"out": tmp_path / "whole"})), quiet=True)
    fork = multiprocessing.get_context("fork")
    kills = 0
    for extra in (0.0, 0.1, 0.05):
        process = fork.Process(target=train, args=(TrainConfig(**settings),), kwargs={"quiet": True})
        process.start()
        deadline = time.monotonic() + 60
        before = sorted((settings["out"] / "checkpoints").glob("step-*")) if settings["out"].exists() else []
        while process.is_alive() and time.monotonic() < deadline:
            now = sorted((settings["out"] / "checkpoints").glob("step-*")) if settings["out"].exists() else []
            if now != before:
                break
            time.sleep(0.002)
        time.sleep(extra)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills
    train(TrainConfig(**settings), quiet=True)
    assert_same_run(tmp_path / "whole", settings["out"])


def test_precision_follows_the_device() -> None:
    assert pick_precision("auto", torch.device("cpu")) == "fp32"
    assert pick_device("cpu").type == "cpu"


def test_bf16_that_a_device_only_emulates_is_for_those_who_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert pick_precision("auto", torch.device("cuda")) == "fp32"
    assert pick_precision("bf16", torch.device("cuda")) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert pick_precision("auto", torch.device("cuda")) == "bf16"


def test_a_plan_writes_nothing_and_tells_the_cost(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = plan(TrainConfig(**settings))
    assert (facts["steps"], facts["steps_done"], facts["tokens_to_train"]) == (12, 0, 2 * (BLOCKS * TOKENS - 3))
    assert facts["checkpoint_bytes"] == 12 * facts["parameters"]
    assert not settings["out"].exists()
    monkeypatch.setattr("train.loop.ahead", StopAt(4, "SIGINT"))
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings), quiet=True)
    assert plan(TrainConfig(**settings))["steps_done"] == 4
    with pytest.raises(WouldLoseDataError):
        plan(TrainConfig(**(settings | {"seed": 3})))


def test_a_plan_in_a_place_of_something_else_is_refused_as_the_run_is(settings: dict[str, Any]) -> None:
    settings["out"].write_text("years of work")
    for start in (plan, train):
        with pytest.raises(WouldLoseDataError, match="not-a-run"):
            start(TrainConfig(**settings))


@pytest.fixture
def weights_stay_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads a file of weights, here and in the libraries, raises."""

    def never(*args: object, **kwargs: object) -> None:
        raise OpenedError(f"weights were opened: {args}")

    ours = ["train.teacher_layers.safe_open", "train.teacher_layers.snapshot_download", "train.checkpoint.load_file"]
    theirs = ["safetensors.safe_open", "safetensors.torch.load_file", "torch.load"]
    for name in [*ours, "train.student.snapshot_download", "transformers.modeling_utils.safe_open", *theirs]:
        monkeypatch.setattr(name, never)
    monkeypatch.setattr("train.loop.export_student", lambda *args, **kwargs: None)  # an export reads itself back


class OpenedError(BaseException):
    """What no handler takes for a user's fault."""


@pytest.mark.usefixtures("weights_stay_shut")
def test_no_teacher_weight_is_ever_read(settings: dict[str, Any]) -> None:
    """A student that starts fresh needs the cache alone: there is no teacher to find, and no weights are opened."""
    del settings["teacher"]
    settings |= {"student": "config", "num_layers": 1}
    assert train(TrainConfig(**settings))["steps"] > 0


@pytest.mark.usefixtures("weights_stay_shut")
def test_the_guard_against_reading_weights_sees_copied_layers_and_checkpoints(
    settings: dict[str, Any], teacher: Path
) -> None:
    with pytest.raises(OpenedError):
        train(TrainConfig(**settings))
    changes: dict[str, Any] = {"student": "checkpoint", "checkpoint": str(teacher), "num_layers": None}
    with pytest.raises(OpenedError):
        train(TrainConfig(**(settings | changes)))


# --- starts that fail

MAMBA = {"model_type": "mamba", "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"student_config": MAMBA, "dropout": 0.1}, "no-dropout"),
        ({"student_config": MAMBA, "dropout": None, "freeze_position_embeddings": True}, "no-position-embeddings"),
    ],
)
@pytest.mark.parametrize("start", [plan, train])
def test_a_student_that_lacks_what_a_setting_is_for_is_refused_before_anything_is_written(
    settings: dict[str, Any], changes: dict[str, Any], kind: str, start: Callable[[TrainConfig], object]
) -> None:
    del settings["num_layers"]
    with pytest.raises(BadInputError, match=kind):
        start(TrainConfig(**(settings | {"student": "config", **changes})))
    assert not settings["out"].exists() or [path.name for path in settings["out"].iterdir()] == [".lock"]


@pytest.mark.parametrize("how", ["out of memory", "not finite"])
def test_a_start_that_failed_does_not_stand_in_the_way_of_the_corrected_command(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    failing = settings | {"student": "config", "batch_blocks": 8, "log_every": 2}
    if how == "not finite":
        failing |= {"learning_rate": 1e30, "max_grad_norm": 1e30}
    with monkeypatch.context() as patch:
        if how == "out of memory":
            patch.setattr("train.distiller.Distiller.forward", allocate_a_petabyte)
        with pytest.raises(KdpipeError):
            train(TrainConfig(**failing), quiet=True)
    assert (settings["out"] / "run.json").is_file()
    plan(TrainConfig(**settings))
    train(TrainConfig(**settings), quiet=True)
    train(TrainConfig(**(settings | {"out": tmp_path / "fresh"})), quiet=True)
    assert_same_run(tmp_path / "fresh", settings["out"])
    with pytest.raises(WouldLoseDataError, match="other-settings"):
        train(TrainConfig(**failing), quiet=True)


def allocate_a_petabyte(*_: object) -> None:
    torch.empty(1 << 50)


@pytest.mark.parametrize("start", [plan, train])
@pytest.mark.parametrize("where", ["train.distiller.Distiller.forward", "train.student.model_of_tensors"])
def test_out_of_memory_is_one_line_anywhere(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, start: Callable[[TrainConfig], object], where: str
) -> None:
    monkeypatch.setattr(where, allocate_a_petabyte)
    with pytest.raises(KdpipeError, match="allocate memory") as caught:
        start(TrainConfig(**settings))
    assert (caught.value.kind, caught.value.exit_code) == ("out-of-memory", EXIT_FAILED)
    assert "\n" not in str(caught.value)


def test_an_allocation_that_another_handler_caught_is_out_of_memory_and_nothing_else_is() -> None:
    def build_in_vain() -> None:
        try:
            allocate_a_petabyte()
        except RuntimeError:
            raise BadInputError("bad-student-config", "forward pass") from None

    with pytest.raises(KdpipeError, match=r"out-of-memory: here.*half of it"), out_of_memory_at("here", "half of it"):
        build_in_vain()
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_at("here"):
        raise RuntimeError("shape")


def test_how_the_student_is_built_is_durable_before_the_first_checkpoint(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    real_fsync, folder = os.fsync, settings["out"] / "student_config"

    def fsync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("train.loop.ahead", StopAt(0, "kill"))
    with pytest.raises(Killed):
        train(TrainConfig(**settings), quiet=True)
    paths = [folder, folder / "config.json", folder / "generation_config.json"]
    assert {path.stat().st_ino for path in paths} <= synced


def test_advice_of_transformers_stays_off_the_terminal(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real_forward = Distiller.forward

    def forward(*args: Any) -> Any:
        seen.append(transformers_logging.get_verbosity())
        return real_forward(*args)

    monkeypatch.setattr(Distiller, "forward", forward)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        plan(TrainConfig(**settings))
        train(TrainConfig(**(settings | {"max_steps": 1})), quiet=True)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        transformers_logging.set_verbosity(before)
    assert set(seen) == {transformers_logging.ERROR}
