"""Students are built from a cache's small files: fresh configs, checkpoints, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train.student
import train.teacher_layers
from tests.models import make_tokenizer
from tests.refusals import refusal
from tests.students import LLAMA_SIZES, NUM_LAYERS, V, build, save_teacher
from train.student import public_name


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "teacher", "gpt2")
    return tmp_path / "teacher"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    make_tokenizer(V).save_pretrained(tmp_path / "cache" / "tokenizer")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": NUM_LAYERS + 1},
        {"num_layers": None},
        {"layer_indices": (0, NUM_LAYERS)},
        {"layer_indices": (-1,)},
        {"layer_indices": ()},
        {"layer_indices": (1, 1)},
        {"layer_indices": (0, 1), "num_layers": 3},
        {"num_layers": 2, "overrides": {"n_layer": 3}},
        {"init": "checkpoint"},
        {"init": "config", "overrides": {"n_head": 5}},
        {"init": "config", "overrides": {"n_layer": "four"}},
        {"init": "config", "overrides": {"n_embd": -24}},
        {"init": "config", "overrides": {"model_type": "no-such-architecture"}},
        {"init": "config", "overrides": {"model_type": "qwen2", "hidden_size": 30, "num_attention_heads": 4}},
    ],
)
def test_descriptions_that_make_no_model_are_refused(tmp_path: Path, teacher: Path, changes: dict[str, Any]) -> None:
    assert refusal(build, teacher, tmp_path / "cache", **changes).kind == "bad-student-config"


def test_the_row_of_the_padding_token_learns(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "llama")
    for init in ({"num_layers": 2}, {"init": "config"}, {"init": "checkpoint", "checkpoint": str(tmp_path / "t")}):
        model: Any = build(tmp_path / "t", tmp_path / "cache", **init).model
        assert model.config.pad_token_id == 0
        model(input_ids=torch.tensor([[0, 1, 2]])).logits.square().sum().backward()
        assert model.model.embed_tokens.weight[0].abs().sum() > 0
        assert model.model.embed_tokens.weight.grad[0].abs().sum() > 0


# --- fresh students


def test_overrides_change_the_teachers_config(tmp_path: Path, teacher: Path) -> None:
    built = build(
        teacher, tmp_path / "c", init="config", overrides={"n_layer": 2, "hidden_size": 16}, initializer_range=0.5
    )
    config: Any = built.model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.vocab_size) == (2, 16, 4, V)
    model: Any = built.model
    assert 0.45 < float(model.transformer.wte.weight.detach().std()) < 0.55
    assert config.embd_pdrop == 0.1


def test_sizes_follow_a_changed_width_and_are_told(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "llama")
    built = build(
        tmp_path / "t", tmp_path / "c", init="config", overrides={"hidden_size": 12, "num_attention_heads": 2}
    )
    assert built.summary["derived_sizes"] == {"intermediate_size": 32, "num_key_value_heads": 1}
    wide = build(tmp_path / "t", tmp_path / "c", init="config", overrides={"hidden_size": 48})
    assert wide.summary["derived_sizes"] == {"intermediate_size": 128, "head_dim": 12}
    given = build(tmp_path / "t", tmp_path / "c", init="config", overrides={"hidden_size": 48, "intermediate_size": 40})
    assert given.summary["derived_sizes"] == {"head_dim": 12}


def test_fresh_students_of_another_depth_get_their_own_layer_types(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "qwen2")
    config: Any = build(tmp_path / "t", tmp_path / "c", init="config", num_layers=7).model.config
    assert config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 4


def test_another_architecture_takes_the_teachers_vocabulary(tmp_path: Path, teacher: Path) -> None:
    sizes = {**LLAMA_SIZES, "num_hidden_layers": 2}
    built = build(teacher, tmp_path / "c", init="config", overrides={"model_type": "llama", **sizes})
    config = built.model.config
    assert (built.summary["architecture"], config.vocab_size, config.eos_token_id) == ("LlamaForCausalLM", V, 0)


def test_the_seed_decides_the_weights_and_the_global_random_state_stays(tmp_path: Path, teacher: Path) -> None:
    def run(seed: int) -> torch.Tensor:
        model: Any = build(teacher, tmp_path / "c", init="config", seed=seed).model
        weight: torch.Tensor = model.transformer.h[0].attn.c_attn.weight.detach()
        return weight

    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = run(1), run(1), run(2)
    build(teacher, tmp_path / "c", num_layers=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("init", ["config", "teacher-layers"])
@pytest.mark.parametrize("key", ["n_layers", "vocabsize", "auto_map"])
def test_unknown_config_keys_are_refused(tmp_path: Path, teacher: Path, init: str, key: str) -> None:
    error = refusal(build, teacher, tmp_path / "c", init=init, num_layers=2, overrides={key: 3})
    assert error.kind == "unknown-key"
    assert key in error.place


def test_another_vocabulary_is_refused_with_both_sizes(tmp_path: Path, teacher: Path) -> None:
    error = refusal(build, teacher, tmp_path / "c", init="config", overrides={"vocab_size": V + 1})
    assert (error.kind, error.expected, error.found) == ("student-vocabulary", str(V), str(V + 1))


def test_blocks_longer_than_the_students_positions_are_refused(tmp_path: Path, teacher: Path) -> None:
    error = refusal(build, teacher, tmp_path / "c", init="config", overrides={"n_positions": 8})
    assert (error.kind, error.place) == ("student-positions", "n_positions")


@pytest.mark.parametrize("model_type", ["t5", "bert", "vit"])
def test_students_that_are_no_causal_language_model_are_refused(tmp_path: Path, teacher: Path, model_type: str) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2} if model_type != "t5" else {}
    overrides = {"model_type": model_type, **sizes}
    if model_type == "vit":
        save_vit = {"model_type": "vit"}
        (tmp_path / "c" / "teacher").mkdir(parents=True)
        (tmp_path / "c" / "teacher" / "config.json").write_text(json.dumps(save_vit))
        overrides = {}
    error = refusal(build, teacher, tmp_path / "c", init="config", overrides=overrides)
    assert error.kind == ("not-a-causal-lm" if model_type == "bert" else "not-a-language-model")


def test_broken_configs_in_the_cache_are_refused(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "c" / "teacher").mkdir(parents=True)
    for text in ("{", '{"model_type": "gpt2", "auto_map": {"AutoConfig": "x.Y"}, "n_layer": "many"}'):
        (tmp_path / "c" / "teacher" / "config.json").write_text(text)
        assert refusal(build, teacher, tmp_path / "c", num_layers=2).kind == "unreadable-config"


# --- existing models


def test_a_checkpoint_of_the_same_vocabulary_is_taken_as_it_is(tmp_path: Path, teacher: Path, cache: Path) -> None:
    model = save_teacher(tmp_path / "student", "llama")
    make_tokenizer(V).save_pretrained(tmp_path / "student")
    built = build(teacher, cache, init="checkpoint", checkpoint=str(tmp_path / "student"))
    assert all(torch.equal(t, built.model.state_dict()[name]) for name, t in model.state_dict().items())
    assert built.summary["source"] == "student"
    assert built.model.config._name_or_path == ""


def test_a_checkpoint_whose_tokens_mean_something_else_is_refused(tmp_path: Path, teacher: Path, cache: Path) -> None:
    save_teacher(tmp_path / "student", "gpt2")
    make_tokenizer(V, backwards=True).save_pretrained(tmp_path / "student")
    error = refusal(build, teacher, cache, init="checkpoint", checkpoint=str(tmp_path / "student"))
    assert error.kind == "student-vocabulary"


def test_checkpoints_that_do_not_load_whole_are_refused(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(train.student, "snapshot_download", unreachable)

    def kind(folder: Path) -> str:
        return refusal(build, teacher, tmp_path / "c", init="checkpoint", checkpoint=str(folder)).kind

    assert kind(tmp_path / "gone") == "unknown-checkpoint"
    student = tmp_path / "student"
    save_teacher(student, "gpt2")
    tensors = load_file(student / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    assert kind(student) == "unreadable-weights"
    (student / "model.safetensors").unlink()
    torch.save(tensors, student / "pytorch_model.bin")
    assert kind(student) == "unknown-checkpoint"


def test_public_names_hold_no_folders(tmp_path: Path) -> None:
    assert public_name(str(tmp_path / "my-teacher")) == "my-teacher"
    assert public_name("../models/t") == "t"
    assert public_name("org/name") == "org/name"
    assert public_name("gpt2") == "gpt2"
