"""Whether a built site is whole: every link inside it leads somewhere, and no page loads anything from elsewhere.

In: the folder of the HTML. Out: one line a problem and exit code 1, or 0; with ``--external`` the addresses outside,
which are not fetched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "object": "data", "embed": "src"}
_LOADING_RELATIONS = {"stylesheet", "icon", "preload", "preconnect", "prefetch", "dns-prefetch", "manifest"}


@dataclass
class Page(HTMLParser):
    """What one page defines and refers to."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and "href" in values:
            loading = _LOADING_RELATIONS & set(values.get("rel", "").split())
            (self.loads if loading else self.links).append(values["href"])
        elif tag in _LOADED and _LOADED[tag] in values:
            self.loads.append(values[_LOADED[tag]])


def problems(root: Path) -> Iterator[str]:
    """Each broken link, and each thing that a page would load from elsewhere, as ``page: what``."""
    pages = {path.resolve(): Page(path) for path in sorted(root.rglob("*.html"))}
    if not pages:
        yield f"{root}: no page"
    for path, page in pages.items():
        name = path.relative_to(root.resolve())
        for address in page.loads:
            if urlsplit(address).scheme not in ("", "data") or urlsplit(address).netloc:
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
        text = style.read_text(encoding="utf-8")
        if "url(http" in text or "url(//" in text or "@import" in text:
            yield f"{style.relative_to(root)}: loads from elsewhere"


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
