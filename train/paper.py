"""A published recipe's hyper-parameter file in our terms: checked, mapped key for key, or refused with the reason.

In: a JSON object whose keys are those of ``train.paper_keys``, with ``_``, spaces or ``-``, in any case. Out: the
settings of ``cache-teacher`` and of ``train-student`` that follow, key by key, and the table that says so.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from train.paper_keys import BY_NAME, KEYS, KIND_NAMES, PaperKey, Value
from train.paper_masked import masked_capture_settings, masked_train_settings, refuse_masked_conflicts

Mapped = dict[str, dict[str, Any]]
"""Key of the file to our settings that follow from it."""

PICKLE_SUFFIXES = {".pickle", ".pkl"}
_DEFAULT_BLOCK_TOKENS = 1024
_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")
_DEPTHS = ("n_layer", "n_layers", "num_hidden_layers", "num_layers")
_PADDING_OF_ROBERTA = 1
# What a model's file may carry of other tasks or of older versions of its library, and that shapes nothing.
_NOT_SHAPE = {
    "_num_labels",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "label2id",
    "n_ctx",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pruned_heads",
    "task_specific_params",
    "tie_weights_",
    "torchscript",
    "use_bfloat16",
}
# The recipe's own, which no key of the file changes.
_ALWAYS = {"schedule": "linear", "adam_beta1": 0.9, "adam_beta2": 0.98}


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """A recipe's file, every key checked on its own and against the others."""

    path: Path
    values: dict[str, Value]
    """Every key of the table; defaults where the file says nothing."""
    given: frozenset[str]
    """Keys that the file has."""
    student: dict[str, Any]
    """The content of the student's config file."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def cache(self) -> Path:
        """Where both commands expect the cache unless they are told."""
        return Path(f"{os.path.normpath(self['dump_path'])}-cache")

    def refusal(self, kind: str, name: str, **details: Any) -> BadInputError:
        """The error that names a key of the file."""
        return BadInputError(kind, f"{self.path}: {name}", **details)

    def table(self, mapped: Mapped, flags: Iterable[str]) -> list[dict[str, Any]]:
        """One row for each key of the file, and for each other whose default decides something."""
        overruled = set(flags)
        return [
            {
                "key": key.name,
                "value": self[key.name],
                "in_file": key.name in self.given,
                "settings": {k: v for k, v in mapped.get(key.name, {}).items() if k not in overruled},
                "overruled_by": sorted("--" + k.replace("_", "-") for k in mapped.get(key.name, {}) if k in overruled),
                "note": key.note,
            }
            for key in KEYS
            if key.name in self.given or mapped.get(key.name)
        ]


def read_paper(path: Path) -> Paper:
    """Read a recipe's file and check every key: ``unreadable-paper-config``, ``unknown-key``, ``duplicate-key``,
    ``missing-key``, ``wrong-type``, ``out-of-range``, ``unsupported-key``, ``conflicting-keys``."""
    raw: dict[str, tuple[str, object]] = {}
    for spelt, value in _pairs(path):
        name = re.sub(r"[\s_-]+", "_", spelt.strip().lower())
        if name not in BY_NAME:
            raise BadInputError("unknown-key", f"{path}: {spelt}", expected="one of " + ", ".join(BY_NAME))
        if name in raw:
            found = f"it twice, as {raw[name][0]!r} and {spelt!r}"
            raise BadInputError("duplicate-key", f"{path}: {name}", expected="each key once", found=found)
        raw[name] = (spelt, value)
    given = frozenset(name for name, (_, value) in raw.items() if value is not None)
    values: dict[str, Value] = {}
    for key in KEYS:
        if key.name in given:
            values[key.name] = _checked(path, key, raw[key.name][1])
        elif key.required:
            raise BadInputError("missing-key", f"{path}: {key.name}", expected=f"{KIND_NAMES[key.kind]}, {key.note}")
        else:
            values[key.name] = key.default
    for key in KEYS:
        if key.name in given and key.refuse is not None and (reason := key.refuse(values[key.name])):
            raise BadInputError("unsupported-key", f"{path}: {key.name}", found=_shown(values[key.name]), hint=reason)
    paper = Paper(path=path, values=values, given=given, student=_student_file(path, str(values["student_config"])))
    _refuse_conflicts(paper)
    return paper


def capture_settings(paper: Paper, flags: Mapping[str, Any]) -> Mapped:
    """What ``cache-teacher`` takes from the file; flags go on top. Raises ``pickled-text``."""
    if "text" not in flags and is_pickle(paper["data_file"]):
        hint = f"convert it once with `{_import_command(paper)}`, then add --text {shlex.quote(_imported(paper))}"
        raise paper.refusal("pickled-text", "data_file", found=paper["data_file"], hint=hint)
    return {
        "dump_path": {"out": str(paper.cache)},
        "data_file": {"text": [paper["data_file"]], "last_block": "each"},
        "teacher_name": {"teacher": paper["teacher_name"]},
        "temperature": {"temperatures": sorted({1.0, paper["temperature"]})},
        "student_config": {"block_tokens": _block_tokens(paper)},
        "alpha_cos": {"hidden_window": 1 if paper["alpha_cos"] > 0 else 0},
        **masked_capture_settings(paper),
    }


def train_settings(paper: Paper, flags: Mapping[str, Any], *, num_ranks: int = 1) -> Mapped:
    """What ``train-student`` takes from the file; flags go on top. ``train.paper_cache`` checks the cache."""
    if "n_gpu" in paper.given and max(1, paper["n_gpu"]) != num_ranks:
        hint = f"start the command with torchrun --nproc-per-node {paper['n_gpu']}, or change the key"
        raise paper.refusal(
            "conflicting-keys", "n_gpu", expected=f"{num_ranks}, the ranks of this run", found=paper["n_gpu"], hint=hint
        )
    mapped: Mapped = {key.name: {key.setting: paper[key.name]} for key in KEYS if key.setting is not None}
    mapped |= masked_train_settings(paper)
    passes = paper["gradient_accumulation_steps"]
    student, weights = flags.get("student"), paper["student_pretrained_weights"]
    start = str(student or ("checkpoint" if weights else "config"))
    mapped["student_config"] = {"student": start, **_student(paper, start, flags)}
    if start == "checkpoint" and weights:
        _refuse_other_shape(paper, Path(weights).expanduser() / "config.json")
        mapped["student_pretrained_weights"] = {"checkpoint": weights}
    if start == "teacher-layers":
        mapped["teacher_name"] = {"teacher": paper["teacher_name"]}
    if start == "config":
        own = None if "initializer_range" in paper.given else paper.student.get("initializer_range")
        mapped["initializer_range"] = {"initializer_range": paper["initializer_range"] if own is None else own}
    mapped["fp16"] = {"precision": "bf16" if paper["fp16"] else "fp32"}
    mapped["log_interval"] = {"log_every": _steps(paper["log_interval"], passes)}
    mapped["checkpoint_interval"] = {"checkpoint_every": _steps(paper["checkpoint_interval"], passes)}
    if paper["n_gpu"] == 0:
        mapped["n_gpu"] = {"device": "cpu"}
    return mapped


def merged(mapped: Mapped, *, always: bool = False) -> dict[str, Any]:
    """All settings of a mapping as one dictionary, with those that the recipe has without a key."""
    settings = {name: value for of_key in mapped.values() for name, value in of_key.items()}
    return {**_ALWAYS, **settings} if always else settings


def describe(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines for people: a key, its value, our settings, and what it means here."""
    lines = []
    for row in rows:
        ours = [f"{name} = {_shown(value)}" for name, value in row["settings"].items()]
        ours += [f"set by {flag}" for flag in row["overruled_by"]]
        value = _shown(row["value"]) + ("" if row["in_file"] else " (default)")
        lines.append(f"{row['key']:<28}{value:<22}{', '.join(ours) or '-':<40}  {row['note']}")
    return [f"{'key':<28}{'value':<22}{'here':<40}  meaning", *lines]


def capture_command(paper: Paper) -> str:
    """The commands that make the cache of this file, complete."""
    pickled = is_pickle(paper["data_file"])
    text = _imported(paper) if pickled else paper["data_file"]
    words = ["kdpipe", "cache-teacher", "--teacher", paper["teacher_name"], "--text", text, "--out", str(paper.cache)]
    words += ["--temperatures", ",".join(f"{t:g}" for t in sorted({1.0, paper["temperature"]}))]
    words += ["--block-tokens", str(_block_tokens(paper)), "--last-block", "each", "--encoding", "prototype"]
    words += ["--hidden-window", "1" if paper["alpha_cos"] > 0 else "0"]
    for name, value in merged(masked_capture_settings(paper)).items():
        words += [f"--{name.replace('_', '-')}", _shown(value)]
    command = shlex.join(words)
    return f"{_import_command(paper)} && {command}" if pickled else command


def is_pickle(name: str) -> bool:
    """Whether a file must be imported before it can be text."""
    return Path(name).suffix.lower() in PICKLE_SUFFIXES


def _imported(paper: Paper) -> str:
    return str(Path(paper["data_file"]).with_suffix(".ids"))


def _import_command(paper: Paper) -> str:
    return shlex.join(
        ["kdpipe", "import-pickle", paper["data_file"], "--out", _imported(paper), "--tokenizer", paper["teacher_name"]]
    )


def _pairs(path: Path) -> list[tuple[str, object]]:
    """The file's keys and values in order, a repeated key as often as it stands there."""
    kind = "unreadable-paper-config"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInputError(kind, path, expected="a JSON file", found=first_line(error)) from None
    try:
        # As pairs, all the way down: a mapping would hide a repeated key.
        body = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise BadInputError(kind, path, expected="JSON", found=first_line(error)) from None
    if not isinstance(body, _Object):
        raise BadInputError(kind, path, expected="one JSON object", found=type(body).__name__)
    return list(body)


class _Object(list[tuple[str, object]]):
    """A JSON object as its pairs."""


def _checked(path: Path, key: PaperKey, value: object) -> Value:
    place = f"{path}: {key.name}"
    parsed = _parsed(key, value)
    if parsed is None:
        found = json.dumps(value) if isinstance(value, str | int | float | bool) else type(value).__name__
        raise BadInputError("wrong-type", place, expected=KIND_NAMES[key.kind], found=found)
    if isinstance(parsed, int | float):
        bounds = (
            (key.low, "at least", operator.ge),
            (key.above, "above", operator.gt),
            (key.high, "at most", operator.le),
            (key.below, "below", operator.lt),
        )
        for bound, words, holds in bounds:
            if bound is not None and not holds(parsed, bound):
                raise BadInputError("out-of-range", place, expected=f"{words} {bound:g}", found=parsed)
    if key.choices is not None and parsed not in key.choices:
        raise BadInputError("out-of-range", place, expected="one of " + ", ".join(key.choices), found=parsed)
    return parsed


def _parsed(key: PaperKey, value: object) -> Value:
    """A value as its key's type, numbers and truths also from text; None where it is of another."""
    if key.kind == "text":
        return value if isinstance(value, str) and value.strip() else None
    if key.kind == "flag":
        if isinstance(value, str):
            return {"true": True, "false": False}.get(value.strip().lower())
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        if key.kind == "whole" and not isinstance(value, float):
            return int(value)
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    if key.kind == "real":
        return number
    return int(number) if number.is_integer() else None


def _student_file(path: Path, name: str) -> dict[str, Any]:
    place = f"{path}: student_config"
    try:
        body = json.loads(Path(name).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError("bad-student-config", f"{place}: {name}", found=first_line(error)) from None
    if not isinstance(body, dict):
        raise BadInputError("bad-student-config", f"{place}: {name}", expected="one JSON object")
    return body


def _refuse_conflicts(paper: Paper) -> None:
    """Raise ``conflicting-keys`` for values that cannot all be meant."""

    def refuse(name: str, expected: object, found: object) -> None:
        raise paper.refusal("conflicting-keys", name, expected=expected, found=_shown(found))

    refuse_masked_conflicts(paper)
    model_type = paper.student.get("model_type", paper["student_type"])
    if model_type != paper["student_type"]:
        refuse("student_config", f"model_type {paper['student_type']}, the student_type", model_type)
    own = paper.student.get("initializer_range")
    if own is not None and "initializer_range" in paper.given and own != paper["initializer_range"]:
        refuse("initializer_range", f"{own}, as in student_config", paper["initializer_range"])
    shares = [paper[name] for name in ("word_mask", "word_keep", "word_rand")]
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        refuse("word_mask", "word_mask, word_keep and word_rand that add up to 1", sum(shares))
    if not any(paper[name] for name in ("alpha_ce", "alpha_clm", "alpha_mlm", "alpha_cos")):
        refuse("alpha_ce", "a loss with a weight above 0", "alpha_ce, alpha_clm, alpha_mlm and alpha_cos of 0")
    if paper["fp16"] and paper["fp16_opt_level"] != "O1":
        refuse("fp16_opt_level", "O1, autocast over fp32 weights, where fp16 is true", paper["fp16_opt_level"])
    positions = {name: paper.student[name] for name in _POSITIONS if name in paper.student}
    if len(set(map(str, positions.values()))) > 1:
        refuse("student_config", "one number of positions", positions)
    for name, count in positions.items():
        if type(count) is not int or count < 2:
            refuse("student_config", f"{name} of at least 2", count)


def _block_tokens(paper: Paper) -> int:
    tokens = next((int(paper.student[name]) for name in _POSITIONS if name in paper.student), _DEFAULT_BLOCK_TOKENS)
    # In that family the padding takes the first position embeddings.
    unused = int(paper.student.get("pad_token_id", _PADDING_OF_ROBERTA)) + 1
    return tokens - unused if paper["student_type"] == "roberta" else tokens


def _student(paper: Paper, start: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the student's config file becomes, by how the student starts."""
    shape = {name: value for name, value in paper.student.items() if name not in _NOT_SHAPE and name != "model_type"}
    depth = next((paper.student[name] for name in _DEPTHS if name in paper.student), None)
    if start == "config":
        shape.pop("initializer_range", None)
        if "n_ctx" in paper.student and not any(name in shape for name in _POSITIONS):
            shape["max_position_embeddings"] = paper.student["n_ctx"]
        return {"student_config": {"model_type": paper["student_type"], **shape}}
    if start == "teacher-layers":
        if paper["student_type"] != paper["teacher_type"]:
            expected = f"{paper['teacher_type']}, as its layers are copied"
            raise paper.refusal("conflicting-keys", "student_type", expected=expected, found=paper["student_type"])
        # The teacher's shape is the student's but for the depth, which the layers say.
        shape = {name: value for name, value in shape.items() if name not in (*_DEPTHS, "initializer_range")}
        chosen = "num_layers" in flags or "layer_indices" in flags or depth is None
        return {"student_config": shape} if chosen else {"student_config": shape, "num_layers": depth}
    return {}


def _refuse_other_shape(paper: Paper, config: Path) -> None:
    """Raise ``conflicting-keys`` where given weights are of another model than the student's config file says."""
    try:
        body = json.loads(config.read_bytes())
    except (OSError, ValueError):
        return  # a hub name, or no model: whoever loads it says so
    for name in sorted(paper.student.keys() - _NOT_SHAPE) if isinstance(body, dict) else ():
        if name in body and paper.student[name] != body[name]:
            raise paper.refusal(
                "conflicting-keys",
                "student_pretrained_weights",
                expected=f"{name} = {_shown(paper.student[name])}, as in student_config",
                found=_shown(body[name]),
            )


def _steps(passes: int, passes_per_step: int) -> int:
    return max(1, round(passes / passes_per_step))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_shown(part)}" for name, part in value.items()) + "}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
