"""A published recipe from its own files: pickle to ids, ids to cache, cache to student, all by one file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cache_spec.reader import CacheReader
from pipeline import cli
from tests.models import ROWS, make_folder
from tests.papers import PUBLISHED

STUDENT = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": ROWS, "n_ctx": 16}
SMALL = ["--encoding", "topk", "--k", "8", "--batch-blocks", "2", "--shard-blocks", "5", "--device", "cpu"]


def kdpipe(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    capsys.readouterr()
    code = cli.run([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published file as it is, but for its paths and the number of passes of a step."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "teacher", spread=4.0)
    rng = np.random.default_rng(0)
    documents = [np.r_[1, rng.integers(2, 100, size=size), 1].astype(np.uint16) for size in rng.integers(3, 40, 30)]
    (tmp_path / "binarized.pickle").write_bytes(pickle.dumps(documents, protocol=4))
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    changes = {
        "data file": "binarized.pickle",
        "teacher_name": str(tmp_path / "teacher"),
        "gradient accumulation steps": 8,
        "batch size": 2,
    }
    path = tmp_path / "paper.json"
    path.write_text(json.dumps(PUBLISHED | changes))
    return path


def import_and_capture(capsys: pytest.CaptureFixture[str], *more: str) -> None:
    code, out, err = kdpipe(
        capsys, "import-pickle", "binarized.pickle", "--out", "binarized.ids", "--tokenizer", "teacher", "--json"
    )
    assert (code, json.loads(out)["num_documents"]) == (0, 30), err
    capture = ["cache-teacher", "--paper-config", "paper.json", "--text", "binarized.ids", *SMALL, *more]
    code, _, err = kdpipe(capsys, *capture)
    assert code == 0, err
    assert "temperatures = [1.0, 2.0]" in err
    assert json.loads(kdpipe(capsys, *capture, "--json")[1])["shards_captured_now"] == 0


def test_the_recipe_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path, paper: Path) -> None:
    train = ["train-student", "--paper-config", paper, "--device", "cpu"]
    # Neither half can be begun before the one that it needs, and each says which command that is.
    code, _, err = kdpipe(capsys, *train)
    assert (code, err.count("\n")) == (3, 1)
    assert "kdpipe cache-teacher --teacher" in err
    code, _, err = kdpipe(capsys, "cache-teacher", "--paper-config", paper)
    assert (code, err.count("\n")) == (3, 1)
    assert "kdpipe import-pickle binarized.pickle --out binarized.ids" in err

    import_and_capture(capsys)
    manifest = CacheReader.open("run-cache").manifest
    assert (manifest.temperatures, manifest.blocks.block_tokens) == ((1.0, 2.0), 16)
    assert manifest.hidden is not None
    assert manifest.hidden.window == 1
    # One sequence of the pickle a block, or several where it is longer than a block.
    assert (manifest.blocks.last_block, manifest.corpus.num_documents) == ("each", 30)
    assert manifest.corpus.num_tokens < manifest.blocks.num_blocks * 16
    assert kdpipe(capsys, "verify", "run-cache")[0] == 0
    code, out, err = kdpipe(
        capsys, "cache-teacher", "--paper-config", paper, "--text", "binarized.ids", *SMALL, "--dry-run", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["tokens"] == manifest.corpus.num_tokens
    assert json.loads(out)["tokens_certainty"] == "as in the ids"
    assert json.loads(out)["shards"] == manifest.blocks.num_shards

    code, out, err = kdpipe(capsys, *train, "--dry-run")
    assert code == 0, err
    assert "kl_weight = 5" in err
    assert not Path("run").exists()
    code, out, err = kdpipe(capsys, *train, "--json")
    assert code == 0, err
    result = json.loads(out)
    steps = -(-manifest.blocks.num_blocks // 16) * 4
    assert (result["steps"], result["epochs"]) == (steps, 4)
    assert {"kl", "ce", "cosine"} <= set(result["last_step"])
    assert {row["key"] for row in result["paper"]} >= {"alpha_ce", "force", "word_mask", "seed"}
    student = AutoModelForCausalLM.from_pretrained("run/student")
    assert (student.config.n_layer, student.config.n_positions) == (1, 16)
    # Positions were frozen where they started: another run of the same seed starts there too.
    settings = json.loads(Path("run/run.json").read_text())["settings"]
    assert settings["freeze_position_embeddings"] is True
    assert (settings["kl_weight"], settings["ce_weight"], settings["cosine_weight"]) == (5.0, 2.0, 1.0)


def test_force_moves_another_run_aside_and_keeps_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, paper: Path
) -> None:
    import_and_capture(capsys)
    train = ["train-student", "--paper-config", paper, "--device", "cpu", "--max-steps", "2"]
    assert kdpipe(capsys, *train)[0] == 0
    first = Path("run/student/model.safetensors").read_bytes()
    assert kdpipe(capsys, *train)[0] == 0
    assert not Path("run.old-1").exists()
    assert kdpipe(capsys, *train, "--learning-rate", "1e-3")[0] == 0
    assert Path("run.old-1/student/model.safetensors").read_bytes() == first
    assert Path("run/student/model.safetensors").read_bytes() != first
    paper.write_text(json.dumps(json.loads(paper.read_text()) | {"force": False}))
    code, _, err = kdpipe(capsys, *train)
    assert code == 4
    assert "other-settings" in err


@pytest.mark.parametrize(
    ("flags", "summary"),
    [
        (["--student", "teacher-layers"], {"init": "teacher-layers", "layers": [0]}),
        (["--student", "teacher-layers", "--layer-indices", "1"], {"init": "teacher-layers", "layers": [1]}),
        ([], {"init": "config"}),
    ],
)
def test_the_student_starts_as_the_flags_on_top_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, paper: Path, flags: list[str], summary: dict[str, Any]
) -> None:
    # Copied layers keep the teacher's positions.
    (tmp_path / "student.json").write_text(json.dumps(STUDENT | {"n_positions": 64, "n_ctx": 64}))
    import_and_capture(capsys, "--block-tokens", "16")
    code, _, err = kdpipe(
        capsys, "train-student", "--paper-config", paper, "--device", "cpu", "--max-steps", "1", *flags
    )
    assert code == 0, err
    built = json.loads(Path("run/run.json").read_text())["student"]
    assert {name: built[name] for name in summary} == summary


def test_frozen_positions_and_a_student_of_given_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, paper: Path
) -> None:
    import_and_capture(capsys)
    make_folder(tmp_path / "given", num_hidden_layers=1, max_position_embeddings=16)
    body = json.loads(paper.read_text())
    paper.write_text(json.dumps(body | {"student_pretrained_weights": "given", "fp16": True}))
    code, _, err = kdpipe(capsys, "train-student", "--paper-config", paper, "--device", "cpu", "--max-steps", "2")
    assert code == 0, err
    before, after = (load_file(f"{name}/model.safetensors") for name in ("given", "run/student"))
    assert torch.equal(before["transformer.wpe.weight"], after["transformer.wpe.weight"])
    assert not torch.equal(before["transformer.wte.weight"][:100], after["transformer.wte.weight"])
    assert json.loads(Path("run/run.json").read_text())["settings"]["precision"] == "bf16"


def test_one_file_or_a_recipe_but_not_both(capsys: pytest.CaptureFixture[str], paper: Path) -> None:
    code, _, err = kdpipe(capsys, "train-student", "--paper-config", paper, "--config", "some")
    assert code == 2
    assert "not both" in err


def test_one_file_is_one_student(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, paper: Path
) -> None:
    monkeypatch.setattr("train.paper_cache.cache_settings", lambda *_: {})  # there is no cache yet
    code, _, err = kdpipe(capsys, "train-student", "--paper-config", paper, "--cache", "c", "--students", "sizes")
    assert code == 2, err
    assert "leave out --students" in err
