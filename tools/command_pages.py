"""The documentation's page of each command, from the same manual that ``--help`` prints.

In: the commands of ``kdpipe``. Out: Markdown pages and the list of them, for ``docs/conf.py``.
"""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli import cli
from pipeline.help_page import Group, ManualCommand
from pipeline.settings import COMMANDS


def write_command_pages(folder: Path) -> None:
    """Write ``COMMAND.md`` for each command and ``index.md`` into a folder; a page that is as it should be is left."""
    pages = {f"{name}.md": command_page(name) for name in COMMANDS}
    pages["index.md"] = _index()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for file, text in pages.items():
        path = folder / file
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def command_page(name: str) -> str:
    """The manual page of one command, in Markdown."""
    group = click.Context(cli, info_name="kdpipe")
    command = cli.get_command(group, name)
    assert isinstance(command, ManualCommand)
    ctx = click.Context(command, info_name=name, parent=group)
    manual = command.manual
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    examples = "\n".join(f"# {example.says}\n{example.command}\n" for example in manual.examples)
    parts = [
        f"# kdpipe {name}",
        _prose(" ".join((command.help or "").split())),
        f"```text\n{usage}\n```",
        f"**Reads.** {_prose(manual.reads)}",
        f"**Writes.** {_prose(manual.writes)}",
        "## Examples",
        f"```bash\n{examples}```",
        *(_options(topic) for topic in command.groups(ctx)),
        "## Exit codes",
        "| code | meaning |\n|---|---|\n" + "\n".join(f"| {code} | {says} |" for code, says in command.exit_codes()),
        "See also: " + ", ".join(f"[kdpipe {other}]({other}.md)" for other in manual.see_also) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _options(group: Group) -> str:
    """A definition list, as MyST writes it."""
    rows = (f"`{flag}`\n: {_prose(says)}" for flag, says in group.options)
    return f"## {group.heading}\n\n" + "\n\n".join(rows)


def _prose(text: str) -> str:
    """Help as text of a page: characters that Markdown would take for marks stand for themselves."""
    return "".join(f"\\{char}" if char in "*_[]<>|`$#{}" else char for char in text)


def _index() -> str:
    rows = "\n".join(f"| [kdpipe {name}]({name}.md) | {line} |" for name, line in COMMANDS.items())
    names = "\n".join(COMMANDS)
    return (
        "# Commands\n\nMade from the code: `kdpipe COMMAND --help` prints the same. `kdpipe --version` is the version."
        " `kdpipe completion` teaches your shell.\n\n"
        f"| command | |\n|---|---|\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"
    )
