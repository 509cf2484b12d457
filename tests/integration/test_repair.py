"""A damaged cache is made whole again: what is bad is recomputed, and nothing else is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.small import digests
from cache_spec.validate import verify_cache
from pipeline.capture import capture
from pipeline.cli import run
from pipeline.config import CaptureConfig
from pipeline.repair import repair_cache
from tests.models import make_folder, write_words
from tests.refusals import refused


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of five shards; its teacher and text lie beside it."""
    home = tmp_path_factory.mktemp("repair")
    make_folder(home / "teacher", spread=4.0, n_layer=1)
    write_words(home / "text.jsonl", num_documents=6)
    capture(config(home), quiet=True)
    assert len(list((home / "cache" / "receipts").iterdir())) >= 3
    return home


def config(home: Path, name: str = "cache") -> CaptureConfig:
    settings: dict[str, Any] = {"encoding": "prototype", "k": 4, "prototypes": 2, "residual_draws": 2}
    sizes: dict[str, Any] = {"block_tokens": 16, "hidden_window": 8, "batch_blocks": 2, "shard_blocks": 5}
    text = (str(home / "text.jsonl"),)
    return CaptureConfig(teacher=str(home / "teacher"), text=text, out=home / name, device="cpu", **settings, **sizes)


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy of the cache, to be damaged."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path / "cache"


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def repaired(cache: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, Any]:
    code = run(["repair", str(cache), "--teacher", str(cache.parent / "teacher"), "--json", *flags])
    return code, json.loads(capsys.readouterr().out)


def test_bad_shards_and_files_are_made_again_and_no_other_file_is_written(
    whole: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(damaged / "head_ranks" / "c.1.0.0")
    (damaged / "hidden" / "c.2.0.0").unlink()
    change(damaged / "zarr.json")
    change(damaged / "tokenizer" / "tokenizer.json")
    untouched = damaged / "head_gaps" / "c.0.0.0"
    before = untouched.stat().st_mtime_ns
    code, planned = repaired(damaged, capsys, "--dry-run")
    assert (code, planned["recomputed"], len(planned["files"])) == (0, [1, 2], 2)
    assert len(verify_cache(damaged)) >= 4
    code, facts = repaired(damaged, capsys)
    assert (code, facts["recomputed"], facts["taken_out"], facts["problems"]) == (0, [1, 2], [], [])
    assert digests(damaged) == digests(whole / "cache")
    assert untouched.stat().st_mtime_ns == before


def test_a_whole_cache_is_left_alone(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in damaged.rglob("*") if path.is_file()}
    code, facts = repaired(damaged, capsys)
    assert (code, facts["recomputed"], facts["taken_out"], facts["files"], facts["problems"]) == (0, [], [], [], [])
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before


@pytest.mark.parametrize("name", ["input_ids/c.1.0", "receipts/00000001.json"])
def test_a_shard_without_its_tokens_is_taken_out_and_the_first_command_makes_it(
    whole: Path, damaged: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change(damaged / name)
    code, facts = repaired(damaged, capsys)
    assert (code, facts["recomputed"], facts["taken_out"]) == (3, [], [1])
    assert {problem["kind"] for problem in facts["problems"]} <= {"unfinished-cache"}
    summary = capture(config(damaged.parent), quiet=True)
    assert summary["shards_captured_now"] == 1
    assert digests(damaged) == digests(whole / "cache")


def test_another_teacher_and_what_is_no_cache_are_refused(damaged: Path, tmp_path: Path) -> None:
    change(damaged / "head_gaps" / "c.0.0.0")
    other = make_folder(tmp_path / "other", spread=4.0, n_layer=2)
    refused("other-teacher", repair_cache, damaged, str(other), gguf_file=None, quiet=True)
    assert verify_cache(damaged)
    refused("not-a-cache", repair_cache, tmp_path / "nowhere", None, gguf_file=None)
    assert not (tmp_path / "nowhere").exists()
