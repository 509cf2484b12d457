"""The settings of a training run: every check fires, every field explains itself, and torch stays out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from train.config import CHANGEABLE_ON_RESUME, TrainConfig

PATHS: dict[str, Any] = {"cache": Path("cache"), "out": Path("run")}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"unknown_key": 1}, "unknown_key"),
        ({"student": "distilled"}, "student"),
        ({"num_layers": 0}, "num_layers"),
        ({"layer_indices": ()}, "at least one layer"),
        ({"layer_indices": (0, -1)}, "count from 0"),
        ({"layer_indices": (0, 2, 2)}, "ascending"),
        ({"layer_indices": (3, 1)}, "ascending"),
        ({"num_layers": 2, "layer_indices": (0, 1)}, "not both"),
        ({"student": "checkpoint"}, "needs checkpoint"),
        ({"checkpoint": "folder"}, "means nothing"),
        ({"student": "config", "checkpoint": "folder"}, "means nothing"),
        ({"student": "checkpoint", "checkpoint": ""}, "checkpoint"),
        ({"student": "config", "layer_indices": (0,)}, "layer_indices means nothing"),
        ({"student": "checkpoint", "checkpoint": "x", "num_layers": 2}, "num_layers means nothing"),
        ({"student": "checkpoint", "checkpoint": "x", "student_config": {}}, "student_config means nothing"),
        ({"student": "checkpoint", "checkpoint": "x", "initializer_range": 0.1}, "initializer_range means nothing"),
        ({"num_layers": 2, "initializer_range": 0.1}, "initializer_range means nothing"),
        ({"teacher": ""}, "teacher"),
        ({"initializer_range": 0.0}, "initializer_range"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": 1.0}, "dropout"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"kl_weight": float("nan")}, "kl_weight"),
        ({"ce_weight": -1.0}, "ce_weight"),
        ({"cosine_weight": -1.0}, "cosine_weight"),
        ({"mse_weight": -1.0}, "mse_weight"),
        ({"kl_weight": 0.0, "ce_weight": 0.0}, "every loss weight is zero"),
        ({"hidden_centre": True}, "hidden_centre means nothing"),
        ({"tail": "ghost"}, "tail"),
        ({"divergence": "backward"}, "divergence"),
        ({"divergence": "js", "js_beta": 0.0}, "js_beta"),
        ({"divergence": "js", "js_beta": 1.0}, "js_beta"),
        ({"js_beta": 0.5}, "js_beta means nothing"),
        ({"epochs": 0}, "epochs"),
        ({"max_steps": 0}, "max_steps"),
        ({"batch_blocks": 0}, "batch_blocks"),
        ({"accumulate": 0}, "accumulate"),
        ({"window_shards": 0}, "window_shards"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"schedule": "step"}, "schedule"),
        ({"warmup": -0.1}, "warmup"),
        ({"schedule": "wsd", "cooldown": 0.0}, "cooldown"),
        ({"schedule": "wsd", "cooldown": 0.6, "warmup": 0.5}, "overlap"),
        ({"cooldown": 0.2}, "cooldown means nothing"),
        ({"kl_schedule": "cosine"}, "none of constant"),
        ({"kl_schedule": "linear:1"}, "none of constant"),
        ({"ce_schedule": "linear:1:-1"}, "none of constant"),
        ({"ce_schedule": "linear:0:0"}, "none of constant"),
        ({"hidden_schedule": "first:0"}, "none of constant"),
        ({"hidden_schedule": "first:x"}, "none of constant"),
        ({"hidden_schedule": "linear:1:0:2"}, "none of constant"),
        ({"hidden_schedule": "wsd:1"}, "none of constant"),
        ({"warmup": 1.1}, "warmup"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"adam_beta1": 1.0}, "adam_beta1"),
        ({"adam_beta2": 1.0}, "adam_beta2"),
        ({"adam_epsilon": 0.0}, "adam_epsilon"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"seed": -1}, "seed"),
        ({"device": ""}, "device"),
        ({"precision": "fp16"}, "precision"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"log_every": 0}, "log_every"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_hours": 0.0}, "max_hours"),
        ({"strategy": "zero"}, "strategy"),
        ({"read_ahead": -1}, "read_ahead"),
        ({"evaluate_every": 5}, "needs evaluate_cache"),
        ({"evaluate_every": 0, "evaluate_cache": "x"}, "evaluate_every"),
        ({"compile": True, "strategy": "fsdp"}, "compile means nothing"),
        ({"wandb": ""}, "wandb"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainConfig.model_validate(PATHS | settings)


def test_every_field_explains_itself() -> None:
    assert [name for name, field in TrainConfig.model_fields.items() if not field.description] == []


def test_settings_survive_json() -> None:
    config = TrainConfig(**PATHS, layer_indices=(0, 3), student_config={"n_head": 2})
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_result_settings_leave_out_what_only_moves_files_and_last_bits() -> None:
    config = TrainConfig(**PATHS)
    other = config.model_copy(
        update={"out": Path("elsewhere"), "cache": Path("moved"), "log_every": 1, "chunk_rows": 7, "tensorboard": False}
    )
    assert config.result_settings() == other.result_settings()
    assert config.result_settings() != config.model_copy(update={"seed": 1}).result_settings()
    assert json.loads(json.dumps(config.result_settings())) == config.result_settings()


def test_changeable_settings_are_fields() -> None:
    assert set(TrainConfig.model_fields) >= CHANGEABLE_ON_RESUME


def test_settings_import_no_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, train.config; sys.exit('torch' in sys.modules)"], check=True, timeout=60
    )


@pytest.mark.parametrize("cache", ["s3://bucket/cache", Path("folder/cache"), "folder/cache"])
def test_an_address_stays_what_it_is(cache: str | Path) -> None:
    config = TrainConfig(**{**PATHS, "cache": cache, "evaluate_cache": cache})
    expected = cache if cache == "s3://bucket/cache" else Path("folder/cache")
    for found in (config, TrainConfig.model_validate_json(config.model_dump_json())):
        assert (found.cache, found.evaluate_cache) == (expected, expected)
