"""Facts about training runs, finished or going on: run folders come in, plain JSON values go out.

Long metrics are thinned to means over equally many lines in a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_spec.errors import BadInputError
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
    result = read_json(folder / RESULT_NAME) or {}
    lines = read_metrics(folder)
    last: Mapping[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
    kept = _newest_position(folder)
    return {
        "name": name or folder.resolve().name,
        "folder": str(folder),
        "finished": bool(result),
        "fingerprint": run.get("fingerprint"),
        "settings": {key: value for key, value in _mapping(run.get("settings")).items() if value is not None},
        "cache": _mapping(run.get("config")).get("cache"),
        "student": _mapping(run.get("student")),
        "versions": _mapping(run.get("versions")),
        "total_steps": run.get("total_steps"),
        "stopped_by": result.get("stopped_by"),
        "steps": result.get("steps", last.get("step", 0)),
        "tokens": result.get("tokens", last.get("tokens", 0)),
        # Of a run that goes on, what its newest checkpoint knows.
        "seconds": result.get("seconds", kept.get("seconds")),
        "tokens_per_s": result.get("tokens_per_s", _speed(kept)),
        "parameters": result.get("parameters", _mapping(run.get("student")).get("num_parameters")),
        "last": _numbers(last),
        "evaluation": _evaluation(lines, result),
        "num_lines": len(lines),
        "training": _thinned([line for line in lines if "loss" in line]),
        "held_out": _thinned([_held_out(line) for line in lines if f"{EVALUATION}/loss" in line]),
    }


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if type(value) in (int, float)}


def _held_out(line: Mapping[str, Any]) -> dict[str, Any]:
    named = {name.removeprefix(f"{EVALUATION}/"): value for name, value in line.items() if name.startswith(EVALUATION)}
    return {"step": line["step"], **named}


def _evaluation(lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, float]:
    """The newest figures on held-out text."""
    newest = next((_held_out(line) for line in reversed(lines) if f"{EVALUATION}/loss" in line), {})
    return _numbers(_mapping(result.get("evaluation")) or newest)


def _thinned(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Columns of the lines' numbers; None where a line has no such number."""
    size = -(-len(lines) // _MOST_POINTS) or 1
    groups = [[_numbers(line) for line in lines[start : start + size]] for start in range(0, len(lines), size)]
    names = dict.fromkeys(name for group in groups for line in group for name in line)
    columns: dict[str, list[float | None]] = {name: [] for name in names}
    for group in groups:
        for name, column in columns.items():
            values = [line[name] for line in group if name in line]
            # Where a group ends is where it is drawn.
            is_place = name in ("step", "epoch", "tokens")
            column.append((values[-1] if is_place else sum(values) / len(values)) if values else None)
    return columns


def _newest_position(folder: Path) -> dict[str, Any]:
    """Steps, tokens and seconds of the newest checkpoint; nothing where there is none that can be read."""
    for checkpoint in sorted((folder / CHECKPOINTS_NAME).glob("step-*"), reverse=True):
        try:
            return _mapping(json.loads((checkpoint / _STATE_NAME).read_bytes()).get("position"))
        except (OSError, ValueError, AttributeError):
            continue
    return {}


def _speed(position: Mapping[str, Any]) -> float | None:
    tokens, seconds = position.get("tokens"), position.get("seconds")
    return round(tokens / seconds, 1) if tokens and seconds else None
