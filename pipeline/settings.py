"""Settings of commands: one pydantic model gives the flags, the recipe keys, their help and their checks.

In: a recipe (YAML) and flags. Out: one checked object, or an error that names the key or the flag.
"""

from __future__ import annotations

import functools
import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cache_spec.errors import BadInputError
from pipeline.completion import RECIPE_FOLDERS, files, recipes, shipped_recipes
from pipeline.help_page import OPTIONS, SettingOption

if TYPE_CHECKING:
    from pydantic import BaseModel

# Help lines stand here so that ``kdpipe --help`` imports no command.
COMMANDS = {
    "demo": "Run the whole pipeline offline on an embedded teacher and text.",
    "plan": "Say what a cache and students from it would cost, before anything is spent.",
    "cache-teacher": "Run a teacher once over text and keep what students need.",
    "import-pickle": "Convert a pickle of token ids, once, to text of ids.",
    "transcode": "Make a smaller cache from a richer one, without the teacher.",
    "verify": "Report every problem of a cache.",
    "repair": "Recompute what is bad in a cache, and nothing else.",
    "push": "Send a finished cache to a store, or to the Hugging Face Hub.",
    "pull": "Bring a finished cache from a store, or from the Hugging Face Hub.",
    "export": "Write a cache's targets as Parquet or safetensors.",
    "import": "Make a cache of Parquet files of top-k log-probabilities.",
    "inspect": "Show what is in a cache and what it costs.",
    "train-student": "Train a student from a cache, without the teacher.",
    "evaluate": "Measure models on corpora, on text and against a cache, and how fast they are.",
    "report": "Make one HTML page about a cache, runs, students, evaluations and a plan.",
    "completion": "Print the script that completes kdpipe in a shell.",
}
# Settings of plain text that name a file or a folder as well as something else.
_NAMES_OF_FILES = {"teacher", "text", "models", "checkpoint", "gguf_file", "scheduler"}


Config = TypeVar("Config", bound="BaseModel")


def settings(
    model: type[Config],
    section: str,
    argument: str | None = None,
    paper: Callable[[Path, dict[str, Any]], tuple[dict[str, Any], Any]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add one flag per field of ``model`` to a command, plus ``--config``, and pass it the checked object.

    Values come from the recipe's ``section``, then from flags. The command's body gets it as ``config``.
    ``argument`` names the one field that is given by its place. ``paper`` adds ``--paper-config``: it makes of that
    file and the flags the settings that flags go on top of, and what the body gets as ``paper``.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(recipe: str | None, **given: Any) -> Any:
            own = {key: given.pop(key) for key in list(given) if key not in model.model_fields}
            flags = {key: value for key, value in given.items() if value is not None and value != ()}
            below: dict[str, Any] = {}
            if paper is not None and (file := own.pop("paper_config")) is not None:
                if recipe:
                    raise click.UsageError("give --config or --paper-config, not both")
                below, own["paper"] = paper(Path(file), flags)
            return body(config=build(model, section, recipe, flags, below), **own)

        wrapped.__doc__ = body.__doc__
        wrapped.__name__ = body.__name__
        wrapped.__click_params__ = list(getattr(body, "__click_params__", []))  # type: ignore[attr-defined]
        for name in reversed(_names(model)):
            option = (
                click.argument(name, required=False, shell_complete=files) if name == argument else _option(model, name)
            )
            wrapped = option(wrapped)
        if paper is not None:
            help_text = "Hyper-parameters of a published recipe (JSON), key for key; flags go on top."
            wrapped = click.option("--paper-config", metavar="FILE", help=help_text, shell_complete=files)(wrapped)
        help_text = "Recipe (YAML); flags go on top. A file, or the name of a shipped recipe."
        return click.option("--config", "recipe", metavar="RECIPE", help=help_text, shell_complete=recipes)(wrapped)

    return decorate


def flags_of(model: type[Config], as_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add one flag per field of ``model`` to a command of other arguments; its body gets the object as ``as_name``."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def wrapped(**given: Any) -> Any:
            flags = {name: given.pop(name) for name in model.model_fields}
            flags = {name: value for name, value in flags.items() if value is not None}
            return body(**{as_name: build(model, "", None, flags)}, **given)

        for name in reversed(_names(model)):
            wrapped = _option(model, name)(wrapped)
        return wrapped

    return decorate


def build(
    model: type[Config], section: str, recipe: str | None, flags: dict[str, Any], below: Mapping[str, Any] | None = None
) -> Config:
    """The checked settings of one command: a recipe's section, or what stands ``below``, with flags on top."""
    from pydantic import ValidationError

    values = read_recipe(recipe).get(section, {}) if recipe else dict(below or {})
    known = _names(model)
    values = {f"{key}_" if f"{key}_" in known else key: value for key, value in values.items()}
    for key in values:
        if key not in known:
            raise BadInputError("unknown-key", f"{recipe}: {section}: {key}", expected="one of " + ", ".join(known))
    flags = {key: _parse(model, key, value) for key, value in flags.items()}
    superseded: Callable[..., set[str]] = getattr(model, "superseded", lambda *_: set())
    dropped = superseded(flags, {**values, **flags})
    values = {key: value for key, value in values.items() if key not in dropped}
    try:
        return model.model_validate({**values, **flags})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        message = "is required" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        if recipe and (name in values or not name) and name not in flags:
            place = f"{recipe}: {section}" + (f": {name}" if name else "")
            raise BadInputError("bad-recipe", place, found=message) from None
        colon = "" if first["type"] == "missing" else ":"
        flag = f"{_flag(name)}{colon} " if name else ""
        raise click.UsageError(f"{flag}{message}") from None


def read_recipe(name: str) -> dict[str, dict[str, Any]]:
    """The sections of a recipe file, or of a shipped recipe by its name; keys may use ``-`` or ``_``."""
    import yaml

    path = recipe_path(name)
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise BadInputError("bad-recipe", path, found=error) from None
    if not isinstance(body, dict) or not all(isinstance(part, dict) for part in body.values()):
        raise BadInputError("bad-recipe", path, expected="one mapping per command")
    for section in body:
        if section not in COMMANDS:
            hint = "a file of students goes to train-student --students" if "students" in body else None
            expected = "one of " + ", ".join(COMMANDS)
            raise BadInputError("unknown-key", f"{path}: {section}", expected=expected, hint=hint)
    return {section: {str(key).replace("-", "_"): v for key, v in part.items()} for section, part in body.items()}


def recipe_path(name: str) -> Path:
    """A YAML file by its path, or a shipped one by its name."""
    candidates = [Path(name).expanduser(), *(folder / f"{name}.yaml" for folder in RECIPE_FOLDERS)]
    path = next((p for p in candidates if os.path.isfile(p)), None)  # a name too long for a file is none
    if path is None:
        raise BadInputError("unknown-recipe", name, expected="a YAML file or one of " + ", ".join(shipped_recipes()))
    return path


def _flag(name: str) -> str:
    """The flag of a setting; one that is a word of the language is a field that ends in an underscore."""
    return "--" + name.removesuffix("_").replace("_", "-")


def _names(model: type[BaseModel]) -> list[str]:
    """The settings of a command: what must be given comes first, and a class's own before those it shares."""
    shared = {name for part in model.__mro__[1:] for name in getattr(part, "model_fields", {})}
    return sorted(model.model_fields, key=lambda name: (not model.model_fields[name].is_required(), name in shared))


def _option(model: type[BaseModel], name: str) -> Callable[..., Any]:
    field = model.model_fields[name]
    flag = _flag(name)
    help_text = field.description or ""
    if not field.is_required() and field.default not in (None, ()):
        default = field.default
        shown = ",".join(str(part) for part in default) if isinstance(default, tuple) else default
        help_text += f"  [default: {shown}]"
    kind = _inner(field.annotation)
    option = functools.partial(
        click.option, cls=SettingOption, heading=heading(model, name), needed=field.is_required(), help=help_text
    )
    if kind is bool:
        return option(f"{flag}/--no-{flag[2:]}", name, default=None)
    if typing.get_origin(kind) is typing.Literal:
        return option(flag, name, type=click.Choice([str(c) for c in typing.get_args(kind)]))
    complete = files if name in _NAMES_OF_FILES or _holds_path(field.annotation) else None
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] in (str, Path):
        return option(flag, name, multiple=True, metavar="TEXT", shell_complete=complete)
    metavar = {int: "N", float: "X", str: "TEXT", Path: "PATH"}.get(kind, "N,N,..." if _is_tuple(kind) else "JSON")
    return option(flag, name, metavar=metavar, shell_complete=complete)


def heading(model: type[BaseModel], name: str) -> str:
    """The topic of a setting: each class of a model may say, as ``HEADINGS``, at which of its fields one begins."""
    begins = {
        field: topic for part in reversed(model.__mro__) for field, topic in vars(part).get("HEADINGS", {}).items()
    }
    topic, owner = OPTIONS, None
    for field in model.model_fields:
        # A topic ends with the fields of its class.
        if owner is not (owner := _owner(model, field)):
            topic = OPTIONS
        topic = begins.get(field, topic)
        if field == name:
            break
    return topic


def _owner(model: type[BaseModel], field: str) -> type:
    """The class that a setting comes from."""
    return next(part for part in reversed(model.__mro__) if field in getattr(part, "model_fields", {}))


def _holds_path(annotation: Any) -> bool:
    return annotation is Path or any(_holds_path(part) for part in typing.get_args(annotation))


def _inner(annotation: Any) -> Any:
    """``X`` of ``X | None``, and of ``X`` with more said of it; anything else as it is."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _inner(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return _inner(next(part for part in typing.get_args(annotation) if part is not type(None)))
    return annotation


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _parse(model: type[BaseModel], name: str, value: Any) -> Any:
    """Flags arrive as text: lists are split at commas and mappings read as JSON; pydantic does the rest."""
    kind = _inner(model.model_fields[name].annotation)
    if not isinstance(value, str):
        return value
    if _is_tuple(kind):
        return [part for part in value.split(",") if part]
    if typing.get_origin(kind) is dict:
        try:
            return json.loads(value)
        except ValueError as error:
            raise click.UsageError(f"{_flag(name)}: not JSON: {error}") from None
    return value


def emit(as_json: bool, result: dict[str, Any], lines: Iterable[str]) -> None:
    """Print a command's result: one JSON object for machines, or lines for people."""
    click.echo(json.dumps(result, indent=2) if as_json else "\n".join(lines))
