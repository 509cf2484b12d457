"""``python -m benchmarks.budget``: what the same time gives with a teacher's cache, with the teacher, and with neither.

In: a teacher, a text, held-out text, and minutes. Out: JSON on standard output and a table on standard error. Every
contender has a process of its own, and everything that it would wait for is taken off its minutes: the start of Python,
tokenising, and for the first student the teacher's run over the text. The other students have its cache for nothing.
Evaluation comes after. What is done lies in the folder of --work, and the same command goes on from there.

    python -m benchmarks.budget --teacher FOLDER --text TEXT --held-out OTHER-TEXT --minutes 30 --work FOLDER
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.budget.text import ENCODING
from benchmarks.budget.ways import CACHED, WAYS
from benchmarks.fidelity.captures import kdpipe, write_json
from benchmarks.training.contenders import CE_WEIGHT, KL_WEIGHT, Task
from benchmarks.workers import Process
from cache_spec.manifest import MANIFEST_NAME
from cache_spec.reader import CacheReader
from pipeline.settings import recipe_path
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import evaluate_models
from train.family_config import read_family
from train.run_files import STUDENT_NAME

_MODULE = "benchmarks.budget.ways"
_MEASURES = ("loss_nats", "kl_to_teacher", "agreement", "ece")
_COLUMNS = {
    "student": "student",
    "way": "way",
    "loss_nats": "loss",
    "kl_to_teacher": "KL",
    "agreement": "agreement",
    "tokens": "tokens",
    "distinct_tokens": "distinct",
    "epochs": "epochs",
    "steps": "steps",
    "data_s": "data s",
    "training_s": "training s",
    "spent_s": "spent s",
}


class Campaign:
    """All contenders of one folder, one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.students = _students(options)
        self.pays = next(iter(self.students))
        """The student whose time the capture takes."""
        (self.work / "results").mkdir(parents=True, exist_ok=True)
        self.held_out = _held_out(options)

    def results(self) -> Iterator[dict[str, Any]]:
        """Those that lie in the folder, and the others as soon as they are there."""
        for student, way in itertools.product(self.students, WAYS):
            out = self.work / "runs" / f"{student}.{way}"
            made = functools.partial(self._trained, student, way, out)
            yield _once(self.work / "results" / f"{out.name}.json", made)

    def _trained(self, student: str, way: str, out: Path) -> dict[str, Any]:
        data = self.cache() if way == CACHED else self.text()
        data_s = data["seconds"] if way != CACHED or student == self.pays else 0.0
        task = Task(
            cache=str(self.work / ("cache" if way == CACHED else "text")),
            teacher=self.options.teacher,
            student=self.students[student],
            batch_blocks=self.options.batch_blocks,
        )
        # Of one that was killed nobody knows how long it took: it begins anew.
        shutil.rmtree(out, ignore_errors=True)
        left_s = 60 * self.options.minutes - data_s - self.options.reserve
        made = self._in_process("train", left_s, way=way, task=asdict(task), out=str(out))
        config = EvaluateConfig(models=(str(out / STUDENT_NAME),), cache=self.held_out, device="cpu", batch_blocks=2)
        measured = evaluate_models(config, quiet=True)[0]
        shutil.rmtree(out)
        return {
            "student": student,
            "way": way,
            "parameters": measured["parameters"],
            **{name: measured["cache"][name] for name in _MEASURES},
            "teacher_loss": measured["cache"]["teacher_loss"],
            "tokens": made["tokens"],
            # Every epoch shows each block once, and all blocks are whole.
            "distinct_tokens": min(made["tokens"], data["tokens"]),
            "epochs": round(made["tokens"] / data["tokens"], 3),
            "steps": made["steps"],
            "data": data,
            "data_s": data_s,
            "training_s": made["seconds"],
            "process_s": made["process_s"],
            "spent_s": round(data_s + made["process_s"], 3),
        }

    def text(self) -> dict[str, Any]:
        """The text in blocks, without a teacher, and the seconds that took."""
        settings = self._capture_settings("text") | ENCODING | {"limit_tokens": self.options.text_tokens}
        return self._data("text", settings, "text")

    def cache(self) -> dict[str, Any]:
        """The teacher's cache, and the seconds that took."""
        left_s = 60 * self.options.minutes * self.options.capture_share
        return self._data("cache", self._capture_settings("cache") | self.options.capture_settings, "capture", left_s)

    def _capture_settings(self, name: str) -> dict[str, Any]:
        options = self.options
        return {
            "teacher": options.teacher,
            "text": options.text,
            "out": str(self.work / name),
            "block_tokens": options.block_tokens,
            "device": "cpu",
        }

    def _data(self, name: str, settings: dict[str, Any], do: str, seconds: float | None = None) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            shutil.rmtree(self.work / name, ignore_errors=True)
            made = self._in_process(do, seconds, settings=settings)
            return {**made, "seconds": made.pop("process_s")}

        return _once(self.work / f"{name}.json", make)

    def _in_process(self, do: str, seconds: float | None, **order: Any) -> dict[str, Any]:
        """The answer of a process that is to be done in some seconds; ``process_s`` is from its start to its end."""
        print(f"{time.strftime('%H:%M:%S')}  {do} {order.get('out', '')}", file=sys.stderr, flush=True)
        began = time.monotonic()
        environment = {"OMP_NUM_THREADS": str(self.options.threads)}
        worker = Process(_MODULE, str(self.options.threads), environment=environment)
        try:
            answer = worker.ask(do, **order, **({} if seconds is None else {"end": began + seconds}))
        finally:
            worker.close()
        return {**answer, "process_s": round(time.monotonic() - began, 3)}


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        write_json(path, make())
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _students(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the file of students says of those that are asked for, in that order."""
    place = Path("-")
    measured = {"cache": place}
    family = read_family(recipe_path(options.sizes), cache=place, out=place, given={}, evaluate=measured, control=False)
    described = {
        one.name: one.config.model_dump(mode="json", exclude_unset=True, exclude={"cache", "out"})
        for one in family.students
        if one.control_of is None
    }
    if unknown := [name for name in options.students if name not in described]:
        raise SystemExit(f"error: --students {unknown[0]}: {options.sizes} has {', '.join(described)}")
    return {name: described[name] for name in options.students}


def _held_out(options: argparse.Namespace) -> Path:
    """A cache to measure on: the one given, or one of the given text, by which distances are exact."""
    if (Path(options.held_out) / MANIFEST_NAME).exists():
        return Path(options.held_out)
    made: Path = options.work / "held-out"
    flags = ("--block-tokens", options.block_tokens, "--limit-tokens", options.held_out_tokens, "--device", "cpu")
    exact = ("--encoding", "hidden", "--hidden-window", 0, "--temperatures", "1")
    kdpipe("cache-teacher", "--teacher", options.teacher, "--text", options.held_out, "--out", made, *flags, *exact)
    return made


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for people."""
    cells = [list(_COLUMNS.values())]
    cells += [[_cell(result[name]) for name in _COLUMNS] for result in results]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = sum(isinstance(results[0][name], str) for name in _COLUMNS) if results else 0
    return [
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4f}" if abs(value) < 20 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", required=True, help="folder")
    parser.add_argument("--text", required=True, nargs="+", help="to learn from")
    parser.add_argument("--held-out", required=True, help="cache by this teacher or text, of what --text has not")
    parser.add_argument("--minutes", type=float, required=True, help="of each contender")
    parser.add_argument("--work", type=Path, required=True, help="folder of what is made")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sizes", default="sizes", help="file of students, as train-student --students takes it")
    parser.add_argument("--students", nargs="+", default=["layers-4", "layers-6", "layers-6-width-384"])
    parser.add_argument("--capture-share", type=float, default=0.4, help="of the first student's minutes")
    parser.add_argument("--capture-settings", type=json.loads, default={}, help="JSON; default: cache-teacher's own")
    parser.add_argument("--block-tokens", type=int, default=512)
    parser.add_argument("--batch-blocks", type=int, default=2, help="of a step")
    parser.add_argument("--text-tokens", type=int, help="for those without a cache; default: 60,000 for each minute")
    parser.add_argument("--held-out-tokens", type=int, default=16_384, help="to measure on")
    parser.add_argument("--reserve", type=float, default=15.0, help="seconds that steps leave for start and export")
    options = parser.parse_args()
    # Workers start in another folder.
    options.teacher, options.held_out = _absolute(options.teacher), _absolute(options.held_out)
    options.text, options.work = [*map(_absolute, options.text)], options.work.absolute()
    if options.text_tokens is None:
        options.text_tokens = max(options.block_tokens * options.batch_blocks, int(60_000 * options.minutes))
    return options


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _refuse_other_settings(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Results of other settings, that lie in the same folder, are nothing to compare with."""
    path = options.work / "settings.json"
    options.work.mkdir(parents=True, exist_ok=True)
    found = _once(path, lambda: settings)
    if changed := [name for name in settings if found.get(name) != settings[name]]:
        raise SystemExit(f"error: {path}: {changed[0]} was {found.get(changed[0])}: choose another --work")


def main() -> None:
    """Train what is not there yet, and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("students", "work")}
    settings = json.loads(json.dumps(settings)) | {"pays_for_the_cache": options.students[0]}
    _refuse_other_settings(options, settings)
    campaign = Campaign(options)
    results = []
    for result in campaign.results():
        results.append(result)
        for line in table(results):
            print(line, file=sys.stderr, flush=True)
    report = {
        "settings": settings,
        "students": campaign.students,
        "weights": {"kl": KL_WEIGHT, "ce": CE_WEIGHT, "temperature": 1.0, "of_text": {"kl": 0.0, "ce": 1.0}},
        "encoding": CacheReader.open(options.work / "cache").manifest.encoding.model_dump(mode="json"),
        "held_out_tokens": CacheReader.open(campaign.held_out).manifest.corpus.num_tokens,
        "machine": f"{platform.system()} {platform.machine()}, {options.threads} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "results": results,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
