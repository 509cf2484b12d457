"""Everything that a report shows, as plain JSON values: settings come in, files are read, one dictionary goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from train.report.cache_facts import cache_facts
from train.report.config import ReportConfig
from train.report.inert import plain
from train.report.measured import Family, Plan, read_evaluation, read_family_report, read_plan
from train.report.run_facts import run_facts
from train.run_files import RUN_NAME

Facts = dict[str, Any]


def report_facts(config: ReportConfig) -> Facts:
    """Read all that ``config`` names.

    ``title``, ``made`` (UTC), ``kdpipe`` (version), ``cache``, ``runs``, ``family``, ``evaluations``, ``plan`` and
    ``happened``; None or empty where nothing of the kind was asked for. Raises BadInputError, among its kinds those of
    ``CacheReader.open``, ``not-a-run``, ``damaged-run``, ``not-a-family``, ``not-an-evaluation`` and ``not-a-plan``.
    """
    # Small files first: a mistake among them shows before a cache is read.
    plan = None if config.plan is None else read_plan(config.plan)
    evaluations = [{"file": str(path), **read_evaluation(path).model_dump()} for path in config.evaluation]
    family = None if config.family is None else read_family_report(config.family)
    runs = [run_facts(folder) for folder in config.run]
    if config.family is not None and family is not None:
        runs += _family_runs(config.family, family, {Path(run["folder"]).resolve() for run in runs})
    cache = None if config.cache is None else cache_facts(config)
    facts: Facts = {
        "title": config.title or _title(config, cache),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "kdpipe": metadata.version("kdpipe"),
        "cache": cache,
        "runs": runs,
        "family": None if family is None else {"folder": str(config.family), **family.model_dump()},
        "evaluations": evaluations,
        "plan": None if plan is None else {"file": str(config.plan), **plan.model_dump()},
        "happened": [] if plan is None else happened(plan, cache, runs),
    }
    shown: Facts = plain(facts)
    return shown


def _family_runs(folder: Path, family: Family, known: set[Path]) -> list[Facts]:
    """Runs of the family's students, as far as they have begun."""
    # A name leads into the folder, and nowhere else.
    folders = {
        student.name: folder / student.name for student in family.students if Path(student.name).name == student.name
    }
    return [
        run_facts(run, name)
        for name, run in folders.items()
        if (run / RUN_NAME).is_file() and run.resolve() not in known
    ]


def _title(config: ReportConfig, cache: Mapping[str, Any] | None) -> str:
    parts = []
    if cache is not None:
        parts.append(f"cache of {cache['teacher']['name']}")
    if config.family is not None:
        parts.append(f"family {config.family.resolve().name}")
    parts += [f"run {folder.resolve().name}" for folder in config.run]
    parts += ["evaluation"] if config.evaluation else []
    parts += ["plan"] if config.plan is not None else []
    title = ", ".join(parts[:3]) + (", and more" if len(parts) > 3 else "")
    return title[:1].upper() + title[1:]


def happened(plan: Plan, cache: Mapping[str, Any] | None, runs: Sequence[Mapping[str, Any]]) -> list[Facts]:
    """What was planned beside what became of it, as far as that is known: ``what``, ``unit``, ``planned``, ``real``,
    ``difference`` (real by planned, minus 1) and ``note``."""
    rows: list[Facts] = []

    def row(what: str, unit: str, planned: float | None, real: float | None, note: str = "") -> None:
        if planned is not None:
            difference = real / planned - 1 if real is not None and planned else None
            names = ("what", "unit", "planned", "real", "difference", "note")
            rows.append(dict(zip(names, (what, unit, planned, real, difference, note), strict=True)))

    sizes = (cache or {}).get("sizes")
    if cache is None or sizes is None:
        row("cache: tokens", "tokens", plan.cache.tokens, None, "no cache was given")
        row("cache: bytes", "bytes", plan.cache.bytes, None, "no cache was given")
    else:
        note = "" if cache["finished"] else "the cache is not finished"
        row("cache: tokens", "tokens", plan.cache.tokens, sizes["tokens"], note)
        row("cache: bytes", "bytes", plan.cache.bytes, sizes["bytes"], note)
        real = {**sizes["arrays"], **sizes["tables"]}
        for name, planned in {**plan.cache.bytes_by_array, **plan.cache.bytes_by_table}.items():
            row(f"cache: {name}", "bytes", planned, real.get(name), note)
    if plan.capture is not None:
        row("capture: time", "hours", plan.capture.hours, None, "a cache does not record how long its capture took")
    for student in plan.students:
        run = _run_of(student.name, student.parameters, plan, runs)
        if run is None:
            row(f"{student.name}: training", "hours", student.hours, None, "no run of this name")
            continue
        note = "" if run["finished"] else f"not finished: step {run['steps']} of {run['total_steps']}"
        hours = run["seconds"] / 3600 if run["finished"] and run["seconds"] is not None else None
        row(f"{student.name}: parameters", "parameters", student.parameters, run["parameters"])
        row(f"{student.name}: tokens", "tokens", student.tokens, run["tokens"], note)
        row(f"{student.name}: training", "hours", student.hours, hours, note)
        row(f"{student.name}: speed", "tokens/s", student.tokens_per_s, run["tokens_per_s"], note)
    return rows


def _run_of(
    name: str, parameters: int | None, plan: Plan, runs: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The run of a planned student: that of its name, or else the only one of its size."""
    named = [run for run in runs if run["name"] == name]
    if named:
        return named[0]
    planned = [student for student in plan.students if student.parameters == parameters]
    sized = [run for run in runs if parameters is not None and run["parameters"] == parameters]
    return sized[0] if len(planned) == len(sized) == 1 else None
