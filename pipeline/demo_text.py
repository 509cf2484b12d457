"""The demo's text: real English that every CPython carries, split by document into train and held-out.

In: the interpreter's own sources (``pydoc_data.topics`` and the docstrings of the standard library, parsed with
``ast`` and never imported). Out: (document name, text) pairs in a fixed order, such that no run of
``LEAK_CHARACTERS`` characters of a held-out document occurs in a train document.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

from cache_spec.errors import BadInputError

Split = Literal["train", "heldout"]
Paragraphs = tuple[str, ...]

HELDOUT_SHARE = 0.1
# The longest run of characters, blanks collapsed, that a train document may share with a held-out one.
LEAK_CHARACTERS = 100
MIN_DOCSTRING_CHARACTERS = 60
MIN_DOCUMENT_CHARACTERS = 200
# Tests, tables and installed packages: no prose, or no part of the standard library.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "turtledemo", "encodings", "pydoc_data"}
)
SKIPPED_MODULES = frozenset({"__phello__", "this", "antigravity"})


def python_docs(split: Split) -> Iterator[tuple[str, str]]:
    """Yield (document name, text) of one split of the interpreter's documentation, in a fixed shuffled order.

    A document is a help topic, or a module's docstrings in order. About a tenth of the documents, chosen by the
    sha256 of their names and so alike on every Python, is held out. Raises BadInputError
    ("no-python-sources") where the interpreter carries no sources.
    """
    if split not in ("train", "heldout"):
        raise BadInputError("unknown-split", "split", expected="train or heldout", found=split)
    yield from _splits()[split]


def docstring_documents(root: Path, prefix: str) -> Iterator[tuple[str, Paragraphs]]:
    """Yield (``prefix/dotted.module``, paragraphs) for each Python source under ``root`` that has docstrings.

    The paragraphs are those of the module's docstring and of its classes' and functions', in source order,
    dedented; docstrings under ``MIN_DOCSTRING_CHARACTERS`` and sources that do not parse are left out.
    """
    for path in sorted(_sources(root)):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_MODULES.isdisjoint(parts):
            continue
        if parts[-1] == "__init__":
            parts = parts[:-1]
        name = f"{prefix}/{'.'.join(parts)}" if parts else prefix
        paragraphs = tuple(p for docstring in _docstrings(path) for p in split_paragraphs(docstring))
        if sum(map(len, paragraphs)) >= MIN_DOCUMENT_CHARACTERS:
            yield name, paragraphs


def split_paragraphs(text: str) -> Paragraphs:
    """The parts of ``text`` between blank lines, right-hand blanks cut, indentation kept."""
    parts = re.split(r"\n\s*\n", "\n".join(line.rstrip() for line in text.expandtabs().splitlines()))
    return tuple(part.strip("\n") for part in parts if part.strip())


def shared_runs(documents: Iterable[Paragraphs]) -> frozenset[bytes]:
    """Digests of every run of ``LEAK_CHARACTERS`` characters, blanks collapsed, that starts with a word."""
    return frozenset(digest for paragraphs in documents for _, digest in _runs(paragraphs))


def without_runs(paragraphs: Paragraphs, forbidden: Collection[bytes]) -> Paragraphs:
    """The paragraphs of a document that have no part in a forbidden run, crossing runs included."""
    while True:
        dropped = {p for touched, digest in _runs(paragraphs) if digest in forbidden for p in touched}
        if not dropped:
            return paragraphs
        # Dropping one paragraph makes its neighbours adjacent, so look again.
        paragraphs = tuple(p for i, p in enumerate(paragraphs) if i not in dropped)


def without_repeats(documents: Iterable[tuple[str, Paragraphs]]) -> Iterator[tuple[str, str]]:
    """Yield (name, text), each paragraph of ``LEAK_CHARACTERS`` or more kept where it comes first."""
    seen: set[str] = set()
    for name, paragraphs in documents:
        kept = []
        for paragraph in paragraphs:
            key = " ".join(paragraph.split())
            if len(key) >= LEAK_CHARACTERS and key in seen:
                continue
            seen.add(key)
            kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= MIN_DOCUMENT_CHARACTERS:
            yield name, text


def split_of(name: str) -> Split:
    """The split of a document, from its name alone."""
    # `datetime` became `_pydatetime` in 3.12: a renamed copy stays on its side.
    words = [re.sub(r"^_+(py(?=.))?", "", word) for word in re.split(r"[/.]", name)]
    number = int.from_bytes(sha256("/".join(words).encode()).digest()[:8], "big")
    return "heldout" if number < HELDOUT_SHARE * 2**64 else "train"


@functools.cache
def _splits() -> dict[Split, tuple[tuple[str, str], ...]]:
    documents = sorted(_python_documents(), key=lambda document: _order(document[0]))
    heldout = [document for document in documents if split_of(document[0]) == "heldout"]
    forbidden = shared_runs(paragraphs for _, paragraphs in heldout)
    train = [(name, without_runs(parts, forbidden)) for name, parts in documents if split_of(name) == "train"]
    return {"train": tuple(without_repeats(train)), "heldout": tuple(without_repeats(heldout))}


def _python_documents() -> Iterator[tuple[str, Paragraphs]]:
    root = Path(sysconfig.get_path("stdlib"))
    modules = list(docstring_documents(root, "stdlib"))
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    if not modules or not topics:
        raise BadInputError(
            "no-python-sources",
            root,
            expected="the standard library's .py files and pydoc_data.topics",
            found=f"{len(modules)} modules and {len(topics)} topics",
            hint="this Python was installed without its sources; give a text file of your own instead",
        )
    yield from modules
    for name, text in topics.items():
        yield f"topics/{name}", split_paragraphs(text)


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        # Cut here, so that a large site-packages inside the standard library's folder is never listed.
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _docstrings(path: Path) -> list[str]:
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            # Invalid escapes in other people's sources are not our user's business.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    found = (ast.get_docstring(node, clean=False) for node in _definitions(tree))
    cleaned = (inspect.cleandoc(text) for text in found if text is not None)
    return [text for text in cleaned if len(text) >= MIN_DOCSTRING_CHARACTERS]


def _definitions(
    node: ast.AST,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    # ast.walk goes level by level; this goes in the order in which a reader meets the definitions.
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield from _definitions(child)


def _runs(paragraphs: Sequence[str]) -> Iterator[tuple[range, bytes]]:
    words: list[str] = []
    owners: list[int] = []
    for index, paragraph in enumerate(paragraphs):
        own = paragraph.split()
        words += own
        owners += [index] * len(own)
    text = " ".join(words)
    starts: list[int] = []
    at = 0
    for word in words:
        starts.append(at)
        at += len(word) + 1
    last = 0
    for first, start in enumerate(starts):
        end = start + LEAK_CHARACTERS
        if end > len(text):
            return
        while last + 1 < len(starts) and starts[last + 1] < end:
            last += 1
        yield range(owners[first], owners[last] + 1), sha256(text[start:end].encode("utf-8", "replace")).digest()[:12]


def _order(name: str) -> tuple[bytes, str]:
    return sha256(f"order/{name}".encode()).digest(), name
