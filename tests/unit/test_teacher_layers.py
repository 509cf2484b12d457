"""Copied layers hold the teacher's tensors bit by bit, no others are read, and teachers that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import train.student
import train.teacher_layers
from tests.refusals import refusal
from tests.students import LLAMA_SIZES, NUM_LAYERS, TEACHERS, V, build, save_teacher, teacher_manifest
from train.student import StudentBuild
from train.teacher_layers import chosen_layers, spread_layers

PADDED = V + 8
GPT2 = {"model_type": "gpt2", **TEACHERS["gpt2"], "num_hidden_layers": 1}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "teacher", "gpt2")
    return tmp_path / "teacher"


@pytest.mark.parametrize(("num_layers", "depth", "expected"), [(6, 12, (0, 2, 4, 7, 9, 11)), (4, 30, (0, 10, 19, 29))])
def test_default_spread_is_the_published_one(num_layers: int, depth: int, expected: tuple[int, ...]) -> None:
    assert spread_layers(num_layers, depth) == expected


def test_spread_is_strictly_ascending_from_first_to_last() -> None:
    for depth in range(1, 40):
        for num_layers in range(1, depth + 1):
            layers = spread_layers(num_layers, depth)
            assert (layers[0], len(set(layers))) == (0, num_layers)
            assert list(layers) == sorted(layers)
            assert num_layers == 1 or layers[-1] == depth - 1


@pytest.mark.parametrize("model_type", TEACHERS)
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_copied_tensors_equal_the_teachers_bit_by_bit(tmp_path: Path, model_type: str, max_shard_size: str) -> None:
    model = save_teacher(tmp_path / "t", model_type, max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "t").glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    built = build(tmp_path / "t", tmp_path / "cache", layer_indices=(1, 3, 4))
    theirs = model.state_dict()
    ours = built.model.state_dict()
    prefix = {"gpt2": "transformer.h.", "gpt_neox": "gpt_neox.layers."}.get(model_type, "model.layers.")
    for name, tensor in ours.items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{(1, 3, 4)[int(number)]}.{rest}"
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == torch.float32
    assert built.summary["layers"] == [1, 3, 4]
    assert built.summary["source_weights"] == "those of the cache's teacher"
    assert built.summary["num_parameters"] == sum(p.numel() for p in built.model.parameters())
    assert built.model.training


@pytest.mark.parametrize("model_type", TEACHERS)
def test_a_student_of_all_layers_has_the_teachers_logits(tmp_path: Path, model_type: str) -> None:
    model = save_teacher(tmp_path / "t", model_type)
    student: Any = build(tmp_path / "t", tmp_path / "cache", num_layers=NUM_LAYERS).model.eval()
    ids_BT = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_no_other_layers_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_size: str) -> None:
    save_teacher(tmp_path / "t", "llama", max_shard_size=max_shard_size)
    read: list[str] = []
    real_open = safetensors.safe_open

    class Spy:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file: Any = real_open(*args, **kwargs)

        def __enter__(self) -> Spy:
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            tensor: torch.Tensor = self.file.get_tensor(name)
            return tensor

    monkeypatch.setattr(train.teacher_layers, "safe_open", Spy)
    build(tmp_path / "t", tmp_path / "cache", num_layers=2)
    layers = {name.split(".")[2] for name in read if ".layers." in name}
    assert layers == {"0", "4"}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(read)


def test_checkpoints_of_the_base_model_are_accepted(tmp_path: Path, teacher: Path) -> None:
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(teacher / "model.safetensors").items()}
    tensors |= {f"h.{n}.attn.bias": torch.ones(1, 1, 32, 32) for n in range(NUM_LAYERS)}
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    student = build(teacher, tmp_path / "cache", layer_indices=(4, 2)).model
    assert torch.equal(student.state_dict()["transformer.h.0.mlp.c_fc.weight"], tensors["h.4.mlp.c_fc.weight"])
    assert torch.equal(student.state_dict()["lm_head.weight"], tensors["wte.weight"])


def test_lists_for_each_layer_are_cut_to_the_chosen_ones(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "qwen2")
    config: Any = build(tmp_path / "t", tmp_path / "cache", layer_indices=(1, 2, 4)).model.config
    assert config.layer_types == ["full_attention", "full_attention", "sliding_attention"]


def test_settings_that_change_no_shape_may_be_changed_beside_copied_layers(tmp_path: Path, teacher: Path) -> None:
    config: Any = build(teacher, tmp_path / "cache", num_layers=2, overrides={"resid_pdrop": 0.25}).model.config
    assert (config.resid_pdrop, config.embd_pdrop) == (0.25, 0.1)


def test_half_precision_teachers_give_float32_students(tmp_path: Path, teacher: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(teacher / "model.safetensors").items()}
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((teacher / "config.json").read_text()) | {"dtype": "bfloat16"}
    (teacher / "config.json").write_text(json.dumps(config))
    student: Any = build(teacher, tmp_path / "cache", num_layers=2).model
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert student.config.dtype == torch.float32
    assert torch.equal(student.transformer.wte.weight, tensors["transformer.wte.weight"].float())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", TEACHERS)
def test_padded_rows_are_cut_and_the_real_logits_stay(tmp_path: Path, model_type: str, tied: bool) -> None:
    padding: dict[str, Any] = {"rows": PADDED, "pad_token_id": PADDED - 1, "tie_word_embeddings": tied}
    model = save_teacher(tmp_path / "t", model_type, **padding)
    manifest = teacher_manifest(tmp_path / "t", vocab_size=V)
    students: list[dict[str, Any]] = [
        {"num_layers": NUM_LAYERS},
        {"init": "checkpoint", "checkpoint": str(tmp_path / "t")},
        {"init": "config"},
        {"init": "config", "overrides": {"vocab_size": V, "pad_token_id": 0}},
    ]
    ids_BT = torch.arange(32).reshape(2, 16)
    for number, changes in enumerate(students):
        built = build(tmp_path / "t", tmp_path / "cache", manifest=manifest, **changes)
        student: Any = built.model
        head, embedding = student.get_output_embeddings(), student.get_input_embeddings()
        assert (head.weight is embedding.weight) == tied
        assert head.weight.shape[0] == embedding.weight.shape[0] == student.config.vocab_size == V
        assert built.summary["vocabulary_rows"] == V
        assert student.config.pad_token_id == (0 if number == 3 else None)
        assert student.generation_config.pad_token_id in (0, None)
        if number < 2:
            with torch.no_grad():
                assert torch.equal(student.eval()(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits[..., :V])


@pytest.mark.parametrize("init", [{"num_layers": 2}, {"init": "config"}, {"init": "config", "overrides": GPT2}])
def test_students_of_the_teachers_architecture_generate_as_the_teacher_does(
    tmp_path: Path, teacher: Path, init: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    build(teacher, tmp_path / "cache", **init)
    published = tmp_path / "cache" / "teacher" / "generation_config.json"
    published.write_text('{"do_sample": true, "temperature": 0.3, "eos_token_id": [0, 5, 900], "max_new_tokens": 77}')
    config: Any = build(teacher, tmp_path / "cache", **init).model.generation_config
    assert (config.do_sample, config.temperature, config.max_new_tokens) == (True, 0.3, 77)
    assert config.eos_token_id == [0, 5]
    other = {"model_type": "llama", **LLAMA_SIZES, "num_hidden_layers": 1}
    assert build(teacher, tmp_path / "cache", init="config", overrides=other).model.generation_config.temperature != 0.3
    for text in ("{", '{"temperature": 0.3}', "[]"):
        published.write_text(text)
        model: Any = build(teacher, tmp_path / "cache", **init).model
        assert model.generation_config.eos_token_id == 0
        assert "generation_config.json is left out" in caplog.text
        model.save_pretrained(tmp_path / "saved")


def test_another_fine_tune_of_the_teacher_is_said(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = teacher_manifest(teacher)
    tensors = load_file(teacher / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    built = build(teacher, tmp_path / "cache", manifest=manifest, num_layers=2)
    assert built.summary["source_weights"] == "not those of the cache's teacher"
    assert "weights differ" in caplog.text


def test_a_missing_tensor_is_named(tmp_path: Path, teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    del tensors["transformer.h.4.ln_1.bias"]
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    error = refusal(build, teacher, tmp_path / "cache", num_layers=2)
    assert error.kind == "cannot-copy-layers"
    assert "transformer.h.1.ln_1.bias" in error.place
    build(teacher, tmp_path / "cache", layer_indices=(0, 1))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path, teacher: Path) -> None:
    error = refusal(build, teacher, tmp_path / "cache", num_layers=2, overrides={"n_inner": 48})
    assert error.kind == "cannot-copy-layers"
    assert "mlp" in error.place


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"n_layer": 6}, "num_hidden_layers"), ({"n_embd": 48}, "hidden_size"), ({"n_head": 2}, "heads")],
)
def test_a_teacher_of_another_shape_is_refused(
    tmp_path: Path, teacher: Path, changes: dict[str, Any], field: str
) -> None:
    save_teacher(tmp_path / "other", "gpt2", **changes)
    error = refusal(build, teacher, tmp_path / "cache", num_layers=2, teacher=str(tmp_path / "other"))
    assert error.kind == "other-teacher"
    assert field in error.place


@pytest.mark.parametrize("name", ["model.Q8_0.gguf", "pytorch_model.bin"])
def test_teachers_that_are_not_safetensors_are_refused_with_a_hint(tmp_path: Path, teacher: Path, name: str) -> None:
    manifest = teacher_manifest(teacher)
    (teacher / "model.safetensors").rename(teacher / name)
    for source in (teacher, teacher / name):
        error = refusal(build, teacher, tmp_path / "cache", manifest=manifest, num_layers=2, teacher=str(source))
        assert error.kind == "teacher-not-safetensors"
        assert error.hint


def test_unknown_teachers_are_refused(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(train.teacher_layers, "snapshot_download", unreachable)
    (tmp_path / "empty").mkdir()
    for name in ("nobody/nothing", str(tmp_path / "gone"), str(tmp_path / "empty")):
        assert refusal(build, teacher, tmp_path / "cache", num_layers=2, teacher=name).kind == "unknown-teacher"


def test_a_local_teacher_that_moved_is_not_looked_for_on_the_hub(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.teacher_layers, "snapshot_download", lambda *args, **kwargs: pytest.fail("hub was asked"))
    manifest = teacher_manifest(teacher)
    for name, kind in (("moved-teacher", "unknown-teacher"), ("model.Q8_0.gguf", "teacher-not-safetensors")):
        info = manifest.teacher.model_copy(update={"name": name})
        other = manifest.model_copy(update={"teacher": info})
        error = refusal(build, teacher, tmp_path / "cache", manifest=other, num_layers=2)
        assert error.kind == kind
        assert error.hint


def test_hub_teachers_are_fetched_at_the_caches_revision(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, tuple(allow_patterns)))
        return str(teacher)

    monkeypatch.setattr(train.teacher_layers, "snapshot_download", download)
    manifest = teacher_manifest(teacher)
    info = manifest.teacher.model_copy(update={"name": "org/teacher", "revision": "abc"})
    built = build(teacher, tmp_path / "c", manifest=manifest.model_copy(update={"teacher": info}), num_layers=2)
    assert asked == [("org/teacher", "abc", ("model*.safetensors", "*.safetensors.index.json", "config.json"))]
    assert built.summary["source"] == "org/teacher"


def test_truncated_weights_and_indexes_that_leave_the_folder_are_refused(tmp_path: Path, teacher: Path) -> None:
    manifest = teacher_manifest(teacher)
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    def run() -> StudentBuild:
        return build(teacher, tmp_path / "cache", manifest=manifest, num_layers=2)

    assert refusal(run).kind == "unreadable-weights"
    weights.unlink()
    (teacher / "other.safetensors").touch()
    index = teacher / "model.safetensors.index.json"
    for text in (
        '{"weight_map": {"lm_head.weight": "../other.safetensors"}}',
        "{",
        '{"weight_map": {"a": "gone.bin"}}',
    ):
        index.write_text(text)
        assert refusal(run).kind == "unreadable-weights"


def test_layers_are_taken_from_an_end_by_name() -> None:
    assert chosen_layers(12, 3, None, "first") == (0, 1, 2)
    assert chosen_layers(12, 3, None, "last") == (9, 10, 11)
    assert chosen_layers(12, 3, None) == chosen_layers(12, 3, None, "spread") == spread_layers(3, 12)
