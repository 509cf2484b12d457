"""Activation checkpointing and compiled students: less memory or time, and the same student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cache_spec.errors import BadInputError, KdpipeError
from tests.runs import assert_same_run, metric_lines, run_settings, save_run_cache, save_run_teacher
from train.config import TrainConfig
from train.loop import train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return save_run_cache(tmp_path_factory.mktemp("cache"), teacher)


@pytest.fixture
def settings(cache: Path, teacher: Path, tmp_path: Path) -> dict[str, Any]:
    return run_settings(cache, teacher, tmp_path / "run") | {"max_steps": 4}


def test_activation_checkpointing_computes_layers_twice_and_gives_the_same_student(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout included: what a layer left out, it leaves out again."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    calls = 0
    real_forward = GPT2MLP.forward

    def forward(*args: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return real_forward(*args)

    monkeypatch.setattr(GPT2MLP, "forward", forward)
    settings |= {"evaluate_cache": settings["cache"]}
    train(TrainConfig(**(settings | {"out": tmp_path / "plain"})), quiet=True)
    plain, calls = calls, 0
    train(TrainConfig(**(settings | {"activation_checkpointing": True})), quiet=True)
    assert_same_run(tmp_path / "plain", settings["out"])
    assert calls == 2 * plain > 0


def test_a_student_without_activation_checkpointing_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.GPT2LMHeadModel.supports_gradient_checkpointing", False)
    monkeypatch.setattr("transformers.GPT2Model.supports_gradient_checkpointing", False)
    with pytest.raises(BadInputError, match="no-activation-checkpointing: GPT2LMHeadModel"):
        train(TrainConfig(**(settings | {"activation_checkpointing": True})), quiet=True)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own imports
def test_a_compiled_student_learns_the_same(
    settings: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    monkeypatch.setattr("train.student_modes.COMPILE_BACKEND", backend)
    settings |= {"dropout": 0.0, "evaluate_cache": cache, "evaluate_every": 2}
    train(TrainConfig(**(settings | {"out": tmp_path / "plain"})), quiet=True)
    assert graphs == 0
    train(TrainConfig(**(settings | {"compile": True})), quiet=True)
    assert graphs > 0
    for ours, theirs in zip(metric_lines(settings["out"]), metric_lines(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own imports
def test_a_compiler_that_fails_is_one_line(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: object) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("train.student_modes.COMPILE_BACKEND", backend)
    with pytest.raises(KdpipeError, match=r"cannot-compile.*no compiler here") as caught:
        train(TrainConfig(**(settings | {"compile": True})), quiet=True)
    assert "\n" not in str(caught.value)
