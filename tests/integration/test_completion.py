"""Completion in shells: candidates as the shell would be given them, fast, and the scripts that ask for them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from click.shell_completion import BashComplete

from pipeline import cli
from pipeline.completion import COMPLETE_VARIABLE, SHELLS, shipped_recipes
from pipeline.settings import COMMANDS
from train.config import TrainConfig


def candidates(*words: str) -> list[tuple[str, str]]:
    """Type and value of each candidate for the last of the words."""
    *before, incomplete = words
    asked = BashComplete(cli.cli, {}, "kdpipe", COMPLETE_VARIABLE).get_completions(before, incomplete)
    return [(item.type, item.value) for item in asked]


def values(*words: str) -> list[str]:
    return [value for _, value in candidates(*words)]


def test_commands_are_completed() -> None:
    assert values("") == list(COMMANDS)
    assert values("tr") == ["transcode", "train-student"]


def test_options_are_completed_all_of_them() -> None:
    flags = {"--" + name.replace("_", "-") for name in TrainConfig.model_fields}
    assert flags < set(values("train-student", "--"))
    assert values("train-student", "--kl-w") == ["--kl-weight"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train-student", "--tail", "b"), ["bucket"]),
        (("cache-teacher", "--encoding", "s"), ["sampled", "sparsified"]),
        (("completion", ""), list(SHELLS)),
        (("cache-teacher", "--config", "smo"), ["smollm2"]),
        (("train-student", "--students", "si"), ["sizes"]),
    ],
)
def test_values_are_completed(words: tuple[str, ...], expected: list[str]) -> None:
    assert values(*words) == expected


def test_recipes_are_the_shipped_ones() -> None:
    assert values("cache-teacher", "--config", "") == shipped_recipes()


@pytest.mark.parametrize(
    "words",
    [
        ("cache-teacher", "--teacher", "mod"),
        ("cache-teacher", "--out", "mod"),
        ("cache-teacher", "--config", "my-own"),
        ("train-student", "--cache", "mod"),
        ("verify", "mod"),
        ("transcode", "mod"),
        ("pull", "s3://a/b", "mod"),
    ],
)
def test_paths_are_left_to_the_shell(words: tuple[str, ...]) -> None:
    kinds = {kind for kind, _ in candidates(*words)}
    assert kinds <= {"file", "dir"}
    assert kinds


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_is_one_that_it_reads(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert cli.run(["completion", shell]) == 0
    streams = capsys.readouterr()
    assert streams.err == ""
    assert COMPLETE_VARIABLE in streams.out
    if program := shutil.which(shell):
        checked = subprocess.run([program, "-n"], input=streams.out, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("words", "count"), [("kdpipe ", 1), ("kdpipe train-student --", 2)])
def test_completing_imports_nothing_heavy(words: str, count: int) -> None:
    program = (
        "import os, sys, atexit\n"
        f"os.environ.update(COMP_WORDS={words!r}, COMP_CWORD='{count}', {COMPLETE_VARIABLE}='bash_complete')\n"
        "from pipeline.cli import run\n"
        "heavy = {'torch', 'transformers', 'dask', 'zarr', 'datasets', 'matplotlib', 'pyarrow'}\n"
        "atexit.register(lambda: heavy & set(sys.modules) and print('heavy', heavy & set(sys.modules)))\n"
        "run([])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "plain,-" in done.stdout or "plain,demo" in done.stdout
    assert "heavy" not in done.stdout
