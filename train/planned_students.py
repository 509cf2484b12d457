"""Students that are only planned: what the command line says of them comes in, configs and settings go out.

A student is a number of the teacher's layers, a config (JSON, by the teacher's names or with a ``model_type``), a
model's folder or a file of students as ``kdpipe train-student --students`` takes it. No cache is there yet, and no
weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedConfig

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.failures import first_line
from train.config import TrainConfig
from train.family_config import read_family
from train.sliced import refuse_unsliceable
from train.student_config import layers_config, sliced_config, student_config
from train.teacher_layers import chosen_layers

_NOWHERE = Path("-")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStudent:
    """A student to be."""

    name: str
    model: PreTrainedConfig
    settings: dict[str, Any]
    """What ``TrainConfig`` is given beside the cache and the run's folder, as plain values."""
    train: TrainConfig
    """The same, checked; cache and folder are not there."""


def planned_students(
    given: Sequence[str],
    teacher: PreTrainedConfig,
    *,
    settings: Mapping[str, Any],
    file_of: Callable[[str], Path],
    load: Callable[[str], PreTrainedConfig],
) -> list[PlannedStudent]:
    """Return the students that ``given`` describes, each name once.

    ``settings`` are those of the command line, for all; ``file_of`` finds a file of students by its name, and ``load``
    the config of a model that exists. Raises BadInputError ``bad-student`` and what building a student raises.
    """
    students: list[PlannedStudent] = []
    for text in given:
        if _is_students_file(text):
            file = file_of(text)
            family = read_family(file, cache=_NOWHERE, out=_NOWHERE, given=settings, evaluate={}, control=False)
            described = [(one.name, _own(one.config)) for one in family.students if one.control_of is None]
        else:
            described = [_described(text, dict(settings))]
        students += [_planned(name, own, teacher, load) for name, own in described]
    return _named_apart(students)


def _is_students_file(text: str) -> bool:
    if text.lstrip().startswith("{"):
        return False
    return text.endswith((".yaml", ".yml")) or (Path(text).expanduser().is_file() and not text.endswith(".json"))


def _own(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_unset=True, exclude={"cache", "out"})


def _described(text: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A student's name and settings, of what is no file of students."""
    place = f"student {text[:80]}"
    if text.isdecimal():
        if not int(text):
            raise BadInputError("bad-student", place, expected="a number of layers above 0", found=0)
        return f"layers-{int(text)}", settings | {"num_layers": int(text)}
    if text.lstrip().startswith("{"):
        return "config", settings | {"student": "config", "student_config": _object(text.encode(), place)}
    path = Path(text).expanduser()
    if text.endswith(".json") and path.is_file():
        return path.stem, settings | {"student": "config", "student_config": _object(path, place)}
    return path.name or text, settings | {"student": "checkpoint", "checkpoint": text}


def _object(content: bytes | Path, place: str) -> Any:
    try:
        body = json.loads(content if isinstance(content, bytes) else content.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError("bad-student", place, expected="a JSON object", found=first_line(error)) from None
    if not isinstance(body, dict):
        raise BadInputError("bad-student", place, expected="a JSON object", found=type(body).__name__)
    return body


def _planned(
    name: str, settings: dict[str, Any], teacher: PreTrainedConfig, load: Callable[[str], PreTrainedConfig]
) -> PlannedStudent:
    place = f"student {name}"
    try:
        train = TrainConfig.model_validate({**settings, "cache": _NOWHERE, "out": _NOWHERE / name})
    except ValidationError as error:
        found = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise BadInputError("bad-student", place, found=found) from None
    try:
        model = _model(train, teacher, load)
    except KdpipeError as error:
        raise type(error)(
            error.kind, f"{place}: {error.place}", expected=error.expected, found=error.found, hint=error.hint
        ) from None
    return PlannedStudent(name=name, model=model, settings=settings, train=train)


def _model(train: TrainConfig, teacher: PreTrainedConfig, load: Callable[[str], PreTrainedConfig]) -> PreTrainedConfig:
    """The config of the student that ``train`` would build from a cache of this teacher."""
    overrides = train.student_config or {}
    if train.student == "checkpoint":
        assert train.checkpoint is not None
        return load(train.checkpoint)
    if train.student == "config":
        if train.num_layers is not None:
            overrides = {**overrides, "num_hidden_layers": train.num_layers}
        eos = teacher.eos_token_id
        eos_token_id = eos[0] if isinstance(eos, list | tuple) else eos
        return student_config(teacher, eos_token_id or 0, overrides)[0]
    num_layers, depth = train.num_layers, teacher.num_hidden_layers
    if train.student == "sliced" and num_layers is None and train.layer_indices is None:
        num_layers = depth
    copied = chosen_layers(depth, num_layers, train.layer_indices, train.layers)
    if train.student == "sliced":
        model, _ = sliced_config(teacher, copied, overrides)
        refuse_unsliceable(teacher, model)
        return model
    return layers_config(teacher, copied, overrides)


def _named_apart(students: list[PlannedStudent]) -> list[PlannedStudent]:
    """Students of one name are counted."""
    names = [student.name for student in students]
    seen: dict[str, int] = {}
    named = []
    for student in students:
        seen[student.name] = number = seen.get(student.name, 0) + 1
        named.append(replace(student, name=f"{student.name}-{number}") if names.count(student.name) > 1 else student)
    return named
