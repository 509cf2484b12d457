"""Each benchmark runs, tiny, and prints JSON of the right shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults_training, memory, quantisation, remote, stores, teacher
from benchmarks.capture import __main__ as capture
from benchmarks.training import __main__ as training
from cache_spec.encodings.topk import TopK
from tests.runs import TOKENS, save_run_cache, save_run_teacher
from tests.synthetic import make_manifest, make_rows, write_cache

README = Path(__file__).parents[2] / "README.md"


def run(module: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_capture_benchmark_measures_each_part_and_says_what_met_its_goal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Workers of real captures take seconds to start, and are tested elsewhere.
    parts = ("teacher", "scheduling", "many-shards", "text")
    report = run(capture, capsys, monkeypatch, "--quick", "--work", tmp_path, "--only", *parts)
    figures = report["figures"]
    assert set(figures) == set(parts)
    taken_apart = figures["teacher"]["cpu_microseconds_a_token"]
    assert max(taken_apart, key=taken_apart.get) != "blocks"
    assert [mark["shards"] for mark in figures["scheduling"]["marks"]] == [1, *range(2, 21, 2)]
    assert figures["many-shards"]["files"] == 20 * 11
    assert figures["text"]["tokens"] > 0
    assert all(row["met"] == (row["found"] >= float(row["goal"].split()[-1])) for row in report["goals"][:1])
    assert len(report["goals"]) == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_fault_campaign_of_trainings_kills_and_compares(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(faults_training, capsys, monkeypatch, "--kills", 2, "--options", "--max-steps 4")
    assert (report["kills"], report["resume_failed"], report["different_at_the_end"]) == (2, 0, 0)
    assert report["runs"] >= 1


@pytest.mark.slow
def test_the_training_benchmark_times_contenders_in_turns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_run_teacher(tmp_path / "teacher")
    cache = save_run_cache(tmp_path / "cache", folder)
    few = ("--layers", 1, "--batch-blocks", 2, "--turns", 1, "--steps", 3, "--threads", 1, "--trl", tmp_path)
    only = ("--only", "kdpipe", "online", "trainer-ce")
    report = run(training, capsys, monkeypatch, "--cache", cache, "--teacher", folder, *few, *only)
    assert report["task"]["batch_tokens"] == 2 * TOKENS
    assert {name: figures.get("steps") for name, figures in report["contenders"].items()} == {
        "kdpipe": 2,
        "online": 2,
        "trainer-ce": 2,
    }
    ours, theirs = (report["contenders"][name]["step_s"] for name in ("kdpipe", "online"))
    found = {row["what"]: row["found"] for row in report["goals"]}
    assert found["speed-up over online"] == pytest.approx(theirs / ours, abs=1e-3)
    assert "share of a step that waits for data" in found


@pytest.mark.slow
def test_the_memory_benchmark_compares_two_corpora(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(memory, capsys, monkeypatch, "--chars", 4000, "--times", 2)
    assert report["peak_ratio"] == pytest.approx(report["peak_bytes"]["2"] / report["peak_bytes"]["1"], abs=1e-3)


def test_fewer_levels_are_smaller_and_less_exact(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoding = TopK(k=16, levels=1024)
    manifest = make_manifest(num_blocks=4, shard_blocks=4, block_tokens=64, vocab_size=400, encoding=encoding)
    write_cache(tmp_path, manifest, make_rows(manifest))
    rows = run(quantisation, capsys, monkeypatch, tmp_path)
    fine, *coarse = [row for row in rows if "levels" in row["stored_as"]]
    assert fine["largest_error_of_a_root"] < 1e-6
    sizes, errors = ([row[key] for row in [fine, *coarse]] for key in ("bytes_per_token", "largest_error_of_a_root"))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_the_real_teacher_is_kept_out_of_the_repository(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["teacher", "--out", str(README.parent / "models")])
    with pytest.raises(SystemExit) as stopped:
        sys.exit(teacher.main())
    assert stopped.value.code == 3


def test_the_benchmark_of_a_remote_cache_tells_what_training_waits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = "--shards 6 --shard-blocks 2 --block-tokens 8 --vocabulary 50 --k 3 --batch-blocks 2 --step-ms 1 --turns 1"
    report = run(remote, capsys, monkeypatch, *sizes.split())
    assert report["fetched_bytes"] > 0
    for way in ("local", "cold", "warm", "cold_without_read_ahead"):
        assert 0 <= report[way]["wait_share"] < 1


def test_the_stores_benchmark_measures_each_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "set by the benchmark, and taken back after the test")
    report = run(stores, capsys, monkeypatch, "--large", 1, "--small", 2, "--listed", 3, "--rounds", 1)
    assert set(report["obstore"]) == {f"{verb}_{size}_s" for verb in ("put", "get") for size in ("4_mib", "64_kib")} | {
        "list_s"
    }
    assert all(seconds > 0 for seconds in report["obstore"].values())
