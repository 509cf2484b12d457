"""From a cache to Parquet to a cache to a student, by the commands that users run.

In: a small cache. Out: a student of the imported cache, figures against it, and the commands' refusals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import cli
from tests.object_stores import RunningS3, upload
from tests.runs import run_settings, save_run_cache, save_run_teacher, weights_of
from train.config import TrainConfig
from train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a cache of it, its export with true log-probabilities, and the cache that was imported from that."""
    folder = tmp_path_factory.mktemp("interop")
    save_run_cache(folder / "cache", save_run_teacher(folder / "teacher"))
    export = ["export", str(folder / "cache"), "--to", "parquet", "--out", str(folder / "export"), "--logprobs", "full"]
    assert cli.run(export) == 0
    assert cli.run(import_command(folder, folder / "imported")) == 0
    return folder


def import_command(folder: Path, out: Path, *more: str) -> list[str]:
    export = folder / "export"
    places = {"--from": export / "data", "--tokenizer": export / "tokenizer", "--teacher-config": export / "teacher"}
    flags = [str(part) for pair in places.items() for part in pair]
    return ["import", *flags, "--out", str(out), "--shard-blocks", "4", *more]


def settings(folder: Path, out: Path, **changes: Any) -> TrainConfig:
    values = run_settings(folder / "imported", folder / "teacher", out)
    return TrainConfig(**values | {"temperature": 1.0, "cosine_weight": 0.0} | changes)


def test_an_imported_cache_is_whole_and_trains_a_student(folder: Path, tmp_path: Path) -> None:
    assert cli.run(["verify", str(folder / "imported")]) == 0
    train(settings(folder, tmp_path / "run"), quiet=True)
    weights = weights_of(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl"] > 0
    # Twelve steps on all the same a student of the cache that the values came from makes: nearly the same one.
    same = run_settings(folder / "cache", folder / "teacher", tmp_path / "other")
    same |= {"temperature": 1.0, "cosine_weight": 0.0, "tail": "bucket"}
    train(TrainConfig(**same), quiet=True)
    other = weights_of(tmp_path / "other")
    assert all(torch.isclose(weights[name], other[name], atol=0.02).float().mean() > 0.9 for name in weights)


def test_a_checkpoint_is_a_student_where_the_teacher_is_not_known(folder: Path, tmp_path: Path) -> None:
    command = import_command(folder, tmp_path / "imported")
    at = command.index("--teacher-config")
    assert cli.run(command[:at] + command[at + 2 :]) == 0
    assert not (tmp_path / "imported" / "teacher").exists()
    values = settings(folder, tmp_path / "run").model_dump(
        exclude={"num_layers", "teacher", "dropout"}, exclude_unset=True
    )
    values |= {"cache": tmp_path / "imported", "student": "checkpoint", "checkpoint": str(folder / "teacher")}
    train(TrainConfig(**values), quiet=True)
    assert weights_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"temperature": 2.0}, "undeclared-temperature"),
        ({"tail": "prototype"}, "no-tail"),
        ({"tail": "gold"}, "no-tail"),
        ({"cosine_weight": 0.5}, "no-hidden-states"),
    ],
)
def test_what_the_values_do_not_tell_is_not_trained_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], kind: str
) -> None:
    values = {"cosine_weight": 0.0, "num_layers": 1, "teacher": folder / "teacher", "out": tmp_path / "run"} | changes
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    assert cli.run(["train-student", "--cache", str(folder / "imported"), *flags]) == 3
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"error: {kind}: ")
    assert "\n" not in line


def test_evaluation_against_an_imported_cache_claims_no_divergence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["evaluate", "--models", str(folder / "teacher"), "--cache", str(folder / "imported"), "--device", "cpu"]
    assert cli.run([*models, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"][0]["cache"]
    assert found["loss_nats"] > 0
    unknown = ("kl_is", "kl_to_teacher", "agreement", "overlap", "teacher_loss", "teacher_perplexity")
    assert [found[name] for name in unknown] == [None] * len(unknown)
    assert cli.run(models) == 0
    assert "imported targets, which tell neither KL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["export", "CACHE", "--to", "csv", "--out", "OUT"], 2, "'csv' is not one of"),
        (["export", "CACHE", "--to", "parquet"], 2, "--out"),
        (["export", "CACHE", "--to", "safetensors", "--k", "3", "--out", "OUT"], 2, "k means nothing to safetensors"),
        (["export", "MISSING", "--to", "parquet", "--out", "OUT"], 3, "not-a-cache"),
        (["export", "CACHE", "--to", "parquet", "--temperature", "3", "--out", "OUT"], 3, "undeclared-temperature"),
        (["export", "CACHE", "--to", "parquet", "--out", "CACHE"], 4, "not-an-export"),
        (["import", "--from", "MISSING", "--tokenizer", "TOKENIZER", "--out", "OUT"], 3, "no-text"),
        (["import", "--tokenizer", "TOKENIZER", "--out", "OUT"], 2, "--from"),
        (["import", "--from", "DATA", "--tokenizer", "CACHE", "--out", "OUT"], 3, "no-tokenizer"),
        (["import", "--from", "DATA", "--tokenizer", "TOKENIZER", "--out", "OUT", "--k", "9"], 3, "short-list"),
        (["import", "--from", "DATA", "--tokenizer", "TOKENIZER", "--out", "OUT", "--shift", "2"], 2, "--shift"),
        (["import", "--from", "DATA", "--tokenizer", "TOKENIZER", "--out", "DATA"], 4, "not-a-cache"),
        (["verify", "IMPORTED", "--deep"], 3, "imported-cache"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_a_fault_is_one_line_and_an_exit_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], code: int, said: str
) -> None:
    places = {
        "CACHE": folder / "cache",
        "IMPORTED": folder / "imported",
        "MISSING": folder / "missing",
        "DATA": folder / "export" / "data",
        "TOKENIZER": folder / "export" / "tokenizer",
        "OUT": tmp_path / "out",
    }
    assert cli.run([str(places.get(part, part)) for part in command]) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert code == 2 or len(error.strip().splitlines()) == 1


def test_a_recipe_names_the_files_as_the_flag_does(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    export = folder / "export"
    recipe.write_text(f"import:\n  from: {export / 'data'}\n  tokenizer: {export / 'tokenizer'}\n  k: 2\n")
    assert cli.run(["import", "--config", str(recipe), "--out", str(tmp_path / "cache")]) == 0
    assert json.loads((tmp_path / "cache" / "manifest.json").read_bytes())["encoding"]["k"] == 2


def test_other_commands_do_without_what_is_not_known(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(folder / "imported")
    page = tmp_path / "report.html"
    assert cli.run(["report", "--cache", cache, "--out", str(page)]) == 0
    assert "by no teacher that ran for it" in page.read_text()
    capsys.readouterr()
    assert cli.run(["transcode", cache, "--k", "2", "--out", str(tmp_path / "small"), "--dry-run"]) == 0
    assert "imported log-probabilities" in capsys.readouterr().out
    assert cli.run(["inspect", cache]) == 0
    assert "tail bucket or renormalise" in capsys.readouterr().out


def test_a_cache_in_a_store_is_exported_as_its_folder_is(s3: RunningS3, folder: Path, tmp_path: Path) -> None:
    url = upload(folder / "cache", "interop").url
    flags = ["--to", "parquet", "--logprobs", "full", "--copy-folder", str(tmp_path / "copies")]
    assert cli.run(["export", url, *flags, "--out", str(tmp_path / "out")]) == 0
    files = sorted(path.name for path in (folder / "export" / "data").iterdir())
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == files
    for name in files:
        assert (tmp_path / "out" / "data" / name).read_bytes() == (folder / "export" / "data" / name).read_bytes()
