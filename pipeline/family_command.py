"""The part of ``kdpipe train-student`` that trains a family: its flags, and what they do.

In: flags, and the settings that every student gets. Out: one report on all students, and the command's exit code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click

from cache_spec.errors import EXIT_DONE, EXIT_FAILED
from pipeline.completion import files, recipes
from pipeline.help_page import SettingOption
from pipeline.settings import emit, recipe_path
from train.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyOptions:
    """Flags that mean something with --students."""

    students: str | None
    control: bool
    evaluate_text: tuple[str, ...]
    plots: bool | None

    def refuse_alone(self) -> None:
        """Raise click's UsageError for a flag that needs --students."""
        for field in fields(self):
            if getattr(self, field.name) not in (None, False, ()):
                raise click.UsageError(f"--{field.name.replace('_', '-')} needs --students")


def family_options(body: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of a family to a command, and pass them to it as ``family``."""

    @functools.wraps(body)
    def wrapped(**given: Any) -> Any:
        options = FamilyOptions(**{field.name: given.pop(field.name) for field in fields(FamilyOptions)})
        return body(family=options, **given)

    option = functools.partial(click.option, cls=SettingOption, heading="A family of students")
    for add in (
        option("--plots/--no-plots", default=None, help="Draw the family's figures.  [default: if it can be]"),
        option(
            "--evaluate-text",
            multiple=True,
            metavar="TEXT",
            shell_complete=files,
            help="Text to measure a family on; may be given repeatedly.",
        ),
        option(
            "--control", is_flag=True, help="Train each student of a family once more on the text alone, to compare."
        ),
        option(
            "--students",
            metavar="FILE",
            shell_complete=recipes,
            help="Train a family, as this file (YAML, or the name of a shipped one) says; flags are common settings.",
        ),
    ):
        wrapped = add(wrapped)
    return wrapped


def run_family(config: TrainConfig, options: FamilyOptions, *, dry_run: bool, as_json: bool) -> int:
    """Train, or only plan, every student of a file; returns the exit code."""
    from train.family import plan_family, train_family
    from train.family_config import read_family
    from train.family_report import plan_lines, table_lines

    assert options.students is not None
    measured: dict[str, Any] = {"cache": config.evaluate_cache, "text": options.evaluate_text}
    # Every student is measured in the end: only what is measured on the way is a setting of its own.
    ours = {"cache", "out"} if config.evaluate_every else {"cache", "out", "evaluate_cache"}
    family = read_family(
        recipe_path(options.students),
        cache=config.cache,
        out=config.out,
        given={name: getattr(config, name) for name in config.model_fields_set - ours},
        evaluate={name: value for name, value in measured.items() if value},
        control=options.control,
    )
    if dry_run:
        facts = plan_family(family)
        emit(as_json, facts, plan_lines(facts))
        return EXIT_DONE
    report = train_family(family, plots=options.plots, quiet=as_json)
    emit(as_json, report, table_lines(report))
    return EXIT_FAILED if any(row["status"] != "done" for row in report["students"]) else EXIT_DONE
