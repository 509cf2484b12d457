"""A command's manual page: its options by topic, what it reads and writes, examples, exit codes.

In: a click command and its ``Manual``. Out: sections, which ``--help`` prints and the documentation's pages show.
"""

from __future__ import annotations

import functools
import textwrap
from dataclasses import dataclass
from typing import Any

import click

from pipeline.manual import EXIT_CODES, MANUALS, Manual

OPTIONS = "Options"
COMMON = "Common options"
_COMMON = {"--config", "--paper-config", "--dry-run", "--json", "--help"}


class SettingOption(click.Option):
    """An option that stands below a heading in its command's help; ``needed``, even if a recipe may give it."""

    def __init__(self, *args: Any, heading: str = OPTIONS, needed: bool = False, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading, self.needed = heading, needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Options of one topic, each as ``(how it is given, what it means)``."""

    heading: str
    options: tuple[tuple[str, str], ...]


class ManualCommand(click.Command):
    """A command whose ``--help`` is its manual page."""

    @property
    def manual(self) -> Manual:
        """What is known of the command beside its options."""
        assert self.name is not None
        return MANUALS[self.name]

    def groups(self, ctx: click.Context) -> list[Group]:
        """All options by topic, in the order of their headings; what commands have in common stands last."""
        found: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None or isinstance(param, click.Argument):
                continue
            heading = COMMON if _COMMON & set(param.opts) else getattr(param, "heading", OPTIONS)
            found.setdefault(heading, []).append(record)
        common = found.pop(COMMON, [])
        return [
            Group(heading=heading, options=tuple(options))
            for heading, options in [*found.items(), (COMMON, common)]
            if options
        ]

    def exit_codes(self) -> list[tuple[str, str]]:
        """Each exit code and what it means here."""
        return [(str(code), says) for code, says in {**EXIT_CODES, **self.manual.exit_codes}.items()]

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        needed = [
            f"{param.opts[0]} {param.make_metavar(ctx)}"
            for param in self.get_params(ctx)
            if param.required or getattr(param, "needed", False)
            if isinstance(param, click.Option)
        ]
        return [*needed, *super().collect_usage_pieces(ctx)]

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        manual = self.manual
        for heading, text in (("Reads", manual.reads), ("Writes", manual.writes)):
            with formatter.section(heading):
                formatter.write_text(text)
        for group in self.groups(ctx):
            with formatter.section(group.heading):
                formatter.write_dl(list(group.options))
        with formatter.section("Examples"):
            for example in manual.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example.says}:\n")
                formatter.write(textwrap.indent(example.command, " " * (formatter.current_indent + 4)) + "\n")
        with formatter.section("Exit codes"):
            formatter.write_dl(self.exit_codes())
        with formatter.section("See also"):
            formatter.write_text(", ".join(f"kdpipe {name} --help" for name in manual.see_also))


command = functools.partial(click.command, cls=ManualCommand)
"""``click.command`` for commands that have a manual page."""
