"""The benchmark of the head loss's memory runs, tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_the_benchmark_runs_and_prints_json() -> None:
    command = [sys.executable, "-m", "benchmarks.loss_memory", "--rows", "16", "--vocab", "1024", "--width", "8"]
    done = subprocess.run(
        [*command, "--cases", "bucket, js"], check=True, stdout=subprocess.PIPE, text=True, timeout=300
    )
    figures = json.loads(done.stdout)
    assert (figures["rows"], figures["vocab"], figures["width"]) == (16, 1024, 8)
    assert set(figures["cases"]) == {"bucket, js, T = 1", "bucket, js, T = 2"}
    for case in figures["cases"].values():
        assert case["seconds"] > 0
