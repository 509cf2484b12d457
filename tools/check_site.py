"""Whether a built site is whole: every link inside it leads somewhere, and no page loads anything from elsewhere.

In: the folder of the HTML. Out: one line a problem and exit code 1, or 0; with ``--external`` the addresses outside,
which are not fetched.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {
    "audio": ("src",),
    "embed": ("src",),
    "feimage": ("href", "xlink:href"),
    "frame": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src",),
    "input": ("src",),
    "object": ("data",),
    "script": ("src", "href", "xlink:href"),
    "source": ("src",),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
_LOADED_SETS = {"img": "srcset", "source": "srcset", "link": "imagesrcset"}
_LOADING_RELATIONS = {
    "apple-touch-icon",
    "dns-prefetch",
    "icon",
    "manifest",
    "modulepreload",
    "preconnect",
    "prefetch",
    "preload",
    "stylesheet",
}
# Of a set, what stands before a width or a density; an address may have commas inside.
_OF_SET = re.compile(r"([^\s,]\S*[^\s,]|[^\s,])[^,]*(?:,|$)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_OF_STYLE = re.compile(r"""url\(\s*(?:"([^"]*)"|'([^']*)'|([^"')\s]*))\s*\)|@import\s+["']([^"']*)""", re.IGNORECASE)


@dataclass
class Page(HTMLParser):
    """What one page defines and refers to."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    _is_style: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and "href" in values:
            loading = _LOADING_RELATIONS & set(values.get("rel", "").lower().split())
            (self.loads if loading else self.links).append(values["href"])
        self.loads += [values[name] for name in _LOADED.get(tag, ()) if name in values]
        self.loads += _OF_SET.findall(values.get(_LOADED_SETS.get(tag, ""), ""))
        self.loads += loaded_by_style(values.get("style", ""))
        self._is_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._is_style = False

    def handle_data(self, data: str) -> None:
        if self._is_style:
            self.loads += loaded_by_style(data)


def loaded_by_style(text: str) -> list[str]:
    """Every address that a style sheet loads."""
    return ["".join(found) for found in _OF_STYLE.findall(_COMMENT.sub("", text))]


def is_outside(address: str) -> bool:
    """Whether an address is neither of the site nor data."""
    parts = urlsplit(address.strip())
    return parts.scheme not in ("", "data") or bool(parts.netloc)


def problems(root: Path) -> Iterator[str]:
    """Each broken link, and each thing that a page would load from elsewhere, as ``page: what``."""
    pages = {path.resolve(): Page(path) for path in sorted(root.rglob("*.html"))}
    if not pages:
        yield f"{root}: no page"
    for path, page in pages.items():
        name = path.relative_to(root.resolve())
        for address in page.loads:
            if is_outside(address):
                yield f"{name}: loads {address}"
        for address in [*page.links, *page.loads]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                yield f"{name}: no file for {address}"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name}: no anchor for {address}"
    for style in root.rglob("*.css"):
        for address in loaded_by_style(style.read_text(encoding="utf-8")):
            if is_outside(address):
                yield f"{style.relative_to(root)}: loads {address}"


def external(root: Path) -> list[str]:
    """Every address outside the site that a page links to."""
    links = {address for path in root.rglob("*.html") for address in Page(path).links}
    return sorted(address for address in links if urlsplit(address).netloc)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--external", action="store_true", help="list addresses outside the site too")
    given = parser.parse_args()
    found = list(problems(given.site))
    sys.stdout.writelines(f"{line}\n" for line in found)
    if given.external:
        sys.stdout.writelines(f"outside, not fetched: {address}\n" for address in external(given.site))
    sys.stdout.write(f"{given.site}: {len(found)} problem(s)\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
