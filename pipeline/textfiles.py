"""Local text files, read record by record: plain text, JSON lines and Parquet, each also compressed.

In: a path and the name of the field that holds the text. Out: records, each a place for messages and a document's
text in chunks; and a file's digest. Every fault of a file is a ``BadInputError`` that says where.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO

import numpy as np
from numpy.typing import NDArray

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from cache_spec.manifest import SourceInfo

READ_BYTES = 1 << 16
CODECS = {".gz": "gzip", ".zst": "zstd"}

Ids = NDArray[np.int64]
Record = tuple[str, Iterable[str] | Ids | None]
"""Where a document lies, for messages; and its text in chunks of any size, or its token ids, or None where the field is
null."""


def reader_of(path: PurePath) -> Callable[[Path, str], Iterator[Record]] | None:
    """What reads a file of this name, given its path and the text's field; None for one that is no text file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in CODECS:
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def file_info(path: Path, name: str) -> SourceInfo:
    """Size and SHA-256 of a file as it lies on disk; raises ``cannot-read``."""
    with _opened(path, plain=True) as file:
        digest = hashlib.file_digest(file, "sha256")
        return SourceInfo(name=name, num_bytes=file.tell(), sha256=digest.hexdigest())


def text_of(row: Mapping[str, object], text_field: str, place: str) -> tuple[str] | None:
    """The text of a record, None where it is null; raises ``missing-field``, ``wrong-field-type``, ``invalid-utf8``."""
    if text_field not in row:
        raise _missing_field(place, text_field, row)
    value = row[text_field]
    if value is None:
        return None
    if not isinstance(value, str):
        expected = f"a string in field {text_field!r}"
        raise BadInputError("wrong-field-type", place, expected=expected, found=type(value).__name__)
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair at character {error.start}"
        raise BadInputError("invalid-utf8", place, expected="text that UTF-8 can hold", found=found) from None
    return (value,)


@contextmanager
def _opened(path: Path, *, plain: bool = False) -> Iterator[io.BufferedReader]:
    """Open a file for its bytes, decompressed unless ``plain``; read errors become ours."""
    codec = None if plain else CODECS.get(path.suffix.lower())
    try:
        if codec is None:
            with path.open("rb") as file:
                yield file
        else:
            # pyarrow says so where a compressed file ends too early; the zstandard package returns less in silence.
            import pyarrow

            with io.BufferedReader(pyarrow.input_stream(str(path), compression=codec), READ_BYTES) as stream:
                yield stream
    except OSError as error:
        kind = "cannot-read" if error.errno else "broken-file"
        raise BadInputError(kind, path, found=error.strerror or first_line(error)) from error


def _text_file(path: Path, text_field: str) -> Iterator[Record]:
    yield str(path), _decoded(path)


def _decoded(path: Path) -> Iterator[str]:
    decoder = getincrementaldecoder("utf-8")()
    with _opened(path) as file:
        first = file.read(READ_BYTES)
        position = len(BOM_UTF8) if first.startswith(BOM_UTF8) else 0
        data = first[position:]
        while True:
            num_pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = f"{path}, byte {position - num_pending + error.start}"
                raise BadInputError("invalid-utf8", place, expected="UTF-8 text", found=error.reason) from None
            if not data:
                return
            position += len(data)
            yield text
            data = file.read(READ_BYTES)


def _json_lines(path: Path, text_field: str) -> Iterator[Record]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            data = line.removeprefix(BOM_UTF8) if number == 1 else line
            if data.isspace():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(data.decode())
            except UnicodeDecodeError as error:
                found = f"{error.reason} at byte {error.start} of the line"
                raise BadInputError("invalid-utf8", place, expected="UTF-8 text", found=found) from None
            except (ValueError, RecursionError) as error:
                raise BadInputError("broken-json", place, expected="one JSON object a line", found=error) from None
            if not isinstance(row, dict):
                found = type(row).__name__
                raise BadInputError("bad-record", place, expected="one JSON object a line", found=found)
            yield place, text_of(row, text_field, place)


def _parquet_rows(path: Path, text_field: str) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    place, number = str(path), 0
    with _opened(path) as stream, _seekable(path, stream) as file:
        try:
            table = parquet.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
            if text_field not in table.schema_arrow.names:
                raise _missing_field(place, text_field, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    place = f"{path}, row {number}"
                    yield place, text_of({text_field: value.as_py()}, text_field, place)
        except UnicodeDecodeError as error:
            raise BadInputError("invalid-utf8", place, expected="UTF-8 text", found=error.reason) from None
        except pyarrow.ArrowException as error:
            raise BadInputError("broken-file", place, expected="Parquet", found=first_line(error)) from None


@contextmanager
def _seekable(path: Path, stream: io.BufferedReader) -> Iterator[IO[bytes]]:
    """The stream itself, or a temporary file where it is decompressed: Parquet keeps its directory at the end."""
    if path.suffix.lower() not in CODECS:
        yield stream
        return
    with tempfile.TemporaryFile() as spool:
        shutil.copyfileobj(stream, spool)
        yield spool


READERS: Mapping[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet_rows,
    ".txt": _text_file,
}


def _missing_field(place: str, text_field: str, names: Iterable[str]) -> BadInputError:
    found = ", ".join(list(names)[:20]) or "no field"
    return BadInputError("missing-field", place, expected=f"a field {text_field!r}", found=found[:400])
