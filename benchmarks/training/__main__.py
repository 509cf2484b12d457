"""``python -m benchmarks.training``: what a step of training from a cache costs, beside what a user would do instead.

In: a finished cache of the default encoding, and its teacher's folder. Out: JSON on standard output and a table on
standard error. Contenders take turns, each in a process of its own; figures are medians over all steps but the first of
each turn. TRL is no dependency: it is installed into a folder of its own, for this benchmark alone.

    kdpipe cache-teacher --teacher FOLDER --text TEXT --out CACHE
    python -m benchmarks.training --cache CACHE --teacher FOLDER
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.training.contenders import CONTENDERS, Task
from benchmarks.workers import Process
from cache_spec.reader import CacheReader

_TRL = "trl"
_MODULE = "benchmarks.training.worker"


def measure(
    task: Task, names: list[str], *, turns: int, steps: int, threads: int, environment: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Seconds a step and peak memory of every contender; one that fails has its error instead."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        workers = {
            name: Process(_MODULE, name, str(threads), json.dumps(asdict(task)), environment=environment)
            for name in names
        }
        for worker in workers.values():
            stack.callback(worker.close)
        for turn in range(turns):
            for name, worker in workers.items():
                if name in failed:
                    continue
                print(f"turn {turn + 1} of {turns}: {name}", file=sys.stderr, flush=True)
                try:
                    answers[name].append(worker.ask("turn", steps=steps))
                except RuntimeError as error:
                    failed[name] = str(error)
    return {name: {"error": failed[name]} if name in failed else _summary(answers[name]) for name in names}


def _summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The first step of a turn also pays for what is set up once."""
    step_s = [seconds for answer in answers for seconds in answer["step_s"][1:]]
    waits = [seconds for answer in answers for seconds in answer.get("wait_s", [])[1:]]
    return {
        "step_s": round(median(step_s), 4),
        "least_step_s": round(min(step_s), 4),
        "steps": len(step_s),
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        **({"wait_share": round(sum(waits) / sum(step_s), 5)} if waits else {}),
    }


def goals(figures: Mapping[str, Mapping[str, Any]], teacher_bytes: int) -> list[dict[str, Any]]:
    """What was aimed at, and what came of it; figures that were not taken are left out."""
    rows: list[dict[str, Any]] = []

    def row(what: str, found: float, *, most: float | None = None, least: float | None = None) -> None:
        met = (most is None or found <= most) and (least is None or found >= least)
        rows.append({"what": what, "goal": most if least is None else least, "found": round(found, 4), "met": met})

    def of(name: str, figure: str = "step_s") -> float | None:
        value = figures.get(name, {}).get(figure)
        return None if value is None else float(value)

    ours, forward = of("kdpipe"), of("teacher-forward")
    if ours is None:
        return rows
    for rival, most in (("kdpipe-ce", 1.05), ("trainer-ce", 1.0)):
        if (theirs := of(rival)) is not None:
            row(f"step, against {rival}", ours / theirs, most=most)
    for rival in ("online", "trl-gkd"):
        theirs, peak, our_peak = of(rival), of(rival, "peak_bytes"), of("kdpipe", "peak_bytes")
        if theirs is None:
            continue
        row(f"speed-up over {rival}", theirs / ours)
        if forward is not None:
            row(f"speed-up over {rival}, of the limit", theirs / ours / (1 + forward / ours), least=0.95)
        if peak is not None and our_peak is not None:
            row(
                f"MB less than {rival}; goal: the teacher's weights", (peak - our_peak) / 1e6, least=teacher_bytes / 1e6
            )
    if (wait := of("kdpipe", "wait_share")) is not None:
        row("share of a step that waits for data", wait, most=0.02)
    return rows


def read_beside(task: Task, threads: int, environment: Mapping[str, str]) -> dict[str, float]:
    """Tokens a second of one reader, and of each of two in processes of their own at the same time."""
    with ExitStack() as stack:
        workers = [
            Process(_MODULE, "read", str(threads), json.dumps(asdict(task)), environment=environment) for _ in range(2)
        ]
        for worker in workers:
            stack.callback(worker.close)
            worker.ask("turn", steps=2)
        alone, beside = [], []
        for _ in range(3):
            alone.append(_tokens_per_s(_read(workers[0])))
            with ThreadPoolExecutor() as pool:
                beside += [_tokens_per_s(answer) for answer in pool.map(_read, workers)]
    return {"alone_tokens_per_s": round(median(alone)), "beside_another_tokens_per_s": round(median(beside))}


def _read(worker: Process) -> dict[str, Any]:
    return worker.ask("turn", steps=64)


def _tokens_per_s(answer: Mapping[str, Any]) -> float:
    seconds: float = sum(answer["step_s"])
    return int(answer["tokens"]) / seconds


def trl_folder(folder: Path) -> str | None:
    """Why TRL cannot be used, or None; it is installed without what it depends on, which is here already."""
    if not (folder / _TRL).is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), _TRL]
        made = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        if made.returncode:
            lines = made.stderr.strip().splitlines() or ["pip failed"]
            return f"cannot be installed: {lines[-1][:200]}"
    return None


def _options() -> argparse.Namespace:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", required=True)
    parser.add_argument("--teacher", required=True, help="folder of the cache's teacher")
    parser.add_argument("--layers", type=int, default=4, help="of the teacher's, that the student has")
    parser.add_argument("--batch-blocks", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a turn, the first of which is not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), help="contenders to measure")
    parser.add_argument("--trl", type=Path, default=cache_home / "kdpipe" / _TRL, help="where TRL is installed to")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = _options()
    if options.steps < 2:
        raise SystemExit("error: --steps must be at least 2: the first of each turn is not counted")
    names = list(options.only or (name for name in CONTENDERS if name != "read"))
    task = Task(
        cache=options.cache,
        teacher=options.teacher,
        student={"num_layers": options.layers},
        batch_blocks=options.batch_blocks,
    )
    manifest = CacheReader.open(Path(task.cache)).manifest
    environment = {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(options.trl)}
    skipped = {}
    if "trl-gkd" in names and (why := trl_folder(options.trl)) is not None:
        skipped["trl-gkd"] = why
        names.remove("trl-gkd")
    figures = measure(
        task,
        [name for name in names if name != "read"],
        turns=options.turns,
        steps=options.steps,
        threads=options.threads,
        environment=environment,
    )
    found = goals(figures, 4 * (manifest.teacher.num_parameters or 0))
    report = {
        "task": asdict(task) | {"batch_tokens": task.batch_blocks * manifest.blocks.block_tokens},
        "encoding": manifest.encoding.model_dump(mode="json"),
        "machine": f"{platform.system()} {platform.machine()}, {options.threads} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "contenders": figures,
        "skipped": skipped,
        "goals": found,
        **({"reader": read_beside(task, 1, environment)} if options.only is None or "read" in options.only else {}),
    }
    for row in found:
        verdict = "" if row["goal"] is None else f"  goal {row['goal']:.3f}: {'met' if row['met'] else 'MISSED'}"
        print(f"{row['what']:55} {row['found']:10.3f}{verdict}", file=sys.stderr)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
