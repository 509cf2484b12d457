"""Tokens as people read them: the tokenizer's file that a cache keeps comes in, ids go in, pieces of text come out.

A piece of a byte-level vocabulary that is no whole character is shown by its bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from cache_spec.smallfile import MAX_SMALL_FILE_BYTES, read_small

TOKENIZER_FILE = Path("tokenizer") / "tokenizer.json"
_WORD_START = "\u2581"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    """One token."""

    id: int
    text: str
    """As it stands in the text, spaces included."""
    kind: str
    """``text``; ``special`` for a token that stands for no text; ``bytes`` for parts of a character; ``id`` for an
    unknown one."""


class Pieces:
    """The vocabulary of a cache."""

    def __init__(self, definition: bytes | None) -> None:
        """``definition``: content of ``tokenizer.json``; None or a broken one: ids are all that is known."""
        self.is_known = False
        self._tokenizer: Any = None
        self._special: set[int] = set()
        self._is_byte_level = False
        if definition is None:
            return
        try:
            self._tokenizer = Tokenizer.from_buffer(definition)
            body = json.loads(definition)
        except Exception:  # the library raises bare Exception
            return
        self.is_known = True
        added = body.get("added_tokens") or []
        self._special = {token["id"] for token in added if token.get("special")}
        self._is_byte_level = '"ByteLevel"' in json.dumps(body.get("decoder"))

    @classmethod
    def of_cache(cls, folder: Path) -> Pieces:
        """The vocabulary beside the shards; of ids alone where there is none."""
        try:
            return cls(read_small(folder / TOKENIZER_FILE, MAX_SMALL_FILE_BYTES))
        except OSError:
            return cls(None)

    def piece(self, token_id: int) -> Piece:
        """A token by itself."""
        token = self._tokenizer.id_to_token(token_id) if self.is_known else None
        if token is None:
            return Piece(token_id, f"#{token_id}", "id")
        if token_id in self._special:
            return Piece(token_id, token, "special")
        data = self._bytes(token)
        if data is None:
            return Piece(token_id, token.replace(_WORD_START, " "), "text")
        try:
            return Piece(token_id, data.decode(), "text")
        except UnicodeDecodeError:
            return Piece(token_id, f"\u27e8{data.hex(' ').upper()}\u27e9", "bytes")

    def text(self, ids: Iterable[int]) -> str:
        """Tokens that follow each other, special ones by their names."""
        ids = list(ids)
        if not self.is_known:
            return " ".join(f"#{token_id}" for token_id in ids)
        decoded: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return decoded

    def _bytes(self, token: str) -> bytes | None:
        """What a token of bytes stands for; None for one of characters."""
        if not self._is_byte_level:
            match = _BYTE.fullmatch(token)
            return None if match is None else bytes.fromhex(match[1])
        return bytes(_BYTES[c] for c in token) if all(c in _BYTES for c in token) else None


def _byte_alphabet() -> dict[str, int]:
    """Characters that byte-level vocabularies write bytes as: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_alphabet()
