"""``python -m benchmarks.capture``: what a capture costs beside its teacher, on workers, in text and with many shards.

In: which measurements, a teacher and their sizes. Out: JSON of each measurement, and its goals beside what was found.
Ratios are of one run, in turns. Offline, on the embedded teacher and text unless ``--teacher`` names another.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.capture import beside_teacher, many_shards, on_workers, scheduling, text
from pipeline.demo import TEACHER

PARTS = ("teacher", "workers", "scheduling", "many-shards", "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--quick", action="store_true", help="everything tiny: to see that it runs")
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--work", type=Path, help="folder for caches  [default: a temporary one]")
    parser.add_argument("--threads", type=int, default=1, help="of the teacher and what follows it")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--batch-blocks", type=int, default=4)
    parser.add_argument("--shard-batches", type=int, default=16)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--worker-shards", type=int, default=16)
    parser.add_argument("--shards", type=int, default=100_000, help="of the campaign, and of the cache with many")
    parser.add_argument("--documents", type=int, default=120)
    options = parser.parse_args()
    if options.quick:
        options.turns, options.shard_batches, options.block_tokens, options.batch_blocks = 1, 1, 32, 1
        options.calibration_tokens, options.worker_shards, options.shards, options.documents = 64, 6, 20, 2
    torch.set_num_threads(options.threads)
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        print(json.dumps(measured(options, Path(name)), indent=2))


def measured(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Figures of each part that was asked for, and the goals."""
    sizes = {"block_tokens": options.block_tokens, "batch_blocks": options.batch_blocks}
    if options.quick:
        sizes |= {"k": 4, "prototypes": 2}
    sizes["calibration_tokens"] = options.calibration_tokens
    shard_blocks = options.batch_blocks * options.shard_batches
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "teacher": lambda: beside_teacher.measure(
            options.teacher,
            work / "teacher",
            shard_batches=options.shard_batches,
            turn_shards=2,
            turns=options.turns,
            **sizes,
        ),
        "workers": lambda: on_workers.measure(
            options.teacher,
            work / "workers",
            num_shards=options.worker_shards,
            turns=options.turns,
            shard_blocks=shard_blocks,
            **sizes,
        ),
        "scheduling": lambda: scheduling.measure(options.shards, 1),
        "many-shards": lambda: many_shards.measure(work / "many", options.shards, options.turns),
        "text": lambda: text.measure(options.teacher, num_documents=options.documents, turns=options.turns),
    }
    found = {name: parts[name]() for name in PARTS if name in options.only}
    return {"teacher": options.teacher.name, "figures": found, "goals": goals(found)}


def goals(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The issue's goals beside what was found."""
    rows: list[dict[str, Any]] = []

    def add(what: str, goal: float, value: float, *, at_least: bool = False) -> None:
        met = value >= goal if at_least else value <= goal
        rows.append(
            {"what": what, "goal": f"{'at least' if at_least else 'at most'} {goal:g}", "found": value, "met": met}
        )

    if part := found.get("teacher"):
        add("capture's tokens/s over the bare forward's", 0.95, part["ratio"], at_least=True)
    if part := found.get("workers"):
        add("two workers over one", 1.9, part["ratio"], at_least=True)
    if part := found.get("scheduling"):
        add("client and scheduler, ms of CPU a shard", 10, part["cpu_ms_per_shard"])
        add("their memory after all shards over that after 1%", 1.2, part["memory_ratio"])
    if part := found.get("many-shards"):
        add("open and look for missing files, s", 2, part["open_and_verify_names"]["seconds"])
        add("find that nothing is to be done, s", 3, part["nothing_to_do"]["seconds"])
    if part := found.get("text"):
        add("text to blocks over the tokenizer's speed", 0.8, part["ratio"], at_least=True)
        add("memory on ten times the text over that on it", 1.1, part["memory_ratio"])
    return rows


if __name__ == "__main__":
    main()
