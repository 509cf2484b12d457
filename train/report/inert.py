"""Foreign text made harmless to look at: control characters and marks that reorder text become visible signs.

In: any text of a corpus, a model or a path. Out: text that a page, an attribute and an XML parser take as it is.
Escaping for HTML is the template engine's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

# Controls, formats (bidirectional marks, joiners), line and paragraph separators, surrogates, private and unassigned.
_INERT = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}
_WHITE = {"\n": "\u21b5", "\t": "\u21e5"}
_SIGN = re.compile("(\u27e8[0-9A-F+U ]+\u27e9|[\u21b5\u21e5])")


def visible(text: str) -> str:
    """The same text with a sign for each character that is not to be seen, or that changes how others are seen."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if unicodedata.category(character) not in _INERT:
        return character
    return _WHITE.get(character, f"\u27e8U+{ord(character):04X}\u27e9")


def signs(text: str) -> Markup:
    """Foreign text as HTML, its signs set apart."""
    parts = _SIGN.split(visible(text))
    return Markup("").join(
        Markup('<span class="sign">{}</span>').format(part) if at % 2 else escape(part) for at, part in enumerate(parts)
    )


def isolated(text: str) -> Markup:
    """Foreign text as HTML, in a direction of its own."""
    return Markup("<bdi>") + signs(text) + Markup("</bdi>")


def plain(value: Any) -> Any:
    """The same JSON value with every text visible, and None for numbers that JSON or 64 bits do not hold."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible(str(name)): plain(part) for name, part in value.items()}
    if isinstance(value, Sequence):
        return [plain(part) for part in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        return None
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value
