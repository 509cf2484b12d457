"""The ``kdpipe`` command: arguments in, exit codes and one-line errors out.

In: command-line arguments. Out: a command that ran, and a stable exit code: 0 done, 1 failed, 2 usage, 3 bad input,
4 would lose data, 130 interrupted. Nothing heavy is imported here.
"""

from __future__ import annotations

import keyword
import logging
import os
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from cache_spec.errors import EXIT_INTERRUPTED, EXIT_USAGE, KdpipeError
from pipeline.failures import as_failure
from pipeline.settings import COMMANDS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class LazyGroup(click.Group):
    """Commands are imported when they are run, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module("pipeline.commands"), _function(cmd_name))
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        items = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        # Not the group's own, which imports every command.
        return items + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output left; click ends quietly
            raise
        except (OSError, MemoryError, RuntimeError, EOFError) as error:
            # Here, not in ``run``: click would turn an EOFError into an interrupt.
            failure = as_failure(error, ctx.invoked_subcommand)
            if failure is None:
                raise
            raise failure from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _function(command: str) -> str:
    """The name of a command's function; one that is a word of the language ends in an underscore."""
    name = command.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kdpipe")
def cli() -> None:
    """Run the teacher once, keep what a student needs, train as many students as you like."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``kdpipe`` command."""
    # Advice of the libraries on how to call them; read when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("kdpipe").setLevel(logging.INFO)
    # A library's warning asks for a change of code, which is not the user's to make; our tests turn them into errors.
    warnings.simplefilter("ignore")
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake is one line on standard error, never a traceback."""
    try:
        code = cli.main(arguments, prog_name="kdpipe", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        name = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "kdpipe"
        message = " ".join(error.format_message().split()).removesuffix(".")
        click.echo(f"error: usage: {message}; see {name} --help", err=True)
        return EXIT_USAGE
    except KdpipeError as error:
        if not error.said_elsewhere:
            click.echo(f"error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: run the same command again to go on where it stopped", err=True)
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
