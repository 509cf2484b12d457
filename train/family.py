"""Many students of one cache: a checked family comes in, trained students and one report on all of them go out.

OUT/NAME/          the run of each student, as ``kdpipe train-student`` leaves it
OUT/family.json    what became of each, and all figures      OUT/family.csv, family.md, family.png    the same to read

One student after the other; the same command goes on where a stopped one was, and leaves finished students alone. A
student that fails is reported and the others go on.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_spec.durable import replace_file
from cache_spec.errors import BadInputError, KdpipeError, WouldLoseDataError
from cache_spec.failures import first_line
from cache_spec.reader import CacheReader
from train.evaluation.config import EvaluateConfig
from train.evaluation.corpora import read_corpus
from train.evaluation.evaluate import evaluate_models
from train.evaluation.scorer import pick_dtype
from train.evaluation.speed import measure_speeds
from train.evaluation.text import read_text
from train.family_config import Family, FamilyStudent
from train.family_plots import draw_family, require_matplotlib
from train.family_report import report_csv, report_markdown
from train.loop import train
from train.planning import plan
from train.ranks import ranks_of_environment
from train.run import first_student, loss_weights, pick_device, pick_precision, run_identity
from train.run_files import FAMILY_NAME, RUN_NAME, STUDENT_NAME
from train.run_folder import finished_result, goes_on, locked, refuse_foreign

logger = logging.getLogger("kdpipe")

PLOT_NAME = "family.png"
_LOCK_NAME = ".family.lock"


def train_family(family: Family, *, plots: bool | None = None, quiet: bool = False) -> dict[str, Any]:
    """Train, measure and report every student; returns what ``family.json`` says.

    ``students``: for each ``name``, ``control_of``, ``status`` (``done``, ``failed`` or ``waiting``), ``error``,
    ``parameters``, ``training_tokens``, ``training_epochs`` (passes over the cache that these were),
    ``training_hours``, ``evaluation`` (a row of ``evaluate_models``) and ``speed`` (the fields of ``Speed``); what is
    not known is None. ``plots``: draw them; None: if matplotlib is there.

    Everything is checked, and every new student built once, before the first is trained: KdpipeError, naming the
    student, for one that could not be. SIGINT and SIGTERM leave a checkpoint and raise KeyboardInterrupt.
    """
    refuse_ranks()
    if plots is not False:
        plots = require_matplotlib(asked=plots is not None)
    with _claimed(family.out):
        check_family(family)
        before = _report_before(family.out)
        cache_tokens = CacheReader.open(family.cache, family.students[0].config).manifest.corpus.num_tokens
        rows = [_row(student) for student in family.students]
        for number, (student, row) in enumerate(zip(family.students, rows, strict=True), 1):
            logger.info("student %s, %d of %d", student.name, number, len(rows))
            _train(student, row, cache_tokens, quiet=quiet)
            _write(family, rows)
        done = [(student, row) for student, row in zip(family.students, rows, strict=True) if row["status"] == "done"]
        if family.evaluate is not None:
            for student, row in done:
                _evaluate(student, row, family.evaluate, before.get(student.name), quiet=quiet)
                _write(family, rows)
        _time([(student, row) for student, row in done if row["status"] == "done"], family, before)
        report = _write(family, rows)
        if plots:
            draw_family(report, family.out / PLOT_NAME)
    return report


def refuse_ranks() -> None:
    """Raise BadInputError ``family-of-ranks`` in a process of a launch: students of a family have one process each."""
    num_ranks = ranks_of_environment().num_ranks
    if num_ranks > 1:
        hint = "train each student by itself, in its folder of the family; then the family measures them all"
        raise BadInputError("family-of-ranks", "--students", expected="one process", found=num_ranks, hint=hint)


def plan_family(family: Family) -> dict[str, Any]:
    """Return, for each student, whether it is done, or else what training it would do and cost; writes nothing."""
    students: list[dict[str, Any]] = []
    for student in family.students:
        row: dict[str, Any] = {"name": student.name, "control_of": student.control_of}
        with _named(student):
            _check_run(student, CacheReader.open(family.cache, student.config))
            result = finished_result(student.config.out)
            told = plan(student.config) if result is None else {"parameters": result["parameters"]}
        students.append(row | {"status": "done" if result else "waiting"} | told)
        gc.collect()
    hours = sum(row.get("hours", 0.0) for row in students)
    return {"cache": str(family.cache), "out": str(family.out), "hours": round(hours, 3), "students": students}


def check_family(family: Family) -> None:
    """Raise KdpipeError for a student that cannot be trained from the cache, or whose folder holds something else."""
    reader = CacheReader.open(family.cache, family.students[0].config)
    for student in family.students:
        with _named(student):
            if not _check_run(student, reader):
                first_student(student.config, reader)
        gc.collect()
    if family.evaluate is not None:
        pick_device(family.evaluate.device)
        for name in family.evaluate.text:
            read_text(Path(name).expanduser(), family.evaluate.limit_bytes)
        for given in family.evaluate.corpus:
            read_corpus(given)
        if family.evaluate.cache is not None:
            reader = CacheReader.open(family.evaluate.cache, family.evaluate)
            reader.manifest.temperature_index(family.evaluate.temperature)


def _check_run(student: FamilyStudent, reader: CacheReader) -> bool:
    """Check what costs nothing; returns whether something of this run is there to go on from."""
    config = student.config
    loss_weights(config, reader)
    precision = pick_precision(config.precision, pick_device(config.device))
    refuse_foreign(config.out)
    return goes_on(config.out, run_identity(config, reader, precision))


def _train(student: FamilyStudent, row: dict[str, Any], cache_tokens: int, *, quiet: bool) -> None:
    with _failing(row):
        result = train(student.config, quiet=quiet)
        row |= {
            "status": "done",
            "parameters": result["parameters"],
            "training_tokens": result["tokens"],
            "training_epochs": result["tokens"] / cache_tokens,
            "training_hours": result["seconds"] / 3600,
            "run": {name: result[name] for name in ("steps", "tokens", "seconds", "fingerprint")},
        }


def _evaluate(
    student: FamilyStudent, row: dict[str, Any], settings: EvaluateConfig, before: Any, *, quiet: bool
) -> None:
    row["evaluation_of"] = evaluation_of = {"run": row["run"], **_what_is_measured_on(settings)}
    if before is not None and before.get("evaluation_of") == evaluation_of and before.get("evaluation"):
        row["evaluation"] = before["evaluation"]
        return
    models = (str(student.config.out / STUDENT_NAME),)
    with _failing(row):
        (row["evaluation"],) = evaluate_models(settings.model_copy(update={"models": models}), quiet=quiet)


def _time(done: list[tuple[FamilyStudent, dict[str, Any]]], family: Family, before: dict[str, Any]) -> None:
    """Time all students together, so that their figures compare; earlier ones stay where no student is new."""
    if not done:
        return
    settings = family.speed.model_dump() | {"dtype": _dtype_name(family), "device": _device_name(family)}
    for _, row in done:
        row["speed_of"] = {"run": row["run"], **settings}
    known = [before.get(student.name) or {} for student, _ in done]
    if all(
        old.get("speed") and old.get("speed_of") == row["speed_of"] for old, (_, row) in zip(known, done, strict=True)
    ):
        for old, (_, row) in zip(known, done, strict=True):
            row["speed"] = old["speed"]
        return
    logger.info("timing generation")
    device = pick_device(_device_name(family))
    try:
        speeds = measure_speeds(
            {student.name: student.config.out / STUDENT_NAME for student, _ in done},
            family.speed,
            device=device,
            dtype=pick_dtype(_dtype_name(family), device),
        )
    except KdpipeError as error:
        # The students and their figures are there all the same.
        logger.warning("generation was not timed: %s", error)
        return
    for student, row in done:
        row["speed"] = asdict(speeds[student.name])


def _device_name(family: Family) -> str:
    return family.evaluate.device if family.evaluate is not None else family.students[0].config.device


def _dtype_name(family: Family) -> str:
    return family.evaluate.dtype if family.evaluate is not None else "auto"


def _what_is_measured_on(settings: EvaluateConfig) -> dict[str, Any]:
    """Settings, and the state of the files that they name: a figure holds for these alone."""
    cache = None if settings.cache is None else CacheReader.open(settings.cache, settings).manifest.fingerprint
    named = [*settings.text, *(given.partition("=")[2] for given in settings.corpus)]
    paths = [Path(name).expanduser() for name in named if name]
    files = [os.stat(path) for path in paths if path.is_file()]
    return {
        "settings": settings.model_dump(mode="json", exclude={"models"}),
        "cache": cache,
        "texts": [[file.st_size, file.st_mtime_ns] for file in files],
    }


def _row(student: FamilyStudent) -> dict[str, Any]:
    unknown = ("error", "parameters", "training_tokens", "training_epochs", "training_hours", "evaluation", "speed")
    row = {"name": student.name, "control_of": student.control_of, "status": "waiting"}
    return row | dict.fromkeys(unknown)


@contextmanager
def _failing(row: dict[str, Any]) -> Iterator[None]:
    """Whatever ends one student is written down, and the others go on."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, KdpipeError)
        row |= {"status": "failed", "error": str(error) if known else f"{type(error).__name__}: {first_line(error)}"}
        logger.error("student %s failed: %s", row["name"], row["error"], exc_info=not known)
    finally:
        gc.collect()


@contextmanager
def _named(student: FamilyStudent) -> Iterator[None]:
    """Put the student's name before the place of an error."""
    try:
        yield
    except KdpipeError as error:
        place = f"student {student.name}: {error.place}"
        raise type(error)(error.kind, place, expected=error.expected, found=error.found, hint=error.hint) from None


def _write(family: Family, rows: list[dict[str, Any]]) -> dict[str, Any]:
    report = {
        "format": "kdpipe-family",
        "format_version": 1,
        "cache": str(family.cache),
        "evaluate": None if family.evaluate is None else family.evaluate.model_dump(mode="json", exclude={"models"}),
        "students": rows,
    }
    replace_file(family.out / FAMILY_NAME, json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    replace_file(family.out / "family.csv", report_csv(report).encode())
    replace_file(family.out / "family.md", report_markdown(report).encode())
    return report


def _report_before(out: Path) -> dict[str, Any]:
    """The rows of an earlier report by name; a damaged one only means that all is measured again."""
    try:
        rows = json.loads((out / FAMILY_NAME).read_bytes())["students"]
        return {row["name"]: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold a family's folder for this process alone."""
    if (out / RUN_NAME).is_file() or (out.exists() and not out.is_dir()):
        expected, found = "a new folder or a family's", "a single student's run" if out.is_dir() else "a file"
        raise WouldLoseDataError("not-a-family", out, expected=expected, found=found, hint="give another --out")
    with locked(out / _LOCK_NAME, "family-in-use", "a family that is trained"):
        yield
