"""The files of a run folder that can be read without torch: their names, the metrics, JSON objects.

In: a run's folder. Out: what its files say; CheckpointError for what is damaged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cache_spec.errors import BadInputError

RUN_NAME = "run.json"
RESULT_NAME = "result.json"
STUDENT_NAME = "student"
CHECKPOINTS_NAME = "checkpoints"
METRICS_NAME = "metrics.jsonl"
FAMILY_NAME = "family.json"
"""In the folder of a family, beside its runs."""
CLOCK_METRICS = frozenset({"tokens_per_s", "wait_s"})
"""What a clock says in a line of metrics: not the same in two runs that are equal."""
EVALUATION = "evaluate"
"""What stands before the names of figures on a held-out cache, in metrics and TensorBoard."""


class CheckpointError(BadInputError):
    """A checkpoint or run folder on disk is damaged or does not fit."""


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the whole lines of ``metrics.jsonl``; a last line cut short by a kill is left out."""
    path = out / METRICS_NAME
    if not path.is_file():
        return []
    hint = "remove this file to go on without it"
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise CheckpointError("damaged-run", path, found=error, hint=hint) from None
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or type(step := line.get("step")) is not int or not 0 <= step < 2**63:
            place = f"{path}, line {number}"
            raise CheckpointError("damaged-run", place, expected="an object with a step", hint=hint)
    return lines


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of a run; None if there is no file, CheckpointError ``damaged-run`` for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError("damaged-run", path, found=error) from None
    if not isinstance(content, dict):
        raise CheckpointError("damaged-run", path, expected="an object")
    return content
