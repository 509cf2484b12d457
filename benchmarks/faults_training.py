"""``python -m benchmarks.faults_training``: kill trainings at random moments, and compare what they end with.

In: a number of kills. Out: JSON. A kill is a SIGKILL to a process of ``kdpipe train-student`` at a random moment, its
start, its checkpoints and its export included, followed by the same command, which may be killed again. A run that was
let to its end must have bitwise the weights and the metrics of an undisturbed one. On the CPU in fp32, with dropout, on
the embedded teacher. Processes are forked from one that has imported everything, so that kills fall on training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import train.loop  # noqa: F401 (what takes seconds is imported once)
from pipeline import cli
from pipeline.demo import TEACHER
from train.run_files import CLOCK_METRICS, read_metrics

TOKENS = 8_192
_OPTIONS = (
    "--num-layers 1 --batch-blocks 4 --accumulate 2 --checkpoint-every 1 --log-every 1 --dropout 0.1"
    " --cosine-weight 0.5 --device cpu --precision fp32 --no-tensorboard --json"
)


def capture_command(out: Path) -> list[str]:
    source = ["cache-teacher", "--teacher", str(TEACHER), "--text", "python-docs:train", "--out", str(out)]
    sizes = {"block-tokens": 64, "limit-tokens": TOKENS, "batch-blocks": 8, "shard-blocks": 16, "hidden-window": 8}
    return [*source, "--encoding", "topk", "--k", "16", *(p for k, v in sizes.items() for p in (f"--{k}", str(v)))]


def training_command(cache: Path, out: Path, more: str) -> list[str]:
    return ["train-student", "--cache", str(cache), "--out", str(out), "--teacher", str(TEACHER), *_OPTIONS.split(),
            *more.split()]  # fmt: skip


def start(command: list[str]) -> Any:
    """A forked process that runs a command of ``kdpipe`` and says nothing."""

    def body() -> None:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        torch.set_num_threads(1)
        os._exit(cli.run(command))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def outcome(out: Path) -> tuple[str, str]:
    """Digests of the exported weights, and of all that the metrics say but what a clock tells."""
    weights = hashlib.sha256((out / "student" / "model.safetensors").read_bytes()).hexdigest()
    lines = [{key: value for key, value in line.items() if key not in CLOCK_METRICS} for line in read_metrics(out)]
    return weights, hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def state_at_kill(out: Path) -> str:
    """What was being done, as far as the folder tells."""
    checkpoints = out / "checkpoints"
    if any(checkpoints.glob(".tmp-*")):
        return "checkpoint"
    if any(out.glob(".student.*")):
        return "export"
    if not any(checkpoints.glob("step-*")):
        return "before the first checkpoint"
    return "step or start"


def campaign(folder: Path, kills: int, rng: random.Random, more: str) -> dict[str, Any]:
    """Kill ``kills`` processes; count the runs that end unlike the undisturbed one."""
    cache = folder / "cache"
    child = start(capture_command(cache))
    child.join()
    assert child.exitcode == 0
    seconds = 0.0
    for name in ("warm", "clean"):  # the second start tells how long one takes
        began = time.perf_counter()
        process = start(training_command(cache, folder / name, more))
        process.join()
        assert process.exitcode == 0
        seconds = time.perf_counter() - began
    expected = outcome(folder / "clean")
    counts = {"kills": 0, "runs": 0, "kills_of_a_run_at_most": 0, "resume_failed": 0, "different_at_the_end": 0}
    places: dict[str, int] = {}
    out, of_this_run = folder / "killed", 0
    while counts["kills"] < kills or of_this_run:
        process = start(training_command(cache, out, more))
        # In a run that is resumed less is left to do: most kills should still fall on it.
        process.join(timeout=rng.uniform(0, seconds) if counts["kills"] < kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            counts["kills"] += 1
            of_this_run += 1
            place = state_at_kill(out)
            places[place] = places.get(place, 0) + 1
            continue
        counts["resume_failed"] += process.exitcode != 0
        counts["runs"] += 1
        counts["kills_of_a_run_at_most"] = max(counts["kills_of_a_run_at_most"], of_this_run)
        counts["different_at_the_end"] += process.exitcode != 0 or outcome(out) != expected
        of_this_run = 0
        shutil.rmtree(out)
    steps = len(read_metrics(folder / "clean"))
    return {**counts, "undisturbed_s": round(seconds, 2), "steps": steps, "killed_during": places}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", default="", help="Further flags of train-student.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = campaign(Path(name), options.kills, random.Random(options.seed), options.options)
    print(json.dumps({"seed": options.seed, "options": options.options, **report}, indent=2))


if __name__ == "__main__":
    main()
