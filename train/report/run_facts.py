"""Facts about training runs, finished or going on: run folders come in, plain JSON values go out.

Long metrics are thinned to means over equally many lines in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cache_spec.errors import BadInputError
from train.report.measured import CheckpointState, Kind, Position, Result, Run, first_problem
from train.run_files import CHECKPOINTS_NAME, EVALUATION, RESULT_NAME, RUN_NAME, read_json, read_metrics

_MOST_POINTS = 300
_STATE_NAME = "state.json"


def run_facts(folder: Path, name: str | None = None) -> dict[str, Any]:
    """What a run is, how far it has come and what it measured on the way.

    Raises BadInputError ``not-a-run`` for a folder of anything else, and ``damaged-run``.
    """
    run = read_json(folder / RUN_NAME) if folder.is_dir() else None
    if run is None or run.get("format") != "kdpipe-run":
        raise BadInputError("not-a-run", folder, expected=f"a run's folder, with {RUN_NAME}")
    told = _checked(Run, run, folder / RUN_NAME)
    found = read_json(folder / RESULT_NAME)
    result = _checked(Result, found or {}, folder / RESULT_NAME)
    lines = [_numbers(line) for line in read_metrics(folder)]
    last = next((line for line in reversed(lines) if "loss" in line), {})
    # Of a run that goes on, what its newest checkpoint knows.
    kept = _newest_position(folder)
    seconds = _first(result.seconds, kept.seconds)
    speed = round(kept.tokens / kept.seconds, 1) if kept.tokens and kept.seconds else None
    return {
        "name": name or folder.resolve().name,
        "folder": str(folder),
        "finished": bool(found),
        "fingerprint": told.fingerprint,
        "settings": {key: value for key, value in told.settings.items() if value is not None},
        "cache": told.config.get("cache"),
        "student": told.student.model_dump(exclude_unset=True),
        "versions": told.versions,
        "total_steps": told.total_steps,
        "stopped_by": result.stopped_by,
        "steps": _first(result.steps, last.get("step"), 0),
        "tokens": _first(result.tokens, last.get("tokens"), 0),
        "seconds": seconds,
        "tokens_per_s": _first(result.tokens_per_s, speed),
        "parameters": _first(result.parameters, told.student.num_parameters),
        "last": last,
        "evaluation": _evaluation(lines, result),
        "num_lines": len(lines),
        "training": _thinned([line for line in lines if "loss" in line]),
        "held_out": _thinned([_held_out(line) for line in lines if f"{EVALUATION}/loss" in line]),
    }


def _checked(kind: type[Kind], content: object, path: Path) -> Kind:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise BadInputError("damaged-run", path, found=first_problem(error)) from None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line can be drawn."""
    return {
        name: value
        for name, value in line.items()
        if type(value) is float or (type(value) is int and abs(value) < 2**63)
    }


def _held_out(line: Mapping[str, float]) -> dict[str, float]:
    named = {name.removeprefix(f"{EVALUATION}/"): value for name, value in line.items() if name.startswith(EVALUATION)}
    return {"step": line["step"], **named}


def _evaluation(lines: Sequence[Mapping[str, float]], result: Result) -> dict[str, float]:
    """The newest figures on held-out text."""
    newest = next((_held_out(line) for line in reversed(lines) if f"{EVALUATION}/loss" in line), {})
    return _numbers(result.evaluation or {}) or newest


def _thinned(lines: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Columns of the lines' numbers; None where a line has no such number."""
    size = -(-len(lines) // _MOST_POINTS) or 1
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    names = dict.fromkeys(name for group in groups for line in group for name in line)
    columns: dict[str, list[float | None]] = {name: [] for name in names}
    for group in groups:
        for name, column in columns.items():
            values = [line[name] for line in group if name in line]
            # Where a group ends is where it is drawn.
            is_place = name in ("step", "epoch", "tokens")
            column.append((values[-1] if is_place else sum(values) / len(values)) if values else None)
    return columns


def _newest_position(folder: Path) -> Position:
    """Tokens and seconds of the newest checkpoint; nothing where there is none that can be read."""
    for checkpoint in sorted((folder / CHECKPOINTS_NAME).glob("step-*"), reverse=True):
        try:
            return CheckpointState.model_validate_json((checkpoint / _STATE_NAME).read_bytes()).position
        except (OSError, ValidationError):
            continue
    return Position()
