"""Captures that are killed: SIGKILL at random moments, and the same command again.

In: how many, and an encoding. Out: counts of those that end unlike an undisturbed one.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.demo import TEACHER

_KEPT: dict[str, dict[str, int]] = {
    "topk": {"k": 16},
    "prototype": {"k": 16, "prototypes": 16, "calibration_tokens": 4096},
    "sparsified": {"k": 16},
}
"""Where an encoding's own defaults are too much for a small capture."""


def capture_settings(tokens: int, encoding: str) -> dict[str, Any]:
    """A small capture of the embedded teacher, but for its folder."""
    sizes = {"block_tokens": 64, "limit_tokens": tokens, "batch_blocks": 8, "shard_blocks": 16}
    source = {"teacher": str(TEACHER), "text": "python-docs:train"}
    return {**source, **sizes, "encoding": encoding, **_KEPT.get(encoding, {})}


def capture_command(out: Path, tokens: int, workers: int, encoding: str) -> list[str]:
    """The same, as a user's command."""
    settings = capture_settings(tokens, encoding) | {"workers": workers, "out": out}
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-c", "from pipeline.cli import main; main()", "cache-teacher", *flags]


def digests(cache: Path) -> dict[str, str]:
    """Digest of every file but the manifest, which records when it was made; hidden files are nobody's data."""
    names = [p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return {n: hashlib.sha256((cache / n).read_bytes()).hexdigest() for n in names if not n.startswith(".")}


def kill_campaign(
    folder: Path, kills: int, tokens: int, workers: int, encoding: str, rng: random.Random
) -> dict[str, Any]:
    """Kill and resume ``kills`` captures; count those that end unlike the undisturbed one."""
    began = time.perf_counter()
    subprocess.run(capture_command(folder / "clean", tokens, workers, encoding), check=True, capture_output=True)
    seconds = time.perf_counter() - began
    expected = digests(folder / "clean")
    counts = {"kills": 0, "finished_before_the_kill": 0, "different_after_resume": 0, "resume_failed": 0}
    shards_at_kill = []
    while counts["kills"] < kills:
        out = folder / "killed"
        process = subprocess.Popen(
            capture_command(out, tokens, workers, encoding), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=rng.uniform(0, seconds))
            counts["finished_before_the_kill"] += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            counts["kills"] += 1
            shards_at_kill.append(len(list(out.glob("receipts/0*.json"))))
            resumed = subprocess.run(capture_command(out, tokens, workers, encoding), check=False, capture_output=True)
            counts["resume_failed"] += resumed.returncode != 0
            counts["different_after_resume"] += digests(out) != expected
        shutil.rmtree(out, ignore_errors=True)
    return {**counts, "workers": workers, "shards": len(list((folder / "clean" / "receipts").iterdir())),
            "shards_committed_at_each_kill": shards_at_kill}  # fmt: skip
