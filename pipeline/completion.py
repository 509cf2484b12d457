"""Completion in shells: the script that a shell loads, and what it is told of values.

In: a shell's name; what the user has typed so far. Out: the script, or candidates. click asks; nothing heavy is
imported until an option is completed, for which the commands' settings are needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

if TYPE_CHECKING:
    import click

SHELLS = ("bash", "zsh", "fish")
COMPLETE_VARIABLE = "_KDPIPE_COMPLETE"
RECIPE_FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")


def shell_script(cli: click.Command, shell: str) -> str:
    """What a shell has to run, once a session, to complete ``kdpipe``."""
    kind = get_completion_class(shell)
    assert kind is not None
    # The base class's: bash's own looks for a bash first, and tells its version on standard error.
    return ShellComplete.source(kind(cli, {}, "kdpipe", COMPLETE_VARIABLE))


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Leave it to the shell: paths below what was typed."""
    return [CompletionItem(incomplete, type="file")]


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Names of shipped recipes, or else a file."""
    names = [name for name in shipped_recipes() if name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or files(ctx, param, incomplete)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with kdpipe."""
    return sorted({path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.yaml")})
