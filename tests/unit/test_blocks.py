"""Staging blocks: what is written, what a killed run leaves, what is reused, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import pickle
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.blocks import StagedBlocks, open_staged, stage_blocks
from pipeline.corpus import Corpus, pieces
from pipeline.textfiles import Record
from tests.refusals import refused
from tests.texts import corpus_from, corpus_of

KEY = "0123456789abcdef" * 4
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
}


@cache
def real_text() -> str:
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics)[:40])


@cache
def bpe(splitter: str = "gpt2", vocab_size: int = 600) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITTERS[splitter]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([real_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_max_length=16)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe()


def unread() -> Corpus:
    def records() -> Iterator[Record]:
        raise AssertionError("the text was read again")

    return corpus_from(records)


def stage(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, folder: Path, **settings: Any) -> StagedBlocks:
    defaults: dict[str, Any] = {"block_tokens": 8, "eos_token_id": 0, "vocab_size": 600, "key": KEY}
    return stage_blocks(corpus, tokenizer, folder=folder, **(defaults | settings))


TEXTS = ["The first document.\n\nIt has parts.", "Another one", "and the last, a little longer than that"]


def stream_of(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    ids: list[int] = []
    for text in texts:
        ids += [*cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), 0]
    return ids


def test_the_files_hold_the_stream_and_its_account(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    staged = stage(corpus_of(TEXTS), tokenizer, tmp_path)
    stream = stream_of(TEXTS, tokenizer)
    num_blocks = len(stream) // 8
    assert staged.read(0, num_blocks).reshape(-1).tolist() == stream[: num_blocks * 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"blocks-{KEY[:16]}.bin", f"blocks-{KEY[:16]}.json"]
    assert (tmp_path / f"blocks-{KEY[:16]}.bin").stat().st_size == num_blocks * 8 * 2
    digest = hashlib.sha256(np.array(stream[: num_blocks * 8], dtype="<u4").tobytes()).hexdigest()
    assert json.loads((tmp_path / f"blocks-{KEY[:16]}.json").read_text()) == {
        "key": KEY,
        "num_blocks": num_blocks,
        "block_tokens": 8,
        "last_block_tokens": 8,
        "num_documents": 3,
        "num_tokens": num_blocks * 8,
        "tokens_sha256": digest,
        "dtype": "<u2",
        "by_document": False,
        "framed": False,
    }


def test_a_large_vocabulary_is_stored_in_32_bits_with_the_same_digest(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    narrow = stage(corpus_of(TEXTS), tokenizer, tmp_path, vocab_size=65_536)
    wide = stage(corpus_of(TEXTS), tokenizer, tmp_path, vocab_size=65_537, key="f" * 64)
    assert (narrow.dtype, wide.dtype) == ("<u2", "<u4")
    assert narrow.tokens_sha256 == wide.tokens_sha256
    np.testing.assert_array_equal(narrow.read(0, narrow.num_blocks), wide.read(0, wide.num_blocks))


def test_a_kept_last_block_is_padded_with_eos_and_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="kdpipe"):
        staged = stage(corpus_of(TEXTS), tokenizer, tmp_path, block_tokens=1000, last_block="keep")
    stream = stream_of(TEXTS, tokenizer)
    assert staged.read(0, 1).tolist() == [stream + [0] * (1000 - len(stream))]
    assert staged.lengths(0, 1).tolist() == [len(stream)] == [staged.num_tokens]
    assert staged.lengths(0, 1).dtype == np.uint32
    assert f"kept the last block with {len(stream)} of 1000 tokens" in caplog.text


def blocks_of_each(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, size: int) -> list[list[int]]:
    """Real tokens of each block, document by document."""
    streams = [stream_of([text], tokenizer) for text in texts]
    return [stream[at : at + size] for stream in streams for at in range(0, len(stream), size)]


@pytest.mark.parametrize("size", [2, 8, 1000])
def test_each_document_begins_a_block(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    expected = blocks_of_each(TEXTS, tokenizer, size)
    staged = stage(corpus_of(TEXTS), tokenizer, tmp_path, block_tokens=size, last_block="each")
    assert staged.num_blocks == len(expected)
    assert staged.lengths(0, len(expected)).tolist() == [len(block) for block in expected]
    assert staged.read(0, len(expected)).tolist() == [block + [0] * (size - len(block)) for block in expected]
    assert staged.num_tokens == sum(map(len, expected))
    assert staged.num_documents == len(TEXTS)
    # Any part of it, in another process, and when it is opened again.
    again = pickle.loads(pickle.dumps(open_staged(tmp_path, KEY)))
    assert again.lengths(1, 2).tolist() == [len(block) for block in expected[1:3]]
    reused = stage(unread(), tokenizer, tmp_path, block_tokens=size, last_block="each")
    assert reused == staged


def test_documents_that_come_in_many_pieces_begin_one_block_each(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.token_stream.BATCH_PIECES", 1)
    texts = [real_text()[:150_000], "short", real_text()[-90_000:]]
    staged = stage(corpus_of(texts), tokenizer, tmp_path, block_tokens=512, last_block="each")
    expected = blocks_of_each(["".join(pieces([text])) for text in texts], tokenizer, 512)
    assert staged.lengths(0, staged.num_blocks).tolist() == [len(block) for block in expected]


def test_a_limit_cuts_the_last_document(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    staged = stage(corpus_of(TEXTS), tokenizer, tmp_path, last_block="each", limit_tokens=3)
    assert (staged.num_blocks, staged.num_documents, staged.num_tokens) == (1, 1, 3)
    assert staged.lengths(0, 1).tolist() == [3]


def test_missing_lengths_are_staged_anew(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stage(corpus_of(TEXTS), tokenizer, tmp_path, last_block="each")
    (lengths,) = tmp_path.glob("*.lengths")
    lengths.write_bytes(b"\1\0\0\0")
    staged = stage(corpus_of(TEXTS), tokenizer, tmp_path, last_block="each")
    assert staged.lengths(0, staged.num_blocks).sum() == staged.num_tokens


def test_a_dropped_last_block_is_logged(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    num_left = len(stream_of(TEXTS, tokenizer)) % 8
    assert num_left
    with caplog.at_level(logging.INFO, logger="kdpipe"):
        stage(corpus_of(TEXTS), tokenizer, tmp_path)
    assert f"dropped the last {num_left} tokens" in caplog.text


def test_finished_blocks_are_reused_without_reading_the_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = stage(corpus_of(TEXTS), tokenizer, tmp_path)
    assert stage(unread(), tokenizer, tmp_path) == first
    assert open_staged(tmp_path, KEY) == first
    assert pickle.loads(pickle.dumps(first)).read(0, 1).tolist() == first.read(0, 1).tolist()


DAMAGES = {
    "killed before the account was written": lambda ids, facts: facts.unlink(),
    "ids lost": lambda ids, facts: ids.unlink(),
    "ids cut short": lambda ids, facts: ids.write_bytes(ids.read_bytes()[:-2]),
    "account of another key": lambda ids, facts: facts.write_text(facts.read_text().replace(KEY, KEY[:32] + "0" * 32)),
    "account cut short": lambda ids, facts: facts.write_text(facts.read_text()[:20]),
    "account of another form": lambda ids, facts: facts.write_text("[1]"),
    "account without counts": lambda ids, facts: facts.write_text(json.dumps({"key": KEY})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_killed_run_left_is_made_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, damage: str) -> None:
    first = stage(corpus_of(TEXTS), tokenizer, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    DAMAGES[damage](first.path, first.path.with_suffix(".json"))
    refused("missing-blocks", partial(open_staged, tmp_path, KEY))
    with pytest.raises(AssertionError, match="read again"):
        stage(unread(), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == [], "what did not count is gone, and nothing half-written is left"
    assert stage(corpus_of(TEXTS), tokenizer, tmp_path) == first
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / f".tmp-blocks-{KEY[:16]}.bin-123-abcd").write_bytes(b"half")
    (tmp_path / ".tmp-blocks-feed.json-123-abcd").write_bytes(b"half")
    (tmp_path / "mine.txt").write_text("keep")
    stage(corpus_of(TEXTS), tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"blocks-{KEY[:16]}.bin",
        f"blocks-{KEY[:16]}.json",
        "mine.txt",
    }


def test_blocks_of_another_length_are_not_taken_for_these(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stage(corpus_of(TEXTS), tokenizer, tmp_path, block_tokens=4)
    assert stage(corpus_of(TEXTS), tokenizer, tmp_path, block_tokens=8).block_tokens == 8


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = corpus_of([real_text()[:2000]])
    message = refused("vocabulary-mismatch", partial(stage, corpus, tokenizer, tmp_path, vocab_size=300))
    assert "0 to 299" in message
    assert not list(tmp_path.iterdir())
    refused("vocabulary-mismatch", partial(stage, corpus, tokenizer, tmp_path, eos_token_id=600))


def test_too_little_text_says_how_much_there_was_and_what_helps(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    num_tokens = len(stream_of(TEXTS, tokenizer))
    message = refused("too-little-text", partial(stage, corpus_of(TEXTS), tokenizer, tmp_path, block_tokens=1000))
    assert f"found {num_tokens} tokens" in message
    assert "--last-block keep" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["block_tokens", "limit_tokens"])
def test_settings_below_one_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, setting: str) -> None:
    refused("bad-setting", partial(stage, unread(), tokenizer, tmp_path, **{setting: 0}))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "file").touch()
    refused("cannot-write", partial(stage, corpus_of(TEXTS), tokenizer, tmp_path / "file" / "sub"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"pipeline.blocks.os.{call}", full)
    message = refused("cannot-write", partial(stage, corpus_of(TEXTS), tokenizer, tmp_path))
    assert f"blocks-{KEY[:16]}.bin" in message
    assert "No space left" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_write_that_fails_shows_the_first_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, mode: str) -> IO[bytes]:
        return Path("/dev/full").open("wb")

    monkeypatch.setattr("pipeline.blocks.open", full, raising=False)
    refused("cannot-write", partial(stage, corpus_of([real_text()[:200_000]]), tokenizer, tmp_path))


def test_a_file_that_shrank_after_opening_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    staged = stage(corpus_of(TEXTS), tokenizer, tmp_path)
    staged.path.write_bytes(b"\0" * 20)
    refused("broken-file", partial(staged.read, 0, 2))
    staged.path.unlink()
    refused("cannot-read", partial(staged.read, 0, 1))


def test_documents_longer_than_the_tokenizers_model_raise_no_warning(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    stage(corpus_of(["word " * 100]), tokenizer, tmp_path)
    assert "longer than" not in caplog.text


def test_a_document_in_pieces_counts_once_and_gets_one_eos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [real_text()[:30_000], "short", real_text()[30_000:50_000]]
    monkeypatch.setattr("pipeline.corpus.pieces", partial(pieces, max_chars=400))
    monkeypatch.setattr("pipeline.token_stream.BATCH_CHARS", 1000)
    staged = stage(corpus_of(texts), tokenizer, tmp_path, last_block="keep")
    assert staged.num_documents == 3
    assert staged.read(0, staged.num_blocks).reshape(-1)[: staged.num_tokens].tolist() == stream_of(texts, tokenizer)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", " \n  "])
@pytest.mark.parametrize("splitter", SPLITTERS)
def test_tokens_of_the_pieces_are_the_tokens_of_the_whole(splitter: str, newline: str) -> None:
    tokenizer = bpe(splitter)
    text = real_text()[:150_000].replace("\n", newline)
    cut = list(pieces([text[:777], text[777:]], max_chars=600))
    assert "".join(cut) == text
    assert len(cut) >= 200
    ids = [id_ for piece in cut for id_ in tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]]
    assert ids == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("splitter", ["gpt2", "smollm2", "llama3"])
def test_tokens_of_pieces_cut_at_newlines_are_the_tokens_of_the_whole(splitter: str) -> None:
    text = real_text()[:150_000].replace(" ", "_")
    cut = list(pieces([text], max_chars=900))
    assert len(cut) >= 150
    tokenizer = bpe(splitter)
    ids = [id_ for piece in cut for id_ in tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]]
    assert ids == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
