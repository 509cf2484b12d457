"""``python -m benchmarks.planning``: what ``kdpipe plan --calibrate`` says, beside what the same commands then take.

In: a teacher, text, sizes, students. Out: JSON: predicted and real seconds of the capture and of each student's
training, by the wall clock of the user's own commands in processes of their own, and bytes of each array; medians over
turns, and which goals are met. Each finished part is kept in --work: the same command goes on there. The formula's
figures for this machine stand beside, without a goal. Offline.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks.fidelity.captures import write_json
from cache_spec.layout import array_specs
from cache_spec.receipts import read_manifest, read_receipt
from pipeline.demo import TEACHER

GOAL = 0.15
DEMO_NARROW = '{"n_embd": 128, "n_head": 4}'
NARROW = json.dumps(
    {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
    }
)
"""A narrower student, of the demo's teacher and of SmolLM2-135M."""


class Turns:
    """All turns: plan, capture, train, each as its own command, once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self._refuse_other_settings()

    def turn(self, number: int) -> dict[str, Any]:
        """One plan, and what its commands then took; a turn of an earlier call is read."""
        probe = ("--calibrate", "--probe-seconds", self.options.probe_seconds, "--probe-folder", self.work)
        plan = self._once(f"plan-{number}", partial(self._plan, *probe))
        capture = self._once(f"capture-{number}", self._capture)
        students = [
            self._once(f"student-{number}-{at}", partial(self._train, at, student))
            for at, student in enumerate(self.options.student)
        ]
        return {"plan": plan, "capture": capture, "students": students}

    def _refuse_other_settings(self) -> None:
        """What was done with other settings, in the same folder, is nothing to compare with."""
        settings = {name: value for name, value in vars(self.options).items() if name not in ("work", "turns")}
        found = self._once("settings", lambda: settings)
        if changed := [name for name in settings if found.get(name) != settings[name]]:
            raise SystemExit(f"error: {self.work}: {changed[0]} was {found.get(changed[0])}: choose another --work")

    def formula(self) -> dict[str, Any]:
        """The plan by formula."""
        return self._once("formula", self._plan)

    def _plan(self, *flags: object) -> dict[str, Any]:
        options = self.options
        students = [part for student in options.student for part in ("--student", student)]
        sizes = ["--tokens", options.tokens, "--capture-batch-blocks", options.capture_batch_blocks]
        sizes += ["--batch-blocks", options.batch_blocks, "--epochs", options.epochs]
        text = [part for name in options.text for part in ("--text", name)]
        return kdpipe("plan", "--teacher", options.teacher, *text, *students, *sizes, *self._shared(), *flags)

    def _shared(self) -> list[object]:
        options = self.options
        return [
            "--block-tokens",
            options.block_tokens,
            "--shard-blocks",
            options.shard_blocks,
            *options.capture_flags.split(),
        ]

    def _capture(self) -> dict[str, Any]:
        options, cache = self.options, self.work / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        text = [part for name in options.text for part in ("--text", name)]
        sizes = ("--limit-tokens", options.tokens, "--batch-blocks", options.capture_batch_blocks)
        made = kdpipe("cache-teacher", "--teacher", options.teacher, *text, *sizes, *self._shared(), "--out", cache)
        manifest = read_manifest(cache)
        by_array = dict.fromkeys(array_specs(manifest), 0)
        for shard in range(manifest.blocks.num_shards):
            receipt = read_receipt(cache, manifest, shard)
            assert receipt is not None
            for name in by_array:
                by_array[name] += receipt.files[name].num_bytes
        return {**made, "bytes_by_array": by_array}

    def _train(self, at: int, student: str) -> dict[str, Any]:
        options, out = self.options, self.work / f"student-{at}"
        shutil.rmtree(out, ignore_errors=True)
        described = (
            ("--num-layers", student) if student.isdecimal() else ("--student", "config", "--student-config", student)
        )
        teacher = ("--teacher", options.teacher) if student.isdecimal() else ()
        sizes = ("--batch-blocks", options.batch_blocks, "--epochs", options.epochs)
        return kdpipe("train-student", "--cache", self.work / "cache", "--out", out, *described, *teacher, *sizes)

    def _once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.work / f"{name}.json"
        if not path.exists():
            print(f"{time.strftime('%H:%M:%S')}  {name}", file=sys.stderr, flush=True)
            write_json(path, make())
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def kdpipe(command: str, *arguments: object) -> dict[str, Any]:
    """What a command says, and the seconds of its whole process: ``wall_s``."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", command, *map(str, arguments), "--json"],
        stdout=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True,
    )
    facts: dict[str, Any] = json.loads(done.stdout)
    return {**facts, "wall_s": time.perf_counter() - began}


class Figure(NamedTuple):
    """What was said and what it took, in ``unit``."""

    predicted: float
    real: float
    unit: str


def compared(turns: Sequence[dict[str, Any]], goal: float | None = GOAL) -> list[dict[str, Any]]:
    """Each predicted figure beside the real one: medians over turns, and their quotient less one; whether it is within
    the ``goal``, where there is one."""
    of_turns = [_figures(turn) for turn in turns]
    rows = []
    for what, first in of_turns[0].items():
        figures = [of_turn[what] for of_turn in of_turns]
        predicted = statistics.median(figure.predicted for figure in figures)
        real = statistics.median(figure.real for figure in figures)
        error = predicted / real - 1
        rows.append(
            {
                "what": what,
                "unit": first.unit,
                "predicted": round(predicted, 3),
                "real": round(real, 3),
                "error": round(error, 4),
                "errors_of_turns": [round(figure.predicted / figure.real - 1, 4) for figure in figures],
                **({} if goal is None else {"goal": f"within {goal:g}", "met": abs(error) <= goal}),
            }
        )
    return rows


def _figures(turn: Mapping[str, Any]) -> dict[str, Figure]:
    plan, capture, students = turn["plan"], turn["capture"], turn["students"]
    figures = {"capture": Figure(3600 * plan["capture"]["hours"], capture["wall_s"], "s")}
    for said, took in zip(plan["students"], students, strict=True):
        figures[f"training, {said['name']}"] = Figure(3600 * said["hours"], took["wall_s"], "s")
    took_s = capture["wall_s"] + sum(student["wall_s"] for student in students)
    figures["all"] = Figure(3600 * plan["totals"]["cached_hours"], took_s, "s")
    figures["bytes"] = Figure(plan["cache"]["bytes"], capture["bytes"], "bytes")
    for name, size in capture["bytes_by_array"].items():
        if size >= 0.01 * capture["bytes"]:
            figures[f"bytes, {name}"] = Figure(plan["cache"]["bytes_by_array"][name], size, "bytes")
    return figures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default=str(TEACHER), help="folder")
    parser.add_argument("--text", nargs="+", default=["python-docs:train"])
    parser.add_argument("--student", nargs="+", help="as kdpipe plan takes it: layers, or JSON")
    parser.add_argument("--tokens", type=int, help="to capture")
    parser.add_argument("--block-tokens", type=int)
    parser.add_argument("--shard-blocks", type=int, default=64)
    parser.add_argument("--capture-batch-blocks", type=int)
    parser.add_argument("--batch-blocks", type=int)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--capture-flags", help="further flags of plan and cache-teacher, in one string")
    parser.add_argument("--probe-seconds", type=float, default=60.0)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep what is done in; default: a temporary one")
    options = parser.parse_args()
    demo = Path(options.teacher).resolve() == TEACHER.resolve()
    sizes: dict[str, Any] = {"tokens": 65_536, "block_tokens": 256, "capture_batch_blocks": 16, "batch_blocks": 4}
    if not demo:
        sizes = {"tokens": 12_288, "block_tokens": 512, "capture_batch_blocks": 2, "batch_blocks": 2}
    flags = "--k 8 --residual-draws 8 --prototypes 64 --calibration-tokens 16384 --hidden-window 16"
    sizes |= {"capture_flags": flags if demo else "--calibration-tokens 4096"}
    for name, value in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.student is None:
        options.student = ["3", DEMO_NARROW] if demo else ["4", NARROW]
    options.teacher = str(Path(options.teacher).absolute())
    options.text = [str(Path(name).absolute()) if Path(name).exists() else name for name in options.text]
    return options


def report(options: argparse.Namespace) -> dict[str, Any]:
    """All turns, compared."""
    campaign = Turns(options)
    turns = [campaign.turn(number) for number in range(options.turns)]
    formula = campaign.formula()
    return {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "parameters": [student["parameters"] for student in turns[0]["plan"]["students"]],
        "probe_seconds": [round(turn["plan"]["wall_s"], 1) for turn in turns],
        "probe_cpu_share": [round(turn["plan"]["probe"]["cpu_share"], 3) for turn in turns],
        "figures": compared(turns),
        "by_formula": compared([{**turn, "plan": formula} for turn in turns], goal=None),
    }


def main() -> None:
    """Run what is not there yet, and print."""
    options = _options()
    if options.work is not None:
        options.work = options.work.absolute()
        print(json.dumps(report(options), indent=2))
        return
    with TemporaryDirectory() as work:
        options.work = Path(work)
        print(json.dumps(report(options), indent=2))


if __name__ == "__main__":
    main()
