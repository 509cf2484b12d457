"""The description of a family of students: a YAML file and what the command line says come in, checked runs go out.

    common:            settings of every student, by the names that ``kdpipe train-student`` has
    students:          name -> what is different in this student; null takes a common setting back
    control: true      beside each student its twin that learns from the text alone
    evaluate:          settings of ``kdpipe evaluate`` for the table at the end
    speed:             how generation is timed for it

A setting of the command line replaces a common one; what a student says of itself stays.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cache_spec.address import CopySettings
from cache_spec.errors import BadInputError
from train.config import TrainConfig
from train.evaluation.config import EvaluateConfig
from train.evaluation.speed import SpeedConfig

_SECTIONS = ("common", "students", "control", "evaluate", "speed")
_OF_THE_FAMILY = ("cache", "out")
_OF_ONE_EVALUATION = ("models", "out", "speed", "prompt_tokens", "new_tokens", "rounds")
"""What the family has settings or files of its own for."""
Model = TypeVar("Model", bound=BaseModel)
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OF_THE_LOSS = ("kl_schedule", "ce_schedule", "hidden_schedule", "divergence", "js_beta", "hidden_centre")
CONTROL_SUFFIX = "-control"
CONTROL_SETTINGS: dict[str, Any] = {
    "kl_weight": 0.0,
    "ce_weight": 1.0,
    "cosine_weight": 0.0,
    "mse_weight": 0.0,
    **{name: TrainConfig.model_fields[name].default for name in _OF_THE_LOSS},
}
"""What makes a student its own control: the text's next token is all that it learns from, all the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyStudent:
    """One student of a family."""

    name: str
    """Of its folder, too."""
    config: TrainConfig
    control_of: str | None = None
    """The student whose twin this is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Students of one cache, in the order in which they are trained; a control follows its student."""

    cache: Path | str
    out: Path
    students: tuple[FamilyStudent, ...]
    evaluate: EvaluateConfig | None
    """Of what is measured on; its models are put in later. None: nothing to measure on was named."""
    speed: SpeedConfig


def read_family(
    path: Path, *, cache: Path | str, out: Path, given: Mapping[str, Any], evaluate: Mapping[str, Any], control: bool
) -> Family:
    """Read and check a file of students.

    ``given`` and ``evaluate`` are settings of the command line. Raises BadInputError ``unknown-students``,
    ``bad-students``, ``unknown-key`` or ``bad-student-name``, naming the file and, where there is one, the student.
    """
    body = _read(path)
    for key in body:
        _refuse_unknown(key, _SECTIONS, str(path))
    common = _settings(body.get("common"), TrainConfig, f"{path}: common")
    named = body.get("students")
    if not isinstance(named, dict) or not named:
        raise BadInputError("bad-students", f"{path}: students", expected="at least one name with its settings")
    has_control = body.get("control", False)
    if not isinstance(has_control, bool):
        raise BadInputError("bad-students", f"{path}: control", expected="true or false", found=has_control)
    students: list[FamilyStudent] = []
    for name, own in named.items():
        place = f"{path}: students: {name}"
        _check_name(name, path)
        settings = common | dict(given) | _settings(own, TrainConfig, place)
        students.append(_student(name, settings, cache, out, place))
        of = students[-1].config
        # A student of the text alone would be its own twin.
        if (control or has_control) and of.kl_weight + of.cosine_weight + of.mse_weight > 0:
            twin = f"{name}{CONTROL_SUFFIX}"
            of_text = settings | CONTROL_SETTINGS
            if of.schedule != "wsd":
                of_text.pop("cooldown", None)  # it was of the weights' schedules alone
            students.append(_student(twin, of_text, cache, out, f"{path}: students: {twin}", name))
    _refuse_twice([student.name for student in students], path)
    measured = _settings(body.get("evaluate"), EvaluateConfig, f"{path}: evaluate") | dict(evaluate)
    copies = {name: given[name] for name in CopySettings.model_fields if name in given}
    return Family(
        cache=cache,
        out=out,
        students=tuple(students),
        evaluate=_checked(EvaluateConfig, copies | measured | {"models": ("student",)}, f"{path}: evaluate")
        if measured
        else None,
        speed=_checked(SpeedConfig, _settings(body.get("speed"), SpeedConfig, f"{path}: speed"), f"{path}: speed"),
    )


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML's own loader would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise _Twice(key, key_node.start_mark.line + 1)
            seen.add(key if isinstance(key, Hashable) else str(key))
        return super().construct_mapping(node, deep)


class _Twice(Exception):
    def __init__(self, key: object, line: int) -> None:
        super().__init__(key, line)
        self.key, self.line = key, line


def _read(path: Path) -> dict[str, Any]:
    try:
        body = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise BadInputError(
            "unknown-students", path, expected="a YAML file of students", found="no such file"
        ) from None
    except _Twice as error:
        place = f"{path}, line {error.line}: {error.key}"
        raise BadInputError("bad-students", place, expected="each name once", found="it is given twice") from None
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise BadInputError("bad-students", path, found=error) from None
    if not isinstance(body, dict):
        raise BadInputError("bad-students", path, expected="a mapping with students")
    return {str(key): value for key, value in body.items()}


def _settings(given: object, model: type[BaseModel], place: str) -> dict[str, Any]:
    """A section's settings by their field names; keys may use ``-`` or ``_``."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise BadInputError("bad-students", place, expected="settings by name", found=given)
    settings = {str(key).replace("-", "_"): value for key, value in given.items()}
    if len(settings) < len(given):
        raise BadInputError("bad-students", place, expected="each setting once")
    known = [name for name in model.model_fields if not (model is EvaluateConfig and name in _OF_ONE_EVALUATION)]
    for key in settings:
        if model is TrainConfig and key in _OF_THE_FAMILY:
            hint = f"one {key} serves the whole family: give --{key}"
            raise BadInputError("unknown-key", f"{place}: {key}", hint=hint)
        _refuse_unknown(key, known, place)
    return settings


def _refuse_unknown(key: str, known: tuple[str, ...] | list[str], place: str) -> None:
    if key not in known:
        raise BadInputError("unknown-key", f"{place}: {key}", expected="one of " + ", ".join(known))


def _student(
    name: str, settings: Mapping[str, Any], cache: Path | str, out: Path, place: str, control_of: str | None = None
) -> FamilyStudent:
    config = _checked(TrainConfig, {**settings, "cache": cache, "out": out / name}, place)
    return FamilyStudent(name=name, config=config, control_of=control_of)


def _checked(model: type[Model], settings: Mapping[str, Any], place: str) -> Model:
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        where = place + (f": {first['loc'][0]}" if first["loc"] else "")
        raise BadInputError("bad-students", where, found=first["msg"].removeprefix("Value error, ")) from None


def _check_name(name: object, path: Path) -> None:
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name) or name.endswith("."):
        hint = "put it in quotes" if not isinstance(name, str) else None
        expected = "a name of at most 100 letters, digits, '.', '_' and '-' that makes a folder"
        raise BadInputError("bad-student-name", f"{path}: students: {name}", expected=expected, hint=hint)
    if name.lower().startswith("family."):
        raise BadInputError(
            "bad-student-name", f"{path}: students: {name}", expected="no name of the family's own files"
        )


def _refuse_twice(names: list[str], path: Path) -> None:
    """Names that differ by case alone are one folder on some systems."""
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            found = f"{seen[name.lower()]} too, and both would be one folder"
            raise BadInputError("bad-student-name", f"{path}: students: {name}", expected="each name once", found=found)
        seen[name.lower()] = name
