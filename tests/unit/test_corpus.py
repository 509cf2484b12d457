"""Text in every accepted form gives its documents; every kind of bad text gives one clear error."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import tracemalloc
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from cache_spec.errors import BadInputError
from pipeline.corpus import PIECE_CHARS, Corpus, pieces, resolve
from tests.refusals import refused

TEXTS = ["First document.\nTwo lines.", "Second: naïve 中文", "Third."]


def read(corpus: Corpus) -> list[str]:
    return ["".join(document) for document in corpus.documents()]


def as_lines(rows: list[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue().to_pybytes())


def as_parquet(column: object, field: str = "text") -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({field: column}), sink)
    return bytes(sink.getvalue().to_pybytes())


ROWS = as_lines([{"text": text} for text in TEXTS])


@pytest.mark.parametrize("pack", [("", bytes), (".gz", gzip.compress), (".zst", as_zstd)], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".txt"])
def test_every_format_gives_the_same_documents(
    tmp_path: Path, suffix: str, pack: tuple[str, Callable[[bytes], bytes]]
) -> None:
    data = {".parquet": as_parquet(TEXTS), ".txt": TEXTS[0].encode()}.get(suffix, ROWS)
    path = tmp_path / f"part{suffix}{pack[0]}"
    path.write_bytes(pack[1](data))
    corpus = resolve([str(path)])
    expected = TEXTS[:1] if suffix == ".txt" else TEXTS
    assert read(corpus) == expected
    assert read(corpus) == expected, "a corpus can be read again"
    (source,) = corpus.sources
    assert source.name == path.name
    assert source.num_bytes == path.stat().st_size
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_gives_its_visible_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".hidden.txt", ".git/x.txt", "picture.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "empty.txt").touch()
    corpus = resolve([str(tmp_path)])
    assert [source.name for source in corpus.sources] == ["a.txt", "b/1.txt", "b/2.txt"]
    assert read(corpus) == ["a.txt", "b/1.txt", "b/2.txt"]


def test_a_glob_gives_its_matches_in_order_and_names_without_the_machines_path(tmp_path: Path) -> None:
    for name in ("x/1.txt", "y/0.txt", "x/2.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    corpus = resolve([str(tmp_path / "*" / "*.txt")])
    assert [source.name for source in corpus.sources] == ["x/1.txt", "y/0.txt"]
    assert read(corpus) == ["x/1.txt", "y/0.txt"]


def test_texts_are_read_in_the_order_given(tmp_path: Path) -> None:
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text(name)
    assert read(resolve([str(tmp_path / "2.txt"), str(tmp_path / "1.txt")])) == ["2.txt", "1.txt"]


def test_python_docs_are_a_corpus_and_their_parts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.demo_text.python_docs", lambda part: iter([("a", f"{part} a"), ("b", f"{part} b")]))
    train, heldout = resolve(["python-docs:train"]), resolve(["python-docs:heldout"])
    assert read(train) == ["train a", "train b"]
    assert train.sources[0].name == "python-docs:train"
    assert train.sources[0].num_bytes == 14
    assert train.sources[0].sha256 != heldout.sources[0].sha256
    refused("unknown-text", lambda: resolve(["python-docs:test"]))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(BOM_UTF8 + b"Hello")
    (tmp_path / "b.jsonl").write_bytes(BOM_UTF8 + as_lines([{"text": "world"}]))
    assert read(resolve([str(tmp_path)])) == ["Hello", "world"]


def test_blank_and_null_documents_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[object] = [{"text": " \n\t"}, {"text": None}, {"text": "real"}, {"text": ""}]
    (tmp_path / "a.jsonl").write_bytes(as_lines(rows) + b"\n")
    with caplog.at_level(logging.INFO, logger="kdpipe"):
        assert read(resolve([str(tmp_path / "a.jsonl")])) == ["real"]
    assert "1 documents; skipped 2 documents of only white space and 1 without text" in caplog.text


BAD_FILES: dict[str, tuple[str, bytes, str, str]] = {
    "text that is not UTF-8": ("a.txt", b"good \xff bad", "invalid-utf8", "a.txt, byte 5"),
    "a character cut off at the end": ("a.txt", b"good \xe4\xb8", "invalid-utf8", "a.txt, byte 5"),
    "a bad byte far into the file": (
        "a.txt",
        b"\xef\xbb\xbf" + b"x" * 200_000 + b"\xff",
        "invalid-utf8",
        "byte 200003",
    ),
    "a bad character across two reads": ("a.txt", b"x" * 65_535 + b"\xe4\xff", "invalid-utf8", "byte 65535"),
    "a line that is not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "invalid-utf8", "line 2"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}\n', "invalid-utf8", "line 1"),
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "broken-json", "line 3"),
    "JSON too deep to read": ("a.jsonl", b"[" * 100_000, "broken-json", "line 1"),
    "a line that is no object": ("a.json", b'["text"]\n', "bad-record", "found list"),
    "a missing field": ("a.jsonl", b'{"title": "a", "body": "b"}\n', "missing-field", "found title, body"),
    "a field of another type": ("a.jsonl", b'{"text": ["a"]}\n', "wrong-field-type", "found list"),
    "a Parquet file without the field": ("a.parquet", as_parquet(["x"], "body"), "missing-field", "found body"),
    "a Parquet field of numbers": ("a.parquet", as_parquet([1]), "wrong-field-type", "row 1"),
    "a truncated Parquet file": ("a.parquet", as_parquet(["x"])[:-9], "broken-file", "a.parquet"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(ROWS)[:-9], "broken-file", "a.jsonl.gz"),
    "truncated zstd": ("a.jsonl.zst", as_zstd(ROWS)[:-9], "broken-file", "a.jsonl.zst"),
    "gzip that is none": ("a.txt.gz", b"plain text", "broken-file", "a.txt.gz"),
    "an empty file": ("a.txt", b"", "no-text", "empty file"),
    "only white space": ("a.txt", b" \n" * 300_000, "no-text", "1 documents of only white space"),
    "nothing but nulls": ("a.jsonl", b'{"text": null}\n', "no-text", "1 without text"),
    "an unknown suffix": ("a.docx", b"x", "unsupported-text", ".jsonl"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_in_one_line_that_names_the_place(tmp_path: Path, case: str) -> None:
    name, data, kind, message = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(data)
    assert message in refused(kind, lambda: read(resolve([str(path)])))


def test_invalid_utf8_inside_parquet_names_the_row(tmp_path: Path) -> None:
    column = pyarrow.array([b"good", b"\xff"]).cast(pyarrow.string(), safe=False)
    (tmp_path / "a.parquet").write_bytes(as_parquet(column))
    assert "a.parquet, row 2" in refused("invalid-utf8", lambda: read(resolve([str(tmp_path)])))


def test_places_without_text_are_refused(tmp_path: Path) -> None:
    refused("no-text", lambda: resolve([str(tmp_path)]))
    refused("no-text", lambda: resolve([str(tmp_path / "*.txt")]))
    refused("no-text", lambda: resolve([]))
    (tmp_path / "a.txt").touch()
    refused("no-text", lambda: resolve([str(tmp_path)]))


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_whose_name_is_not_utf8_is_refused_by_name(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    try:
        path.write_text("x")
    except OSError:
        pytest.skip("this file system has no such names")
    assert "caf\\xe9.txt" in refused("bad-file-name", lambda: resolve([str(tmp_path if folder else path)]))


@pytest.mark.parametrize("text", ["n" * 300, "n/" * 3 + "m" * 300, "~nouser-of-ours/x", "a\0b", "x" * 300 + "*"])
def test_what_can_be_no_path_is_refused(text: str) -> None:
    with pytest.raises(BadInputError, match=r"unknown-text|no-text"):
        resolve([text])


def test_a_vanished_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    corpus = resolve([str(path)])
    path.unlink()
    assert "a.txt" in refused("cannot-read", lambda: read(corpus))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("datasets.load_dataset", refuse)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("text", ["missing.txt", "a/missing.jsonl.zst", "./name", "a/b/c", "name with blanks"])
def test_what_can_only_be_a_path_is_never_looked_up_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused("unknown-text", lambda: resolve([text]))


@pytest.mark.usefixtures("no_hub")
def test_an_existing_folder_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("local")
    monkeypatch.chdir(tmp_path)
    assert read(resolve(["owner/name"])) == ["local"]


def test_an_unreachable_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    assert "cannot be reached" in refused("unknown-text", lambda: resolve(["owner/name"]))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub of one data set; what is asked of it is noted in the returned dict."""
    import datasets

    asked: dict[str, Any] = {"sha": "c0ffee"}

    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in TEXTS)

    def load(name: str, config: str | None, **settings: object) -> object:
        asked.update(settings, name=name, config=config)
        if settings["split"] == "nowhere":
            raise ValueError("Unknown split\nsecond line")
        return datasets.IterableDataset.from_generator(rows)

    def info(_api: object, _name: str, *, revision: str | None, timeout: float) -> object:
        asked["asked"] = revision
        return SimpleNamespace(sha=asked["sha"])

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("datasets.load_dataset", load)
    return asked


def test_a_hub_data_set_is_streamed_at_the_commit_it_was_digested_at(hub: dict[str, Any]) -> None:
    corpus = resolve(["owner/name:small"], split="test")
    assert read(corpus) == TEXTS
    assert read(corpus) == TEXTS
    assert hub == {
        "sha": "c0ffee",
        "asked": None,
        "name": "owner/name",
        "config": "small",
        "split": "test",
        "streaming": True,
        "revision": "c0ffee",
    }
    hub["sha"] = "decaf"
    assert resolve(["owner/name:small"], split="test").sources != corpus.sources
    assert "owner/name, row 1" in refused("missing-field", lambda: read(resolve(["owner/name"], text_field="body")))


@pytest.mark.parametrize("name", ["owner/name", "owner/name:small"])
def test_a_hub_data_set_pinned_to_its_commit_is_the_same_text_without_asking(
    hub: dict[str, Any], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    commit = hub["sha"] = "c0ffee00" * 5
    with caplog.at_level(logging.INFO, logger="kdpipe"):
        sources = resolve([name]).sources
    assert f"data set {name} at commit {commit}; pin it with {name}@{commit}" in caplog.text
    assert resolve([f"{name}@main"]).sources == sources
    assert hub.pop("asked") == "main"
    hub["sha"] = "decaf000" * 5
    assert resolve([name]).sources != sources
    del hub["asked"]
    caplog.clear()
    pinned = resolve([f"{name}@{commit}"])
    assert pinned.sources == sources
    assert read(pinned) == TEXTS
    assert "asked" not in hub
    assert hub["revision"] == commit
    assert hub["name"] == "owner/name"
    assert not caplog.text


def test_a_hub_data_set_without_the_split_is_refused(hub: dict[str, Any]) -> None:
    assert "split nowhere" in refused("unknown-text", lambda: resolve(["owner/name"], split="nowhere"))


def test_saved_data_sets_are_read_with_their_splits(tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_dict({"body": TEXTS})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "many")
    for name in ("one", "many"):
        corpus = resolve([str(tmp_path / name)], text_field="body")
        assert read(corpus) == TEXTS
        assert corpus.sources[0].num_bytes > 0
    refused("unknown-text", lambda: resolve([str(tmp_path / "many")], split="test"))
    refused("missing-field", lambda: read(resolve([str(tmp_path / "one")])))
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    refused("broken-file", lambda: read(resolve([str(tmp_path / "one")])))


def test_a_large_text_file_is_one_document_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    line = b"some words that go on for a while\n"
    path.write_bytes(line * 600_000)
    corpus = resolve([str(path)])
    tracemalloc.start()
    (lengths,) = ([len(piece) for piece in document] for document in corpus.documents())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(lengths) == path.stat().st_size
    assert max(lengths) <= PIECE_CHARS
    assert peak_bytes < 4_000_000


def test_a_text_without_any_place_to_cut_is_still_cut() -> None:
    text = "x" * 1000
    assert [len(piece) for piece in pieces([text], 300)] == [300, 300, 300, 100]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aa bb cc dd", ["aa bb", " cc dd"]),
        ("aa  bb cc  dd", ["aa  bb", " cc  dd"]),
        ("aa\n\nbb\ncc\n\ndd", ["aa\n\nbb\n", "cc\n\ndd"]),
        ("aa bb\ncc", ["aa", " bb\ncc"]),
        ("aabb\r\nccdd", ["aabb\r\ncc", "dd"]),
    ],
)
def test_a_cut_lies_at_the_last_single_space_or_else_newline(text: str, expected: list[str]) -> None:
    longest = max(map(len, expected))
    assert list(pieces([text], longest)) == expected
