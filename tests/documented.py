"""Code that the documentation shows, as something to run: blocks of Markdown pages, and the commands in them.

In: Markdown. Out: its blocks, each with what it needs that a test has not, and commands that run in this process. A
comment ``<!-- needs: hub -->`` above a block marks it, ``<!-- page needs: hours -->`` all of a page. A block that
begins with a comment of a file's name is that file.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from markdown_it import MarkdownIt

from pipeline import cli

NEEDS = {"cluster", "containers", "files", "gpu", "hours", "hub", "minutes", "network", "ranks", "store"}
"""``files``: of the reader's own, of forms that only names tell."""
SHOWN = {"text", "json"}
"""Output, trees of files: nothing to run."""
_MARK = re.compile(r"<!-- (page )?needs: (\w+) -->")
_FILE = re.compile(r"# (\S+\.(?:yaml|json|py))\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of code."""

    page: Path
    line: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every block of code of a page; Sphinx's own directives are none."""
    found: list[Block] = []
    mark: str | None = None
    of_page: str | None = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block" and (match := _MARK.fullmatch(token.content.strip())):
            of_page, mark = (match[2], mark) if match[1] else (of_page, match[2])
        elif token.type in ("fence", "code_block"):
            line = token.map[0] + 1 if token.map else 0
            language = token.info.strip() if token.type == "fence" else ""
            if not language.startswith("{"):
                needs = mark or of_page
                found.append(Block(page=page, line=line, language=language, text=token.content, needs=needs))
            mark = None
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; what is piped away, or told by an ellipsis, is left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["eval"]:
            words = words[1].strip("$()").split()
        if "|" in words:
            words = words[: words.index("|")]
        if words:
            yield [word for word in words if word not in ("…", "...")]


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block in the working folder; ``namespace`` is what a page's Python blocks share."""
    if file := _FILE.match(block.text):
        Path(file[1]).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, str(block), "exec"), namespace)
    else:
        assert block.language == "bash", f"{block}: mark it, or write it as bash or python"
        for program, *arguments in commands(block.text):
            assert program == "kdpipe", f"{block}: {program} does not run here: mark the block"
            code = cli.run(arguments)
            assert code == 0, f"{block}: kdpipe {shlex.join(arguments)} exits with {code}"


def run_notebook(notebook: Path) -> None:
    """Run the cells of code of a notebook in order, in one namespace; a line ``!kdpipe …`` is a command."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            text = "".join(cell["source"])
            language = "bash" if text.startswith("!") else "python"
            block = Block(page=notebook, line=number, language=language, text=text.removeprefix("!"), needs=None)
            run_block(block, namespace)


def parse(words: list[str]) -> None:
    """Parse a command's words as ``kdpipe`` does, without running it; raises click's UsageError for a wrong flag."""
    name, *arguments = words[words.index("kdpipe") + 1 :]
    group = click.Context(cli.cli, info_name="kdpipe")
    command = cli.cli.get_command(group, name)
    assert command is not None, name
    if "--help" not in arguments:
        missing = [str(param.name) for param in command.params if isinstance(param, click.Argument) and param.required]
        given = arguments if any(not word.startswith("-") for word in arguments) else [*missing, *arguments]
        command.make_context(name, list(given), parent=group)
