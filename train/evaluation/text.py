"""From a text file to blocks of one tokenizer's tokens, each token with the bytes of text it stands for.

In: a UTF-8 file and a tokenizer. Out: the text, and its tokens cut into blocks that do not overlap.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line

Ids = NDArray[np.int64]

DOCUMENT_GAP = "\n\n"
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
TOKENIZER_PATTERNS = (*_TOKENIZER_FILES, "tokenizer_config.json", "merges.txt", "*_tokens*.json")
# Of a limited file, this much more is read: room for a byte order mark, and one byte that says the file goes on.
_SPARE_BYTES = len(BOM_UTF8) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedText:
    """A text as one tokenizer sees it, to be predicted in blocks of which none knows the one before."""

    ids: Ids
    """int64, token ids."""
    bytes_per_token: Ids
    """int64, UTF-8 bytes from the end of the token before to the token's own end; what follows the last is its too."""
    block_tokens: int

    @property
    def is_predicted(self) -> NDArray[np.bool_]:
        """Whether a token is predicted: all but the first of each block."""
        predicted: NDArray[np.bool_] = np.arange(len(self.ids)) % self.block_tokens != 0
        return predicted

    @property
    def num_predicted(self) -> int:
        """Number of predicted tokens."""
        return int(self.is_predicted.sum())

    @property
    def num_predicted_bytes(self) -> int:
        """UTF-8 bytes that the predicted tokens stand for."""
        return int(self.bytes_per_token[self.is_predicted].sum())

    def batches(self, batch_blocks: int) -> Iterator[Ids]:
        """Yield int64 ids [B, T] of whole blocks, and then the last partial block [1, rest] by itself."""
        end = len(self.ids) - len(self.ids) % self.block_tokens
        whole = self.ids[:end].reshape(-1, self.block_tokens)
        for start in range(0, len(whole), batch_blocks):
            yield whole[start : start + batch_blocks]
        if len(self.ids) - end > 1:
            yield self.ids[None, end:]


def read_text(path: Path, limit_bytes: int | None = None) -> str:
    """Return the text of a file, or of its first ``limit_bytes`` bytes, cut back to a whole character.

    Texts of a .jsonl file, the field ``text`` of each line, are joined by a blank line, and the limit counts in the
    joined text. A byte order mark is dropped. Raises BadInputError: ``unknown-text``, ``cannot-read``,
    ``invalid-utf8``, ``broken-json``, ``bad-record``, ``no-text``.
    """
    is_lines = path.suffix.lower() == ".jsonl"
    data = read_bytes(path, None if is_lines or limit_bytes is None else limit_bytes + _SPARE_BYTES)
    mark = len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0
    data = data[mark:]
    if is_lines:
        data = DOCUMENT_GAP.join(_documents(path, data)).encode()
    is_whole = limit_bytes is None or len(data) <= limit_bytes
    text = decoded(data[:limit_bytes], path, offset=mark, may_end_inside=not is_whole)
    if not text.strip():
        limit = "" if is_whole else f" in the first {limit_bytes} bytes"
        raise BadInputError("no-text", path, found=("only white space" if text else "nothing") + limit)
    return text


def read_bytes(path: Path, num_bytes: int | None = None) -> bytes:
    """A file's bytes, or its first so many; BadInputError ``unknown-text``, ``cannot-read``."""
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except FileNotFoundError:
        raise BadInputError("unknown-text", path, found="no such file") from None
    except OSError as error:
        raise BadInputError("cannot-read", path, found=error.strerror) from None


def decoded(data: bytes, place: object, *, offset: int = 0, may_end_inside: bool = False) -> str:
    """UTF-8 as text; ``offset`` counts bytes of the file before it, for the error: BadInputError ``invalid-utf8``."""
    try:
        return getincrementaldecoder("utf-8")().decode(data, final=not may_end_inside)
    except UnicodeDecodeError as error:
        place, hint = f"{place}, byte {offset + error.start}", "compressed files are to be unpacked first"
        raise BadInputError("invalid-utf8", place, expected="UTF-8 text", found=error.reason, hint=hint) from None


def json_rows(path: object, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of each line that is not blank.

    Raises BadInputError ``invalid-utf8``, ``broken-json``, ``bad-record`` for what is no object.
    """
    for number, line in enumerate(data.removeprefix(BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise BadInputError("invalid-utf8", place, expected="UTF-8 text", found=error.reason) from None
        except (ValueError, RecursionError) as error:
            raise BadInputError("broken-json", place, expected="one JSON object a line", found=error) from None
        if not isinstance(row, dict):
            raise BadInputError("bad-record", place, expected="one JSON object a line", found=type(row).__name__)
        yield place, row


def refuse_lone_surrogates(place: str, text: str) -> str:
    """The text itself; BadInputError ``bad-record`` for half of a surrogate pair, which JSON writes as an escape."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError("bad-record", place, expected="text", found=error.reason) from None
    return text


def _documents(path: Path, data: bytes) -> Iterator[str]:
    for place, row in json_rows(path, data):
        text = row.get("text")
        if not isinstance(text, str):
            raise BadInputError("bad-record", place, expected="an object with a string as its text")
        yield refuse_lone_surrogates(place, text)


def open_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a model's folder, None where there is no file of one; BadInputError ``no-tokenizer``."""
    # Without any file the library makes up an empty tokenizer of the model's family and says nothing.
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return _tokenizer_class(folder).from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise BadInputError("no-tokenizer", folder, found=first_line(error)) from None


def _tokenizer_class(folder: Path) -> Any:
    """The plain fast tokenizer where the folder declares it, as in capture: beside some configs (Qwen2's, among
    others) AutoTokenizer would put the model family's own in its place, which splits text in another way."""
    settings = folder / "tokenizer_config.json"
    declared = json.loads(settings.read_bytes()) if settings.is_file() else {}
    plain = declared.get("tokenizer_class") in {"PreTrainedTokenizerFast", "TokenizersBackend"}
    return PreTrainedTokenizerFast if plain else AutoTokenizer


def tokenise(
    text: str, tokenizer: Any, *, place: object, block_tokens: int, limit_tokens: int | None = None
) -> TokenisedText:
    """Tokenise a text whole, without special tokens of the tokenizer's own, and keep its first ``limit_tokens``.

    Several tokens of one character count its bytes once, with the first; what a tokenizer drops counts with the token
    after it. So the bytes of all tokens of a text are the bytes of the text, whatever the tokenizer. ``tokenizer`` is
    a fast one. Raises BadInputError ``too-little-text`` where nothing is left to predict.
    """
    # verbose=False: the text is cut into blocks, so its length says nothing about the model.
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    if len(ids) < 2:
        raise BadInputError("too-little-text", place, expected="at least 2 tokens", found=len(ids))
    ends = np.maximum.accumulate(np.asarray(encoded["offset_mapping"], dtype=np.int64)[:, 1])
    ends[-1] = len(text)
    bytes_per_token = np.diff(_byte_offsets(text)[ends], prepend=0)
    kept = slice(limit_tokens)
    tokenised = TokenisedText(ids=ids[kept], bytes_per_token=bytes_per_token[kept], block_tokens=block_tokens)
    if not tokenised.num_predicted_bytes:
        raise BadInputError("too-little-text", place, expected="tokens of two characters", found=len(tokenised.ids))
    return tokenised


def _byte_offsets(text: str) -> Ids:
    """UTF-8 bytes before each character of a text, and, as the last entry, in all of it."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + sum((code_points >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    return np.concatenate([[0], np.cumsum(widths)])
