"""The other half of a published recipe: a pickle of framed sequences, a BERT and a DistilBERT, all by one file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForMaskedLM

from cache_spec.reader import CacheReader
from pipeline import cli
from tests.models import make_folder
from tests.papers import PUBLISHED

CLS, SEP, VOCABULARY = 2, 3, 60
STUDENT = {
    "dim": 32,
    "hidden_dim": 48,
    "n_heads": 2,
    "n_layers": 2,
    "max_position_embeddings": 16,
    "vocab_size": 120,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
}
SMALL = ["--encoding", "topk", "--k", "16", "--batch-blocks", "4", "--shard-blocks", "16", "--device", "cpu"]


def kdpipe(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What a command that succeeds prints for machines."""
    capsys.readouterr()
    code = cli.run([str(argument) for argument in (*arguments, "--json")])
    streams = capsys.readouterr()
    assert code == 0, streams.err
    found: dict[str, Any] = json.loads(streams.out)
    return found


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published file with what its masked half asks for."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "teacher", "bert", VOCABULARY, spread=5.0)
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 40, 40)
    documents = [np.r_[CLS, rng.integers(5, VOCABULARY, size=size), SEP].astype(np.uint16) for size in sizes]
    (tmp_path / "binarized.pickle").write_bytes(pickle.dumps(documents, protocol=4))
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    changes = {
        "data file": "binarized.pickle",
        "student-type": "distilbert",
        "teacher type": "bert",
        "teacher_name": str(tmp_path / "teacher"),
        "mlm": True,
        "mlm mask prop": 0.3,
        "alpha mlm": 2.0,
        "alpha clm": 0.0,
        "token counts": "counts.pickle",
        "mlm smoothing": 0.7,
        "n epoch": 20,
        "learning rate": 0.003,
        "gradient accumulation steps": 2,
        "log interval": 2,
        "batch size": 8,
    }
    path = tmp_path / "paper.json"
    path.write_text(json.dumps(PUBLISHED | changes))
    return path


def test_the_masked_recipe_end_to_end(capsys: pytest.CaptureFixture[str], paper: Path) -> None:
    kdpipe(capsys, "import-pickle", "binarized.pickle", "--out", "binarized.ids", "--tokenizer", "teacher")
    capture = ["cache-teacher", "--paper-config", paper, "--text", "binarized.ids", *SMALL]
    planned = kdpipe(capsys, *capture, "--dry-run")
    kdpipe(capsys, *capture)
    manifest = CacheReader.open("run-cache").manifest
    assert manifest.masking is not None
    assert (manifest.masking.probability, manifest.masking.positions) == (0.3, "all")
    assert manifest.masking.seed == 56
    # One frame a block, whatever the sequences brought along.
    reader = CacheReader.open("run-cache")
    blocks = list(range(manifest.blocks.num_blocks))
    ids_BT = reader.read("input_ids", blocks)
    assert (ids_BT == CLS).sum() == len(blocks)
    sizes = [len(document) - 2 for document in pickle.loads(Path("binarized.pickle").read_bytes())]
    assert len(blocks) == sum(-(-size // 14) for size in sizes)
    assert manifest.corpus.num_tokens == sum(sizes) + 2 * len(blocks)
    assert planned["tokens"] == pytest.approx(manifest.corpus.num_tokens, rel=0.2)
    assert kdpipe(capsys, "verify", "run-cache", "--deep", "--teacher", "teacher")["problems"] == []

    train = ["train-student", "--paper-config", paper, "--device", "cpu"]
    result = kdpipe(capsys, *train)
    assert {"kl", "ce", "cosine"} <= set(result["last_step"])
    rows = {row["key"]: row for row in result["paper"]}
    assert rows["alpha_mlm"]["settings"] == {"ce_weight": 2.0}
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    student = AutoModelForMaskedLM.from_pretrained("run/student")
    assert type(student).__name__ == "DistilBertForMaskedLM"
    assert (student.config.n_layers, student.config.vocab_size) == (2, VOCABULARY)
    settings = json.loads(Path("run/run.json").read_text())["settings"]
    assert (settings["kl_weight"], settings["ce_weight"], settings["cosine_weight"]) == (5.0, 2.0, 1.0)
    assert settings["kl_positions"] == "kept"
    figures = kdpipe(
        capsys, "evaluate", "--models", "run/student", "--cache", "run-cache", "--temperature", "2", "--device", "cpu"
    )
    assert figures["models"][0]["cache"]["kl_to_teacher"] > 0
