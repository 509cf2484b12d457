"""Documents to one stream of token ids, each document ended by EOS.

In: a corpus of texts or of ids, and a tokenizer. Out: ids in batches, and where documents start among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cache_spec.errors import BadInputError
from pipeline.corpus import PIECE_CHARS, Corpus
from pipeline.textfiles import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARS = 4 * PIECE_CHARS
BATCH_PIECES = 256
Frame = tuple[int, int]
"""The tokens that begin and end a block."""
Tokens = tuple[NDArray[np.int64], list[int]]
"""Ids, and the places among them where documents start."""


def token_stream(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_id: int,
    vocab_size: int,
    *,
    ends: bool,
    frame: Frame | None,
) -> Iterator[Tokens]:
    """``ends``: whether documents of ids end with EOS; those of text do, but for a frame that ends each."""
    end_of_text = [eos_token_id] if ends or frame is None else []
    for batch in _batches(corpus.documents()):
        if isinstance(batch, np.ndarray):
            ids = _inside(batch, "the text's ids", vocab_size)
            ids = ids if frame is None else _without(ids, frame)
            if len(ids):
                yield _with_end(ids, eos_token_id) if ends else ids, [0]
            continue
        # verbose=False: blocks are cut from the ids, so their number before that says nothing about the model.
        encoded: Any = tokenizer(
            [piece for piece, _, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        parts: list[list[int]] = []
        starts: list[int] = []
        num_ids = 0
        for (_, is_first, is_last), ids in zip(batch, encoded, strict=True):
            if is_first:
                starts.append(num_ids)
            parts.append([*ids, *end_of_text] if is_last else ids)
            num_ids += len(parts[-1])
        flat = np.fromiter(chain.from_iterable(parts), dtype=np.int64, count=num_ids)
        yield _inside(flat, "the tokenizer", vocab_size), starts


def _inside(ids: Ids, place: str, vocab_size: int) -> Ids:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise vocabulary_mismatch(place, int(outside[0]), vocab_size)
    return ids


def _with_end(ids: Ids, eos_token_id: int) -> Ids:
    """A document of ids, ended as one of text is."""
    return ids if ids[-1] == eos_token_id else np.append(ids, np.int64(eos_token_id))


def _without(ids: Ids, frame: Frame) -> Ids:
    """A document of ids without the tokens that frame it."""
    ids = ids[1:] if len(ids) and ids[0] == frame[0] else ids
    return ids[:-1] if len(ids) and ids[-1] == frame[1] else ids


def _batches(documents: Iterable[Iterable[str] | Ids]) -> Iterator[list[tuple[str, bool, bool]] | Ids]:
    """Batches of (piece, is the document's first, is its last), bounded in pieces and characters; ids as they come."""
    batch: list[tuple[str, bool, bool]] = []
    num_chars = 0
    for document in documents:
        if isinstance(document, np.ndarray):
            if batch:
                yield batch
                batch, num_chars = [], 0
            yield document
            continue
        for piece in _marked(document):
            batch.append(piece)
            num_chars += len(piece[0])
            if num_chars >= BATCH_CHARS or len(batch) >= BATCH_PIECES:
                yield batch
                batch, num_chars = [], 0
    if batch:
        yield batch


def _marked(document: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    iterator = iter(document)
    piece, is_first = next(iterator), True
    for following in iterator:
        yield piece, is_first, False
        piece, is_first = following, False
    yield piece, is_first, True


def vocabulary_mismatch(place: str, token_id: int, vocab_size: int) -> BadInputError:
    return BadInputError(
        "vocabulary-mismatch",
        place,
        expected=f"ids from 0 to {vocab_size - 1}, the teacher's vocabulary",
        found=f"id {token_id}",
        hint="use the tokenizer that the teacher was trained with",
    )
