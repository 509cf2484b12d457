"""Tokenised lines of WikiText and PTB back to the way people write; each line by itself.

In: a line as the corpus has it, with its line feed. Out: the line as a model should read it.

The rules for WikiText are those of the field (spaces around ``@-@``, before punctuation and inside brackets and double
quotation marks go), close to what lm-evaluation-harness's wikitext task does. Single quotation marks stay apart: a mark
by itself may open, close, or be an apostrophe. Unknown words, ``<unk>``, and PTB's ``N`` for numbers stay: what they
stood for is not known.
"""

from __future__ import annotations

import re

_BOTH = (
    (re.compile(r" (n't|'(?:s|re|ve|ll|d|m|t|S))(?=\s)"), r"\1"),
    (re.compile(r"s ' "), "s' "),
    (re.compile(r" ([,.;:!?%])(?=\s)"), r"\1"),
    (re.compile(r"([(\[{]) "), r"\1"),
    (re.compile(r" ([)\]}])"), r"\1"),
    (re.compile(r'" ([^"]*?) "'), r'"\1"'),
    (re.compile(r"([$#£¥₱€]) (?=N|\d)"), r"\1"),
)
_WIKITEXT = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r"= (?==)"), "="),
    (re.compile(r" ° "), "°"),
)


def detokenise_wikitext(line: str) -> str:
    """A line of WikiText, raw or with ``<unk>``."""
    return _rewritten(line, (*_WIKITEXT, *_BOTH))


def detokenise_ptb(line: str) -> str:
    """A sentence of PTB."""
    return _rewritten(line, _BOTH)


def _rewritten(line: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        line = pattern.sub(replacement, line)
    return line.strip(" \n") + "\n"
