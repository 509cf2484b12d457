"""The demo's text: split by document, no leak, the same order every time."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from cache_spec.errors import BadInputError
from pipeline import demo_text
from pipeline.demo_text import docstring_documents, python_docs, split_of

MODULE = '''"""The module's docstring, which is long enough to be kept as a paragraph of its own.

    A second paragraph, indented by four columns in the source and kept that way.
"""
raise RuntimeError("a source is parsed, never run")


class Outer:
    """The class's docstring comes second and is long enough to be kept, as all of these are."""

    def method(self):
        """The method's docstring comes third, and its indentation is taken away on the way out.
        This is its second line, which starts in column eight."""
        if True:
            async def inner():
                r"""The inner function's docstring comes fourth, with an invalid escape \\d in it."""


def short():
    """Too short."""
'''


def collapsed(text: str) -> str:
    return " ".join(text.split())


def test_both_splits_hold_a_sane_amount_of_text() -> None:
    train, heldout = list(python_docs("train")), list(python_docs("heldout"))
    assert len(train) > 200
    assert len(heldout) > 20
    sizes = [sum(len(text) for _, text in split) for split in (train, heldout)]
    assert 1_000_000 < sizes[0] < 5_000_000
    assert 0.04 < sizes[1] / sum(sizes) < 0.25
    assert all(len(text) >= demo_text.MIN_DOCUMENT_CHARACTERS for _, text in train + heldout)


def test_no_document_is_in_both_splits() -> None:
    names = [[name for name, _ in python_docs(split)] for split in ("train", "heldout")]
    assert not set(names[0]) & set(names[1])
    assert len(set(names[0])) == len(names[0])
    assert {split_of(name) for name in names[0]} == {"train"}
    assert {split_of(name) for name in names[1]} == {"heldout"}


def test_no_heldout_paragraph_or_docstring_occurs_in_train() -> None:
    train = "\n".join(collapsed(text) for _, text in python_docs("train"))
    pieces = {collapsed(p) for _, text in python_docs("heldout") for p in text.split("\n\n")}
    root = Path(os.__file__).parent
    for name, _ in python_docs("heldout"):
        path = root / (name.removeprefix("stdlib/").replace(".", "/") + ".py")
        if path.is_file():
            pieces |= {collapsed(docstring) for docstring in demo_text._docstrings(path)}
    long = [piece for piece in pieces if len(piece) >= demo_text.LEAK_CHARACTERS]
    assert len(long) > 300
    assert [piece for piece in long if piece in train] == []


def test_the_order_is_a_shuffle_by_name_alone() -> None:
    names = [name for name, _ in python_docs("train")]
    assert names == sorted(names, key=lambda name: sha256(f"order/{name}".encode()).digest())
    # The head of the stream is a fair sample: both kinds of document are in it.
    assert {name.split("/")[0] for name in names[:60]} == {"stdlib", "topics"}


@pytest.mark.slow
def test_another_process_yields_the_same_documents() -> None:
    code = "from pipeline.demo_text import python_docs as d; import hashlib as h; "
    code += "print(*(h.sha256(repr(list(d(s))).encode()).hexdigest() for s in ('train', 'heldout')))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = [sha256(repr(list(python_docs(split))).encode()).hexdigest() for split in ("train", "heldout")]
    assert there.stdout.split() == here


def test_a_renamed_copy_of_a_module_stays_in_its_split() -> None:
    for name in ("datetime", "decimal", "io", "strptime", "weakrefset", "abc"):
        assert split_of(f"stdlib/_py{name}") == split_of(f"stdlib/_{name}") == split_of(f"stdlib/{name}")


def test_docstrings_come_in_source_order_dedented_and_without_short_ones(tmp_path: Path) -> None:
    for path in ("b.py", "a/__init__.py", "a/c.py", "test/d.py", "a/tests/e.py", "site-packages/f.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00" * 100)
    (tmp_path / "bare.py").write_text("x = 1\n", encoding="utf-8")
    documents = dict(docstring_documents(tmp_path, "stdlib"))
    assert list(documents) == ["stdlib/a", "stdlib/a.c", "stdlib/b"]
    paragraphs = documents["stdlib/b"]
    assert [paragraph.split("docstring")[0].strip() for paragraph in paragraphs] == [
        "The module's",
        "A second paragraph, indented by four columns in the source and kept that way.",
        "The class's",
        "The method's",
        "The inner function's",
    ]
    assert "\nThis is its second line" in paragraphs[3]


def test_runs_shared_with_heldout_text_are_cut_across_paragraphs() -> None:
    words = [f"word{i}" for i in range(60)]
    heldout = (" ".join(words[:30]),)
    forbidden = demo_text.shared_runs([heldout])
    split_up = ("kept before", " ".join(words[5:15]), " \n ".join(words[15:28]), "kept after")
    assert demo_text.without_runs(split_up, forbidden) == ("kept before", "kept after")
    other = (" ".join(words[25:55]), "kept")
    assert demo_text.without_runs(other, forbidden) == other


def test_repeated_paragraphs_are_kept_once_and_short_ones_always() -> None:
    long = "a paragraph that says something " * 8
    documents = [("first", (long, "short")), ("second", (long.replace(" ", "  "), "short", "b" * 300))]
    texts = dict(demo_text.without_repeats(documents))
    assert texts["first"] == f"{long}\n\nshort"
    assert texts["second"] == "short\n\n" + "b" * 300


def test_an_interpreter_without_sources_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(demo_text, "_splits", demo_text._splits.__wrapped__)
    with pytest.raises(BadInputError, match="no-python-sources") as caught:
        list(python_docs("train"))
    assert caught.value.kind == "no-python-sources"


def test_an_unknown_split_is_bad_input() -> None:
    with pytest.raises(BadInputError) as caught:
        list(python_docs("test"))  # type: ignore[arg-type]
    assert caught.value.kind == "unknown-split"
