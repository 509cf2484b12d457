"""What becomes of text on its way into the site: links out of docs/ find their pages, docstrings become valid.

In: Markdown of docs/ and docstrings of the code. Out: the same, as Sphinx can read it; ``docs/conf.py`` connects these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline.settings import COMMANDS

# Files beside docs/ that have a page: a link to the file is right on a code host, one to the page here.
PAGES = {
    "cache_spec/SPEC.md": "/format.md",
    "CHANGELOG.md": "/changes.md",
    "CONTRIBUTING.md": "/contributing.md",
    "docs/RESULTS.md": "/RESULTS.md",
}
# Pages of commands are made with the site; elsewhere the help is what there is.
_HELP = re.compile(r"(?<!\[)`kdpipe (?:(" + "|".join(COMMANDS) + r") )?--help`")
_OUTSIDE = re.compile(r"\]\((?:\.\./)*(" + "|".join(map(re.escape, PAGES)) + r")(?=[)#])")


def with_links_to_pages(text: str) -> str:
    """Markdown whose links to files outside docs/ lead to their pages, and calls for help to those of commands."""
    text = _OUTSIDE.sub(lambda match: f"]({PAGES[match[1]]}", text)
    return _HELP.sub(lambda match: f"[{match[0]}](/reference/commands/{match[1] or 'index'}.md)", text)


def as_restructured_text(lines: list[str]) -> list[str]:
    """A docstring's lines: indented ones become literal blocks, and stars stand for themselves."""
    return list(_literal_blocks(lines))


def _literal_blocks(lines: list[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        indented = line.startswith(" ")
        if indented and not inside:
            yield from ("", "::", "")
        elif inside and line and not indented:
            yield ""
        inside = indented or (inside and not line)
        yield line if inside else _plain(line)


def _plain(line: str) -> str:
    """Stars and bars outside of ``literals`` mean nothing."""
    parts = line.split("``")
    parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
    return "``".join(parts)
