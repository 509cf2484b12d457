"""lm-evaluation-harness, where it is installed, gives the same figures; where it is not, one line says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import train.evaluation.harness
from tests.evaluation import POSITIONS, evaluate, save_model, write_corpora
from tests.refusals import refusal
from train.evaluation.config import CORPORA
from train.evaluation.corpora import read_corpus
from train.evaluation.harness import TASKS, write_task


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra 'harness'")
def test_the_harness_gives_the_same_figures(tmp_path: Path) -> None:
    save_model(tmp_path / "model", bos_token_id=256, eos_token_id=256)
    arguments = ["--models", str(tmp_path / "model"), "--window", str(POSITIONS), "--stride", str(POSITIONS)]
    arguments += [part for given in write_corpora(tmp_path) for part in ("--corpus", given)]
    # In a process of its own: the harness warns, and warnings fail tests. Offline: nothing may be asked for.
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "evaluate", *arguments, "--harness", "--json", "--device", "cpu"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["models"]
    assert [found["corpus"] for found in row["harness"]] == list(CORPORA)
    compared = 0
    for ours, theirs in zip(row["corpora"], row["harness"], strict=True):
        assert theirs["figures"]
        for name, value in theirs["figures"].items():
            assert ours[name] == pytest.approx(value, rel=1e-4), (ours["corpus"], name)
            compared += 1
    assert compared == 8


def test_a_harness_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.evaluation.harness, "find_spec", lambda name: None)
    error = refusal(evaluate, tmp_path / "model", corpus=("ptb",), harness=True)
    assert error.kind == "missing-extra"
    assert "kdpipe[harness]" in str(error)


@pytest.mark.parametrize("number", range(len(CORPORA)))
def test_a_task_is_written_with_its_data_for_the_harness_own_command(tmp_path: Path, number: int) -> None:
    corpus = read_corpus(write_corpora(tmp_path)[number])
    task = write_task(corpus, tmp_path / "tasks")
    settings = yaml.safe_load((tmp_path / "tasks" / f"{task}.yaml").read_text())
    assert Path(settings["include"]) == TASKS / f"{corpus.name}.yaml"
    assert f"task: {task}\n" in Path(settings["include"]).read_text()
    rows = [
        json.loads(line) for line in Path(settings["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    ]
    if corpus.passages:
        assert [row["text"] for row in rows] == [passage.text for passage in corpus.passages]
        assert [row["num_words"] for row in rows] == [passage.words.sum() for passage in corpus.passages]
    else:
        assert [row["context"] + row["target"] for row in rows] == [e.context + e.target for e in corpus.examples]
