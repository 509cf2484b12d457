"""Importing a pickle: once, into ids that a capture takes as text, and nothing that lies there is ever overwritten."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_spec.errors import BadInputError, WouldLoseDataError
from pipeline import idfolder
from pipeline.blocks import stage_blocks
from pipeline.corpus import resolve
from pipeline.idfolder import HEADER_NAME, open_ids
from pipeline.import_pickle import import_ids
from pipeline.teacher_files import tokenizer_sha256
from tests.models import make_tokenizer

DOCUMENTS = [[1, 5, 6, 7, 1], [1, 9, 1], [], [8]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    make_tokenizer(100).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write(path: Path, documents: Any = DOCUMENTS) -> Path:
    path.write_bytes(pickle.dumps([np.array(ids, dtype=np.int32) for ids in documents]))
    return path


@pytest.fixture
def imported(tmp_path: Path, tokenizer: Path) -> Path:
    import_ids(write(tmp_path / "a.pickle"), tmp_path / "ids", tokenizer=str(tokenizer), quiet=True)
    return tmp_path / "ids"


def test_the_header_says_what_was_imported(tmp_path: Path, tokenizer: Path, imported: Path) -> None:
    header = open_ids(imported).header
    assert header["num_documents"] == 4
    assert header["num_tokens"] == 9
    assert (header["vocab_size"], header["dtype"]) == (100, "uint16")
    assert header["source"]["name"] == "a.pickle"
    assert header["tokenizer"]["sha256"] == tokenizer_sha256(make_tokenizer(100))
    assert sorted(path.name for path in imported.iterdir()) == [HEADER_NAME, "ids.parquet"]


def test_a_capture_reads_the_same_ids(imported: Path) -> None:
    corpus = resolve([str(imported)])
    assert [list(document) for document in corpus.documents()] == [ids for ids in DOCUMENTS if ids]
    assert corpus.sources[0].sha256 == open_ids(imported).header["sha256"]


def test_documents_of_ids_end_as_documents_of_text_do(tmp_path: Path, imported: Path) -> None:
    staged = stage_blocks(
        resolve([str(imported)]),
        make_tokenizer(100),
        folder=tmp_path / "staged",
        block_tokens=5,
        eos_token_id=1,
        vocab_size=100,
        key="k" * 64,
        quiet=True,
    )
    # The last document had no end; the others had theirs already.
    assert staged.read(0, 2).ravel().tolist() == [1, 5, 6, 7, 1, 1, 9, 1, 8, 1]
    assert staged.num_documents == 3


def test_sequences_of_ids_are_blocks_as_they_are(tmp_path: Path, imported: Path) -> None:
    staged = stage_blocks(
        resolve([str(imported)]),
        make_tokenizer(100),
        folder=tmp_path / "staged",
        block_tokens=4,
        eos_token_id=1,
        vocab_size=100,
        last_block="each",
        key="k" * 64,
        quiet=True,
    )
    # The last sequence gets no end that it did not have; what follows it is padding.
    assert staged.read(0, 4).tolist() == [[1, 5, 6, 7], [1, 1, 1, 1], [1, 9, 1, 1], [8, 1, 1, 1]]
    assert staged.lengths(0, 4).tolist() == [4, 1, 3, 1]


def test_ids_and_text_go_into_one_cache(tmp_path: Path, imported: Path) -> None:
    (tmp_path / "text.txt").write_text("w2 w3")
    staged = stage_blocks(
        resolve([str(tmp_path / "text.txt"), str(imported), str(tmp_path / "text.txt")]),
        make_tokenizer(100),
        folder=tmp_path / "staged",
        block_tokens=16,
        eos_token_id=1,
        vocab_size=100,
        key="k" * 64,
        quiet=True,
    )
    assert staged.read(0, 1).ravel().tolist() == [2, 3, 1, 1, 5, 6, 7, 1, 1, 9, 1, 8, 1, 2, 3, 1]


def test_ids_outside_the_teachers_vocabulary_are_refused(tmp_path: Path, imported: Path) -> None:
    with pytest.raises(BadInputError, match="id 9"):
        stage_blocks(
            resolve([str(imported)]),
            make_tokenizer(100),
            folder=tmp_path / "staged",
            block_tokens=5,
            eos_token_id=1,
            vocab_size=9,
            key="k" * 64,
            quiet=True,
        )


def test_ids_of_another_tokenizer_are_refused(imported: Path) -> None:
    corpus = resolve([str(imported)])
    corpus.refuse_other_tokenizer(tokenizer_sha256(make_tokenizer(100)))
    with pytest.raises(BadInputError) as error:
        corpus.refuse_other_tokenizer(tokenizer_sha256(make_tokenizer(99)))
    assert error.value.kind == "other-tokenizer"


@pytest.mark.parametrize("ids", [[100], [-1], [2**40]])
def test_ids_outside_the_tokenizers_vocabulary_leave_nothing_behind(
    tmp_path: Path, tokenizer: Path, ids: list[int]
) -> None:
    path = tmp_path / "bad.pickle"
    path.write_bytes(pickle.dumps([[1, 2], ids]))
    with pytest.raises(BadInputError) as error:
        import_ids(path, tmp_path / "out", tokenizer=str(tokenizer), quiet=True)
    assert (error.value.kind, error.value.place) == ("vocabulary-mismatch", "document 2")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_same_import_again_does_nothing(tmp_path: Path, tokenizer: Path, imported: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in imported.iterdir()}
    import_ids(tmp_path / "a.pickle", imported, tokenizer=str(tokenizer), quiet=True)
    assert {path.name: path.stat().st_mtime_ns for path in imported.iterdir()} == before


def test_another_import_or_foreign_files_are_not_overwritten(tmp_path: Path, tokenizer: Path, imported: Path) -> None:
    other = write(tmp_path / "b.pickle", [[2, 3]])
    with pytest.raises(WouldLoseDataError, match="other-ids"):
        import_ids(other, imported, tokenizer=str(tokenizer), quiet=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("dear")
    with pytest.raises(WouldLoseDataError, match=r"thesis\.tex"):
        import_ids(other, tmp_path / "foreign", tokenizer=str(tokenizer), quiet=True)


def test_an_interrupted_import_is_made_again(tmp_path: Path, tokenizer: Path, imported: Path) -> None:
    (imported / HEADER_NAME).unlink()
    (imported / ".tmp-ids.parquet-1-ab").write_bytes(b"half")
    import_ids(tmp_path / "a.pickle", imported, tokenizer=str(tokenizer), quiet=True)
    assert sorted(path.name for path in imported.iterdir()) == [HEADER_NAME, "ids.parquet"]


def test_many_documents_take_several_groups(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idfolder, "_GROUP_IDS", 50)
    documents = [[number % 100] * (number % 7) for number in range(300)]
    import_ids(write(tmp_path / "a.pickle", documents), tmp_path / "ids", tokenizer=str(tokenizer), quiet=True)
    found = [ids for _, ids in open_ids(tmp_path / "ids").records()]
    assert [ids.tolist() for ids in found if isinstance(ids, np.ndarray)] == documents


def test_changed_ids_are_found(imported: Path) -> None:
    data = bytearray((imported / "ids.parquet").read_bytes())
    data[10] ^= 1
    (imported / "ids.parquet").write_bytes(bytes(data))
    with pytest.raises(BadInputError, match="damaged-ids"):
        _ = resolve([str(imported)]).sources


@pytest.mark.parametrize(
    "change", [{"format": "other"}, {"format_version": 2}, {"vocab_size": "100"}, {"tokenizer": None}]
)
def test_a_header_that_is_none_is_refused(imported: Path, change: dict[str, Any]) -> None:
    header = json.loads((imported / HEADER_NAME).read_text())
    (imported / HEADER_NAME).write_text(json.dumps(header | change))
    with pytest.raises(BadInputError, match="bad-ids"):
        resolve([str(imported)])


def test_a_pickle_without_a_token_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(BadInputError, match="no-text"):
        import_ids(write(tmp_path / "a.pickle", [[]]), tmp_path / "ids", tokenizer=str(tokenizer), quiet=True)
