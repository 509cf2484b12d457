"""What is read together and what of it is scored: a corpus and a tokenizer come in, windows of tokens go out.

``strided``: each passage begins with the start token. A window reads ``window`` tokens and scores what follows those
that no window before has scored, so that each token is scored once, with at least ``window - stride`` tokens before it
(or the passage's beginning). The last window is moved back until it is full. With ``stride == window`` these are the
windows of lm-evaluation-harness's rolling log-likelihood.
``blocks``: passages are one text, cut every ``window`` tokens; a block is predicted by itself, its first token not at
all. Examples: the target's tokens are scored after those of the context, of which the last ones count if not all fit.

Legend: T tokens that a window reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cache_spec.errors import BadInputError
from train.evaluation.corpora import Corpus, Example, Passage
from train.evaluation.text import Ids, tokenise

DEFAULT_WINDOW = 1024
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One forward pass of one sequence, and which of its predictions count."""

    ids: Ids
    """int64 [T + 1]: what is read, and the token after it; token t is predicted from those before."""
    num_scored: int
    """The last so many tokens are scored."""
    unit: int
    """Number of what it belongs to and is resampled with."""
    words: float = 0.0
    """Words of the corpus that the scored tokens stand for; those of a line that a window cuts in proportion."""
    num_bytes: float = 0.0
    """UTF-8 bytes of the corpus that they stand for, in the same way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """All windows of a corpus for one tokenizer."""

    corpus: Corpus
    mode: str
    """``strided``, ``blocks`` or ``examples``."""
    window: int
    stride: int | None
    unit: str
    windows: tuple[Window, ...]
    examples: tuple[Example, ...] = ()
    """Those that the windows are of."""
    num_all: int
    """Windows of the whole corpus, of which ``windows`` may be a sample."""
    scored_digest: str
    """SHA-256 of the scored ids, unit by unit, and of the tokens that they stand for."""

    @property
    def is_sampled(self) -> bool:
        """Whether windows were left out."""
        return len(self.windows) < self.num_all

    @property
    def protocol(self) -> str:
        """How it is measured, in one sentence."""
        how = {
            "strided": f"windows of {self.window} tokens every {self.stride}, each token scored once",
            "blocks": f"blocks of {self.window} tokens that do not overlap, the first of each not predicted",
            "examples": f"at most {self.window} tokens read",
        }[self.mode]
        what = "examples" if self.mode == "examples" else "blocks" if self.mode == "blocks" else "windows"
        sample = (
            f"; a sample: {len(self.windows):,} of {self.num_all:,} {what}, evenly spread" if self.is_sampled else ""
        )
        return f"{self.corpus.protocol}; {how}{sample}."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """A passage in tokens, and what each token stands for."""

    ids: Ids
    words: NDArray[np.float64]
    num_bytes: NDArray[np.float64]

    def window(self, first: int, read: Ids, end: int, unit: int) -> Window:
        """A window that reads ``read`` and scores tokens ``first`` to ``end``."""
        return Window(
            ids=read,
            num_scored=end - first,
            unit=unit,
            words=float(self.words[first:end].sum()),
            num_bytes=float(self.num_bytes[first:end].sum()),
        )


def plan_windows(
    corpus: Corpus,
    tokenizer: Any,
    *,
    mode: str,
    window: int,
    stride: int,
    limit_tokens: int | None = None,
    limit_examples: int | None = None,
    start_id: int | None = None,
) -> WindowPlan:
    """Cut a corpus into windows of at most ``window`` tokens.

    Of a corpus of text about ``limit_tokens`` tokens are kept, of one of examples ``limit_examples``, evenly spread.
    ``start_id`` begins a passage (``strided``). Raises BadInputError ``no-start-token``, ``too-little-text``, and
    ``target-too-long`` for a target that does not fit a window.
    """
    if corpus.examples:
        kept = _spread(corpus.examples, limit_examples)
        numbers = {group: number for number, group in enumerate(dict.fromkeys(example.group for example in kept))}
        contexts = _ids(tokenizer, [example.context for example in kept])
        wholes = _ids(tokenizer, [example.context + example.target for example in kept])
        windows = tuple(
            _example(example, context, whole, numbers[example.group], window, corpus.source)
            for example, context, whole in zip(kept, contexts, wholes, strict=True)
        )
        return WindowPlan(
            corpus=corpus,
            mode="examples",
            window=window,
            stride=None,
            unit=corpus.unit,
            windows=windows,
            examples=tuple(kept),
            num_all=len(corpus.examples),
            scored_digest=_scored_digest(windows, tokenizer),
        )
    if mode == "blocks":
        windows = tuple(_blocks(_tokens(corpus.passages, tokenizer, corpus.source), window))
        unit, step = "block", window
    else:
        if start_id is None:
            hint = "--mode blocks needs none"
            raise BadInputError("no-start-token", corpus.name, expected="a tokenizer with bos or eos", hint=hint)
        passages = [_tokens([passage], tokenizer, corpus.source) for passage in corpus.passages]
        by_document = corpus.unit == "document"
        windows = tuple(
            cut for number, tokens in enumerate(passages) for cut in _strided(tokens, start_id, window, stride, number)
        )
        if not by_document:
            windows = tuple(replace(cut, unit=number) for number, cut in enumerate(windows))
        unit, step = corpus.unit, stride
    kept_windows = _spread(windows, None if limit_tokens is None else max(1, limit_tokens // step))
    return WindowPlan(
        corpus=corpus,
        mode=mode,
        window=window,
        stride=stride if mode == "strided" else None,
        unit=unit,
        windows=tuple(kept_windows),
        num_all=len(windows),
        scored_digest=_scored_digest(kept_windows, tokenizer),
    )


def start_token(tokenizer: Any) -> int | None:
    """What a passage begins with: the tokenizer's token for the beginning of a text, or else for the end of one."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if found is None else int(found)


def _scored_digest(windows: Sequence[Window], tokenizer: Any) -> str:
    digest = hashlib.sha256()
    scored = [window.ids[-window.num_scored :] for window in windows]
    for window, ids in zip(windows, scored, strict=True):
        digest.update(f"{window.unit} {len(ids)} ".encode())
        digest.update(ids.astype("<i8").tobytes())
    kinds = np.unique(np.concatenate(scored)).tolist()
    digest.update(repr(tokenizer.convert_ids_to_tokens(kinds)).encode())
    return digest.hexdigest()


def _tokens(passages: Sequence[Passage], tokenizer: Any, place: str) -> _Tokens:
    lines = [line for passage in passages for line in passage.lines]
    tokenised = tokenise("".join(lines), tokenizer, place=place, block_tokens=2)
    ends = np.cumsum(tokenised.bytes_per_token)
    line_ends = np.cumsum([0, *(len(line.encode()) for line in lines)])

    def shares(of_lines: list[NDArray[np.int64]]) -> NDArray[np.float64]:
        until = np.interp(ends, line_ends, np.cumsum([0, *np.concatenate(of_lines)]))
        return np.diff(until, prepend=0.0)

    return _Tokens(
        ids=tokenised.ids,
        words=shares([passage.words for passage in passages]),
        num_bytes=shares([passage.num_bytes for passage in passages]),
    )


def _strided(tokens: _Tokens, start_id: int, window: int, stride: int, unit: int) -> list[Window]:
    sequence = np.concatenate([[start_id], tokens.ids])
    windows, scored = [], 0
    while scored < len(tokens.ids):
        end = min(len(tokens.ids), window if scored == 0 else scored + stride)
        windows.append(tokens.window(scored, sequence[max(0, end - window) : end + 1], end, unit))
        scored = end
    return windows


def _blocks(tokens: _Tokens, window: int) -> list[Window]:
    starts = range(0, len(tokens.ids) - 1, window)
    return [
        tokens.window(start + 1, tokens.ids[start : start + window], min(start + window, len(tokens.ids)), number)
        for number, start in enumerate(starts)
    ]


def _example(example: Example, context: list[int], whole: list[int], unit: int, window: int, source: str) -> Window:
    place = f"{source}, target {example.target!r}"
    num_scored = len(whole) - len(context)
    if num_scored < 1:
        raise BadInputError("too-little-text", place, expected="a target of at least one token")
    if num_scored > window:
        raise BadInputError("target-too-long", place, expected=f"at most {window} tokens", found=num_scored)
    return Window(
        ids=np.array(whole[-window - 1 :], dtype=np.int64),
        num_scored=num_scored,
        unit=unit,
        num_bytes=len(example.target.encode()),
    )


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _spread(of: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """At most ``limit`` of a sequence, in the middles of as many equal parts."""
    if limit is None or limit >= len(of):
        return of
    return [of[(2 * number + 1) * len(of) // (2 * limit)] for number in range(limit)]
