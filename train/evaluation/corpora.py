"""The corpora that language models are compared on, by name: from a file, or from the hub.

In: ``NAME`` or ``NAME=PATH``. Out: ``Corpus``: passages of running text, or examples of a context and what follows it,
with the sentence that says how they are measured. What a file must look like is in docs/evaluation.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from train.evaluation.detokenise import detokenise_ptb, detokenise_wikitext
from train.evaluation.text import decoded, json_rows, read_bytes, refuse_lone_surrogates

ENWIK8_BYTES = 100_000_000
ENWIK8_TEST_BYTES = 5_000_000
PROMPT = "Words: {concepts}\nSentence:"
"""What CommonGen's sentence follows; the concepts stand in the file's order, with commas."""
_TITLE = re.compile(r"= [^=\s](?:.*[^=\s])? =")
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Running text as models read it, and how much of the corpus each of its lines stands for."""

    lines: tuple[str, ...]
    """Each with its line feed; models read them joined."""
    words: NDArray[np.int64]
    """Words of each line as the corpus writes it, separated by white space, and maybe its end."""
    num_bytes: NDArray[np.int64]
    """UTF-8 bytes of each line as the corpus writes it."""

    @property
    def text(self) -> str:
        """What models read."""
        return "".join(self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A context that is given, and the target after it that is predicted."""

    context: str
    target: str
    group: str
    """Examples of one group are resampled together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What models are measured on; either passages or examples are there."""

    name: str
    source: str
    protocol: str
    """How the text was prepared and what is counted: one sentence without its full stop."""
    unit: str
    """What of it is resampled where every token has its context: a document, a window, an example."""
    passages: tuple[Passage, ...] = ()
    examples: tuple[Example, ...] = ()
    counts_words: bool = False
    is_last_word: bool = False
    """Whether the loss is of a whole target, and right means every token of it."""


def read_corpus(given: str, *, count_line_ends: bool = False) -> Corpus:
    """Read a corpus by ``NAME``, from the hub, or ``NAME=PATH``, from a file.

    ``count_line_ends``: whether the end of a line counts as one of its words (WikiText and PTB). Raises BadInputError:
    ``unknown-text``, ``cannot-read``, ``invalid-utf8``, ``broken-json``, ``bad-record``; ``bad-corpus`` for a file that
    is not in the corpus's own form; and ``unknown-corpus`` where the hub does not give it.
    """
    name, _, path = given.partition("=")
    reader = _READERS[name]
    if path:
        file = Path(path).expanduser()
        return reader(_Source(name, path, read_bytes(file), count_line_ends))
    data, source = _from_hub(name)
    return reader(_Source(name, source, data, count_line_ends))


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    place: str
    data: bytes
    count_line_ends: bool

    def refused(self, expected: str, found: object) -> BadInputError:
        hint = f"docs/evaluation.md says what a file of {self.name} looks like"
        return BadInputError("bad-corpus", self.place, expected=expected, found=found, hint=hint)

    def text(self) -> str:
        text = decoded(self.data, self.place)
        if not text.strip():
            raise self.refused(f"text of {self.name}", "nothing")
        return text

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        rows = list(json_rows(self.place, self.data))
        if not rows:
            raise self.refused("one JSON object a line", "nothing")
        return rows


def _wikitext(source: _Source) -> Corpus:
    lines = _lines(source.text())
    # A title has blank lines around it: in an article's text, a line may look like one.
    blank = [not line.strip() for line in ["", *lines, ""]]
    starts = [
        number
        for number, line in enumerate(lines)
        if _TITLE.fullmatch(line.strip()) and blank[number] and blank[number + 2]
    ]
    if not starts:
        first = next(line.strip() for line in lines if line.strip())
        raise source.refused("articles under ' = Title = '", first[:_SHOWN_CHARACTERS])
    # What stands before the first title, blank lines as a rule, belongs to its article.
    bounds = [0, *starts[1:], len(lines)]
    passages = tuple(
        _passage(lines[start:end], detokenise_wikitext, source.count_line_ends) for start, end in pairwise(bounds)
    )
    return Corpus(
        name=source.name,
        source=source.place,
        protocol=f"WikiText, detokenised, {_unknown_words(lines, 'kept as written')}; {_counted(source)}",
        unit="document",
        passages=passages,
        counts_words=True,
    )


def _ptb(source: _Source) -> Corpus:
    lines = _lines(source.text())
    words = {word for line in lines for word in line.split()}
    if not words & {"<unk>", "N"}:
        first = next(line.strip() for line in lines if line.strip())
        raise source.refused("a sentence a line, with <unk> and N", first[:_SHOWN_CHARACTERS])
    return Corpus(
        name=source.name,
        source=source.place,
        protocol=f"PTB, detokenised, {_unknown_words(lines, 'and the N of numbers kept as written')}; "
        + _counted(source),
        unit="window",
        passages=(_passage(lines, detokenise_ptb, source.count_line_ends),),
        counts_words=True,
    )


def _enwik8(source: _Source) -> Corpus:
    is_whole = len(source.data) == ENWIK8_BYTES
    data = source.data[-ENWIK8_TEST_BYTES:] if is_whole else source.data
    # A slice may begin and end inside a character.
    head = next((number for number, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    text = decoded(data[head:], source.place, may_end_inside=True)
    if "[[" not in text and "</" not in text:
        raise source.refused("Wikipedia's XML", text.strip()[:_SHOWN_CHARACTERS] or "nothing")
    part = "the last 5,000,000 of its 100,000,000 bytes" if is_whole else "the file as it is"
    return Corpus(
        name=source.name,
        source=source.place,
        protocol=f"enwik8, {part}, raw; bits per byte are of its UTF-8 bytes",
        unit="window",
        passages=(_passage(text.splitlines(keepends=True), str, count_line_ends=False),),
    )


def _lambada(source: _Source) -> Corpus:
    examples = []
    for place, row in source.rows():
        text = row.get("text")
        if isinstance(text, str):
            refuse_lone_surrogates(place, text)
        context, _, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
        if not context.strip() or not word.strip():
            raise BadInputError("bad-record", place, expected="a passage of words as its text", found=text)
        examples.append(Example(context=context, target=f" {word}", group=place))
    return Corpus(
        name=source.name,
        source=source.place,
        protocol="LAMBADA, the last word after its passage: accuracy is the share of examples whose every token of the"
        " word is the model's first choice, without a filter of stop words; loss is the word's summed nats, and"
        " perplexity exp of its mean over examples",
        unit="example",
        examples=tuple(examples),
        is_last_word=True,
    )


def _common_gen(source: _Source) -> Corpus:
    examples = []
    for place, row in source.rows():
        concepts, target = row.get("concepts"), row.get("target")
        is_list = isinstance(concepts, list) and concepts and all(isinstance(word, str) for word in concepts)
        if not is_list or not isinstance(target, str) or not target.strip():
            raise BadInputError("bad-record", place, expected="concepts, a list of words, and a target", found=row)
        assert concepts is not None
        context = refuse_lone_surrogates(place, PROMPT.format(concepts=", ".join(concepts)))
        refuse_lone_surrogates(place, target)
        ids = (row.get(name) for name in ("concept_set_id", "concept_set_idx"))
        group = next((number for number in ids if number is not None), context)
        examples.append(Example(context=context, target=f" {target.strip()}", group=str(group)))
    return Corpus(
        name=source.name,
        source=source.place,
        protocol=f"CommonGen, the tokens of the target after the prompt {PROMPT.format(concepts='A, B, C')!r}, the end"
        " of the sentence not predicted",
        unit="concept set",
        examples=tuple(examples),
    )


_READERS: dict[str, Callable[[_Source], Corpus]] = {
    "wikitext103": _wikitext,
    "ptb": _ptb,
    "enwik8": _enwik8,
    "lambada": _lambada,
    "common_gen": _common_gen,
}


def _lines(text: str) -> list[str]:
    """Lines as the corpus has them, which no other separator than a line feed ends."""
    return [line + "\n" for line in text.replace("\r\n", "\n").removesuffix("\n").split("\n")]


def _passage(lines: Sequence[str], detokenise: Callable[[str], str], count_line_ends: bool) -> Passage:
    return Passage(
        lines=tuple(map(detokenise, lines)),
        words=np.array([len(line.split()) + count_line_ends for line in lines]),
        num_bytes=np.array([len(line.encode()) for line in lines]),
    )


def _unknown_words(lines: Sequence[str], what: str) -> str:
    return f"its {sum(line.split().count('<unk>') for line in lines):,} <unk> {what}"


def _counted(source: _Source) -> str:
    ends = "each line's end counted as a word" if source.count_line_ends else "ends of lines not counted"
    return f"words and bytes are those of the corpus before detokenisation, {ends}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hub:
    """Where the hub has a corpus. Data sets with a loading script are read from the hub's own conversion."""

    path: str
    config: str | None = None
    split: str = "test"
    revision: str | None = None


_HUB = {
    "wikitext103": _Hub(path="Salesforce/wikitext", config="wikitext-103-raw-v1"),
    "ptb": _Hub(path="ptb-text-only/ptb_text_only", config="penn_treebank", revision="refs/convert/parquet"),
    "enwik8": _Hub(path="LTCB/enwik8", config="enwik8-raw", split="train", revision="refs/convert/parquet"),
    "lambada": _Hub(path="EleutherAI/lambada_openai", config="default"),
    "common_gen": _Hub(path="allenai/common_gen", split="validation"),
}


def _from_hub(name: str) -> tuple[bytes, str]:
    """A corpus in the form of its file, and the words that say where it came from."""
    import json

    import datasets

    hub = _HUB[name]
    try:
        rows: Any = datasets.load_dataset(hub.path, hub.config, split=hub.split, revision=hub.revision)
        if name in ("lambada", "common_gen"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            text = "".join(_hub_lines(name, rows))
    except Exception as error:  # the hub client raises its own, its network library's and the system's errors
        hint = f"give a file instead: --corpus {name}=PATH"
        raise BadInputError("unknown-corpus", f"{name} from {hub.path}", found=first_line(error), hint=hint) from None
    source = " ".join(filter(None, (f"hub {hub.path}", hub.config, hub.split)))
    return text.encode(), source


def _hub_lines(name: str, rows: Any) -> Iterator[str]:
    """The file's text again: lines of WikiText keep their line feed on the hub, but for blank ones; PTB's do not."""
    column = "sentence" if name == "ptb" else "text"
    for row in rows:
        line = row[column]
        yield line if name == "enwik8" or line.endswith("\n") else line + "\n"
