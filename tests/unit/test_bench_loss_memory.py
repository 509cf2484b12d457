"""The benchmark of the head loss's memory runs, tiny."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import loss_memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_the_benchmark_runs_and_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "16", "--vocab", "1024", "--width", "8", "--temperatures", "2"]
    loss_memory.main([*sizes, "--cases", "bucket, js"])
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["vocab"], figures["width"]) == (16, 1024, 8)
    assert set(figures["cases"]) == {"bucket, js, T = 2"}
    for case in figures["cases"].values():
        assert case["seconds"] > 0
