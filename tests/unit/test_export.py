"""An export reloads as the same model, or is not published; what was at its place is kept until then."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from cache_spec.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_WOULD_LOSE_DATA, KdpipeError
from cache_spec.manifest import Manifest
from tests.models import make_tokenizer
from tests.students import TEACHERS, V, build, save_teacher, teacher_manifest
from train.export import export_student, model_card
from train.run_folder import rebuild_student, save_student_config

CARD = {
    "steps": 12,
    "tokens trained on": 3456,
    "temperature": 2.0,
    "loss weights": {"kl": 5.0, "cross-entropy": 2.0, "cosine": 1.0},
    "source": "/home/somebody/models/teacher",
    "note": "read from /mnt/disk1/caches/one and a/b",
    "folder": Path("/mnt/disk2/run-3"),
    "evaluation": {"loss": 3.25, "corpus": "C:\\texts\\held-out.txt"},
}


class Setup:
    def __init__(self, folder: Path, model_type: str = "gpt2") -> None:
        save_teacher(folder / "teacher", model_type)
        make_tokenizer(V).save_pretrained(folder / "cache" / "tokenizer")
        self.tokenizer_folder = folder / "cache" / "tokenizer"
        self.manifest: Manifest = teacher_manifest(folder / "teacher")
        self.model: PreTrainedModel = build(folder / "teacher", folder / "cache", num_layers=2).model
        self.out = folder / "run" / "student"

    def export(self, card: dict[str, Any] | None = None) -> None:
        export_student(
            self.model, self.out, tokenizer_folder=self.tokenizer_folder, manifest=self.manifest, card=card or {}
        )

    def beside(self) -> list[str]:
        return sorted(os.listdir(self.out.parent)) if self.out.parent.exists() else []


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("model_type", TEACHERS)
def test_an_export_reloads_as_the_same_model_with_its_tokenizer(tmp_path: Path, model_type: str) -> None:
    setup = Setup(tmp_path, model_type)
    state = torch.get_rng_state()
    setup.export()
    assert torch.equal(state, torch.get_rng_state())
    assert setup.model.training
    reloaded: Any = AutoModelForCausalLM.from_pretrained(setup.out)
    ours, theirs = setup.model.state_dict(), reloaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert {p.dtype for p in reloaded.parameters()} == {torch.float32}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(setup.out)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(setup.tokenizer_folder).get_vocab()
    assert (setup.out / "generation_config.json").is_file()
    assert setup.beside() == ["student"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", TEACHERS)
def test_an_export_from_a_padded_teacher_gives_no_probability_to_ids_that_do_not_exist(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    padded = V + 8
    save_teacher(tmp_path / "teacher", model_type, rows=padded, pad_token_id=padded - 1, tie_word_embeddings=tied)
    make_tokenizer(V).save_pretrained(tmp_path / "cache" / "tokenizer")
    manifest = teacher_manifest(tmp_path / "teacher", vocab_size=V)
    assert manifest.teacher.padded_vocab_size == padded
    built = build(tmp_path / "teacher", tmp_path / "cache", manifest=manifest, num_layers=2)
    # As in a run: kept as a config, rebuilt, and given its weights.
    save_student_config(tmp_path, built.model)
    student: Any = rebuild_student(tmp_path)
    student.load_state_dict(built.model.state_dict())
    out = tmp_path / "run" / "student"
    export_student(student, out, tokenizer_folder=tmp_path / "cache" / "tokenizer", manifest=manifest, card={})
    reloaded: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    ids_BT = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        logits_BTV = reloaded(input_ids=ids_BT).logits
        assert logits_BTV.shape[-1] == reloaded.config.vocab_size == V
        torch.testing.assert_close(logits_BTV, student.eval()(input_ids=ids_BT).logits)
    rows = {t.shape[0] for name, t in load_file(out / "model.safetensors").items() if "embed" in name or "head" in name}
    assert not rows & set(range(V + 1, padded + 1))


def test_the_config_names_its_class_and_dtype_and_no_path(tmp_path: Path, setup: Setup) -> None:
    setup.model.config._name_or_path = str(tmp_path)
    setup.export(CARD)
    config = json.loads((setup.out / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == "float32"
    for name in ("config.json", "generation_config.json", "README.md"):
        assert str(tmp_path) not in (setup.out / name).read_text()


def test_the_card_tells_where_the_student_comes_from_and_no_local_path(setup: Setup) -> None:
    text = model_card(setup.manifest, CARD, "GPT2LMHeadModel", 1234)
    _, front, body = text.split("---\n", 2)
    header = yaml.safe_load(front)
    assert "kdpipe" in header["tags"]
    assert "license" not in header
    for expected in (setup.manifest.fingerprint, "topk, k: 4", "1234", "teacher", "3456", "kl", "3.25", "a/b"):
        assert expected in body
    for folder in ("/home", "/mnt", "C:\\", os.sep + "tmp"):
        assert folder not in text
    assert "read from one and a/b" in body


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_the_card_tells_when_autotokenizer_reads_the_tokenizer_differently(tmp_path: Path, model_type: str) -> None:
    setup = Setup(tmp_path, model_type)
    setup.export()
    expected = AutoTokenizer.from_pretrained(setup.tokenizer_folder).get_vocab()
    same = AutoTokenizer.from_pretrained(setup.out).get_vocab() == expected
    assert same == ("PreTrainedTokenizerFast" not in (setup.out / "README.md").read_text())


def test_an_earlier_export_is_replaced(setup: Setup) -> None:
    setup.export({"steps": 1})
    (setup.out / "extra.txt").write_text("of the earlier export")
    with torch.no_grad():
        next(setup.model.parameters()).add_(1)
    setup.export({"steps": 2})
    assert not (setup.out / "extra.txt").exists()
    assert setup.beside() == ["student"]
    reloaded: Any = AutoModelForCausalLM.from_pretrained(setup.out)
    assert torch.equal(next(reloaded.parameters()), next(setup.model.parameters()))


def flip_weight(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["transformer.ln_f.bias"][0] += 1e-6
    save_file(tensors, weights, metadata={"format": "pt"})


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def change_epsilon(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"layer_norm_epsilon": 0.5}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("spoil", [flip_weight, drop_tensor, truncate, change_epsilon])
def test_an_export_that_reloads_differently_is_not_published(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    setup.export({"steps": 1})
    before = contents(setup.out)
    real_save = type(setup.model).save_pretrained

    def save(model: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        real_save(model, folder, *args, **kwargs)
        spoil(folder)

    monkeypatch.setattr(type(setup.model), "save_pretrained", save)
    with pytest.raises(KdpipeError) as caught:
        setup.export({"steps": 2})
    assert (caught.value.kind, caught.value.exit_code) == ("export-mismatch", EXIT_FAILED)
    assert contents(setup.out) == before
    assert setup.beside() == ["student"]


@pytest.mark.parametrize("change", ["half precision", "nan"])
def test_students_that_are_not_finite_float32_are_not_published(setup: Setup, change: str) -> None:
    if change == "nan":
        with torch.no_grad():
            next(setup.model.parameters())[0] = float("nan")
    else:
        model: Any = setup.model
        model.bfloat16()
    with pytest.raises(KdpipeError) as caught:
        setup.export()
    assert caught.value.kind == "export-mismatch"
    assert setup.beside() == []


def test_students_of_few_positions_export(setup: Setup, tmp_path: Path) -> None:
    manifest = teacher_manifest(tmp_path / "teacher", block_tokens=4)
    short = {"init": "config", "overrides": {"n_positions": 4, "n_layer": 1}}
    setup.model = build(tmp_path / "teacher", tmp_path / "cache", manifest=manifest, **short).model
    setup.export()
    assert setup.beside() == ["student"]


def test_what_is_no_export_is_never_replaced(setup: Setup) -> None:
    setup.out.mkdir(parents=True)
    (setup.out / "thesis.txt").write_text("years of work")
    with pytest.raises(KdpipeError) as caught:
        setup.export()
    assert (caught.value.kind, caught.value.exit_code) == ("not-an-export", EXIT_WOULD_LOSE_DATA)
    assert contents(setup.out) == {"thesis.txt": b"years of work"}
    (setup.out / "thesis.txt").rename(setup.out.parent / "thesis.txt")
    setup.export()  # an empty folder may be filled
    setup.out = setup.out.parent / "thesis.txt"
    with pytest.raises(KdpipeError, match="not-an-export"):
        setup.export()


def test_a_failed_publication_puts_the_earlier_export_back(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.export({"steps": 1})
    before = contents(setup.out)
    real_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name.endswith(".exporting"):
            raise OSError(28, "No space left on device")
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KdpipeError) as caught:
        setup.export({"steps": 2})
    assert (caught.value.kind, caught.value.exit_code) == ("cannot-write", EXIT_BAD_INPUT)
    assert contents(setup.out) == before
    assert setup.beside() == ["student"]


def test_a_kill_between_the_renames_loses_no_export(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.export({"steps": 1})
    before = contents(setup.out)
    setup.out.rename(setup.out.with_name(".student.replaced"))
    (setup.out.with_name(".student.exporting")).mkdir()

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(type(setup.model), "save_pretrained", full)
    with pytest.raises(KdpipeError) as caught:
        setup.export({"steps": 2})
    assert caught.value.kind == "cannot-write"
    assert contents(setup.out) == before
    monkeypatch.undo()
    setup.export({"steps": 2})
    assert setup.beside() == ["student"]


def test_a_place_that_cannot_be_written_is_one_clear_error(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    setup.out = tmp_path / "file" / "student"
    with pytest.raises(KdpipeError) as caught:
        setup.export()
    assert caught.value.kind == "cannot-write"
