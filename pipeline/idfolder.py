"""A folder of documents that are token ids already: ``ids.parquet``, one list a row, and ``ids.json`` about it.

In: the documents of an import, or a folder. Out: the folder, whose header is written last (ids without it do not
count); or its records, as text for a capture.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.durable import TEMPORARY_PREFIX, replace_file, sync_folder, writing
from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from cache_spec.manifest import SourceInfo
from pipeline.textfiles import Ids, Record, file_info

HEADER_NAME = "ids.json"
FORMAT, FORMAT_VERSION = "kdpipe-ids", 1
_DATA_NAME = "ids.parquet"
_COLUMN = "ids"
_GROUP_IDS = 1 << 20
_FIELDS: dict[str, type] = {
    "vocab_size": int,
    "dtype": str,
    "num_documents": int,
    "num_tokens": int,
    "num_bytes": int,
    "sha256": str,
    "tokenizer": dict,
    "source": dict,
}


@dataclass(frozen=True, kw_only=True)
class IdFolder:
    """A finished folder of ids; opens its data when it is read."""

    folder: Path
    header: dict[str, Any]

    @property
    def tokenizer_sha256(self) -> str:
        return str(self.header["tokenizer"].get("sha256"))

    @property
    def tokenizer_name(self) -> str:
        return str(self.header["tokenizer"].get("name"))

    def info(self) -> SourceInfo:
        """Name, size and digest of the ids; ``damaged-ids`` where they are not those that were imported."""
        info = file_info(self.folder / _DATA_NAME, self.folder.name)
        if (info.num_bytes, info.sha256) != (self.header["num_bytes"], self.header["sha256"]):
            hint = "import the pickle again in another --out"
            raise BadInputError(
                "damaged-ids", self.folder / _DATA_NAME, expected=self.header["sha256"], found=info.sha256, hint=hint
            )
        return info

    def records(self) -> Iterator[Record]:
        """Each document's place and ids, int64 [T]."""
        import pyarrow
        from pyarrow import parquet

        path, number = self.folder / _DATA_NAME, 0
        try:
            with parquet.ParquetFile(path, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=1024, columns=[_COLUMN]):
                    lists = batch.column(0)
                    values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
                    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                        number += 1
                        yield f"{path}, document {number}", values[start:end].astype(np.int64)
        except (pyarrow.ArrowException, OSError) as error:
            raise BadInputError("broken-file", path, expected="Parquet", found=first_line(error)) from None


def open_ids(folder: Path) -> IdFolder:
    """Open a finished folder of ids; raises ``bad-ids``."""
    path = folder / HEADER_NAME
    try:
        header = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInputError("bad-ids", path, expected="a header of ids", found=first_line(error)) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise BadInputError("bad-ids", path, expected=f"format {FORMAT}")
    if header.get("format_version") != FORMAT_VERSION:
        found = header.get("format_version")
        raise BadInputError("bad-ids", path, expected=f"format_version {FORMAT_VERSION}", found=found)
    for name, kind in _FIELDS.items():
        if type(header.get(name)) is not kind:
            raise BadInputError("bad-ids", f"{path}: {name}", expected=kind.__name__, found=header.get(name))
    return IdFolder(folder=folder, header=header)


def write_ids(
    folder: Path,
    documents: Iterable[Ids],
    *,
    vocab_size: int,
    about: Mapping[str, Any],
    on_document: Callable[[int], object] = lambda tokens: None,
) -> IdFolder:
    """Write documents into a folder that exists, ids below ``vocab_size``; raises ``vocabulary-mismatch``."""
    import pyarrow
    from pyarrow import parquet

    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(dtype))
    path = folder / _DATA_NAME
    temporary = folder / f"{TEMPORARY_PREFIX}{_DATA_NAME}-{os.getpid()}-{secrets.token_hex(4)}"
    num_documents = num_tokens = 0
    try:
        with writing(path):
            with parquet.ParquetWriter(temporary, pyarrow.schema([(_COLUMN, kind)]), compression="zstd") as writer:
                for group in _groups(_checked(documents, vocab_size)):
                    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in group])]).astype(np.int32)
                    values = pyarrow.array(np.concatenate(group).astype(dtype))
                    lists = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), values)
                    writer.write_table(pyarrow.table({_COLUMN: lists}))
                    num_documents += len(group)
                    num_tokens += len(values)
                    on_document(len(values))
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    info = file_info(path, path.name)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "num_documents": num_documents,
        "num_tokens": num_tokens,
        "num_bytes": info.num_bytes,
        "sha256": info.sha256,
        **about,
    }
    replace_file(folder / HEADER_NAME, (json.dumps(header, indent=1, ensure_ascii=False) + "\n").encode())
    return IdFolder(folder=folder, header=header)


def _checked(documents: Iterable[Ids], vocab_size: int) -> Iterator[Ids]:
    for number, ids in enumerate(documents, 1):
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise BadInputError(
                "vocabulary-mismatch",
                f"document {number}",
                expected=f"ids from 0 to {vocab_size - 1}, the tokenizer's",
                found=f"id {outside[0]}",
                hint="name the tokenizer that the ids were made with",
            )
        yield ids


def _groups(documents: Iterable[Ids]) -> Iterator[list[Ids]]:
    """Documents in groups of about a million ids, one of which at a time is in memory."""
    group: list[Ids] = []
    num_ids = 0
    for ids in documents:
        group.append(ids)
        num_ids += len(ids) + 1  # empty documents fill a group too
        if num_ids >= _GROUP_IDS:
            yield group
            group, num_ids = [], 0
    if group:
        yield group
