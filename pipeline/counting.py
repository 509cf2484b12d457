"""How many tokens a corpus comes to, without tokenising all of it.

In: a corpus and a tokenizer. Out: tokens, blocks where every document begins one, and the ids of a sample.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.corpus import Corpus

_SAMPLE_CHARS = 1 << 20
_COUNTED_CHARS = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What the text comes to."""

    sample_ids: np.ndarray[Any, Any]
    num_tokens: int
    num_blocks_each: int
    """Blocks, if every document begins one."""
    certainty: str


def count_tokens(
    corpus: Corpus, tokenizer: Any, *, eos_token_id: int, limit_tokens: int | None, stream_tokens: int
) -> Counted:
    """Count the corpus: of text, a sample's tokens per character stands for all; ids are counted as they are.

    ``stream_tokens`` of a block are text: all of them, or all but its frame.
    """
    ids: list[int] = []
    given_ids: list[int] = []
    sampled, counted, num_given = 0, 0, 0
    chars_of_each, given_of_each = array("q"), array("q")
    certainty = "estimated from the tokens per character of its first 1 MiB"
    for document in corpus.documents():
        if isinstance(document, np.ndarray):
            given_of_each.append(len(document))
            num_given += len(document)
            if len(given_ids) < _SAMPLE_CHARS:
                given_ids += document.tolist()
        else:
            before = counted
            for text in document:
                counted += len(text)
                if sampled < _SAMPLE_CHARS:
                    ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                    sampled += len(text)
            if sampled < _SAMPLE_CHARS:
                ids.append(eos_token_id)
            chars_of_each.append(counted - before)
        found = num_given + (counted * len(ids) / sampled if sampled else 0)
        if limit_tokens is not None and found > limit_tokens * 1.1:
            break
        if counted > _COUNTED_CHARS or num_given > _COUNTED_CHARS:
            certainty = "at least: only the first 256 MiB of text were counted"
            break
    else:
        if not sampled:
            certainty = "as in the ids"
    ratio = len(ids) / sampled if sampled else 0.0
    num_tokens = num_given + round(counted * ratio)
    sizes = np.concatenate([np.asarray(given_of_each, dtype=np.float64), np.asarray(chars_of_each) * ratio])
    num_blocks = float(np.ceil(sizes / stream_tokens).clip(1).sum())
    if limit_tokens is not None and num_tokens >= limit_tokens:
        num_blocks *= limit_tokens / num_tokens
        num_tokens, certainty = limit_tokens, "the limit"
    return Counted(
        sample_ids=np.asarray(ids + given_ids),
        num_tokens=num_tokens,
        num_blocks_each=max(1, round(num_blocks)),
        certainty=certainty,
    )
