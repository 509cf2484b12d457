"""``kdpipe export``: a cache's targets as files that others' programs read, one after the other in bounded memory.

In: a finished cache and settings. Out: a folder of Parquet or safetensors files, an index of them and a page about
them. A file has its name once it is whole, synced, read back and compared; the index tells which are, so that the same
command goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from cache_spec.durable import (
    TEMPORARY_PREFIX,
    make_folder,
    remove_leftovers,
    replace_file,
    sync_folder,
    taken_lock,
    writing,
)
from cache_spec.errors import KdpipeError, WouldLoseDataError
from cache_spec.reader import CacheReader
from cache_spec.targets import Array
from pipeline.interop.arrays_out import MEANING, bytes_of_block, shard_arrays, table_arrays
from pipeline.interop.card import export_card
from pipeline.interop.config import ExportConfig
from pipeline.interop.index import INDEX_NAME, ExportedFile, Index, read_index, write_index

logger = logging.getLogger("kdpipe")

_PAGE_NAME = "README.md"
_LOCK_NAME = ".lock"
_BATCH_BYTES = 1 << 26
_SHARDS_AHEAD = 2
_FILE_MODE = 0o644
_NOT_SETTINGS = {"cache", "out", "copy_folder", "copy_gb"}


class Part(NamedTuple):
    """One file of an export."""

    name: str
    first_block: int
    num_blocks: int
    """0: what the cache keeps once."""


class Form(Protocol):
    """How parts become files."""

    def parts(self) -> list[Part]:
        """The files that an export has."""
        ...

    def write(self, part: Part, path: Path, seen: Callable[[int], object]) -> None:
        """Write a part's file, read it back and compare it; ``seen`` is told of tokens."""
        ...


def export(config: ExportConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Write, or finish, the export that ``config`` describes; returns its summary.

    Raises BadInputError for a cache that has no such form (``masked-cache``, ``no-top-k``, ``undeclared-temperature``,
    ``imported-cache``, ``unused-setting``) or a ``broken-export``, KdpipeError ``not-as-written`` for a file that reads
    back differently, and WouldLoseDataError ``not-an-export``, ``other-export`` or ``export-in-use`` for a folder that
    holds something else.
    """
    reader = CacheReader.open(config.cache, config)
    form = form_of(config, reader)
    manifest, parts = reader.manifest, form.parts()
    settings = config.model_dump(mode="json", exclude=_NOT_SETTINGS)
    with _exclusive(config.out, Index(fingerprint=manifest.fingerprint, settings=settings)) as index:
        index_path, files = config.out / INDEX_NAME, dict(index.files)
        todo = [part for part in parts if not _is_whole(config.out / part.name, files.get(part.name))]
        if not todo:
            logger.info("%s is exported already: nothing to do", config.out)
        elif index.finished:
            index = index.model_copy(update={"finished": False})
            write_index(index_path, index)
        total = manifest.blocks.num_blocks * manifest.blocks.block_tokens
        left = sum(part.num_blocks for part in todo) * manifest.blocks.block_tokens
        with tqdm(
            total=total, initial=total - left, unit="tok", unit_scale=True, desc="export", disable=quiet or None
        ) as bar:
            for part in todo:
                files[part.name] = _publish(config.out, form, part, bar.update)
                index = index.model_copy(update={"files": dict(sorted(files.items())), "finished": False})
                write_index(index_path, index)
        for name in sorted(manifest.files):
            if Path(name).name != "zarr.json":
                make_folder((config.out / name).parent)
                replace_file(config.out / name, (reader.path / name).read_bytes())
        replace_file(config.out / "manifest.json", manifest.to_json())
        num_bytes = sum(file.num_bytes for file in files.values())
        index = _with_page(config.out, index, export_card(config, reader, num_bytes).encode())
        write_index(index_path, index.model_copy(update={"finished": True}))
    num_tokens = manifest.corpus.num_tokens
    return {
        "out": str(config.out),
        "to": config.to,
        "cache": reader.place,
        "fingerprint": manifest.fingerprint,
        "rows": manifest.blocks.num_blocks,
        "tokens": num_tokens,
        "files": len(files),
        "files_written_now": len(todo),
        "bytes": num_bytes,
        "bytes_per_token": round(num_bytes / num_tokens, 2),
    }


def describe_export(facts: dict[str, Any]) -> list[str]:
    """Lines for people."""
    return [
        f"{facts['out']}: {facts['tokens']:,} tokens in {facts['rows']:,} rows, {facts['files']:,} files,"
        f" {facts['bytes']:,} bytes, {facts['bytes_per_token']:.2f} bytes/token"
    ]


def form_of(config: ExportConfig, reader: CacheReader) -> Form:
    """What writes the files that ``config`` asks for; refuses what the cache does not tell."""
    return AsParquet(config, reader) if config.to == "parquet" else AsSafetensors(config, reader)


class AsParquet:
    """Files of rows: a block each, in groups that fit in memory."""

    def __init__(self, config: ExportConfig, reader: CacheReader) -> None:
        from pipeline.interop.tables_out import Columns

        self._reader, self._shards = reader, config.shards_per_file
        self._columns = Columns.of(config, reader)

    def parts(self) -> list[Part]:
        blocks = self._reader.manifest.blocks
        step = self._shards * blocks.shard_blocks
        starts = range(0, blocks.num_blocks, step)
        return [
            Part(f"data/train-{at:05}-of-{len(starts):05}.parquet", start, min(step, blocks.num_blocks - start))
            for at, start in enumerate(starts)
        ]

    def write(self, part: Part, path: Path, seen: Callable[[int], object]) -> None:
        from pyarrow import parquet

        from pipeline.interop.tables_out import table_digest

        schema, digests = self._columns.schema, []
        # What is read of a block, and what it becomes.
        block_bytes = bytes_of_block(self._reader)
        block_bytes += (16 * self._columns.k + 16) * self._reader.manifest.blocks.block_tokens
        floats = [field.name for field in schema if "float" in str(field.type)]
        leaves = [leaf for leaf in _leaves(schema) if leaf.partition(".")[0] in floats]
        others = [leaf for leaf in _leaves(schema) if leaf not in leaves]
        with parquet.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=others, use_byte_stream_split=leaves
        ) as writer:
            for blocks in _batches(self._reader, part, block_bytes):
                table = self._columns.table(self._reader, blocks)
                digests.append(table_digest(table))
                writer.write_table(table, row_group_size=len(blocks))
                seen(len(blocks) * self._reader.manifest.blocks.block_tokens)
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            found = [table_digest(file.read_row_group(at)) for at in range(file.num_row_groups)]
        if found != digests:
            raise KdpipeError("not-as-written", path, expected="what was written", found="other values")


class AsSafetensors:
    """A file of plain arrays for each shard, and one of what the cache keeps once."""

    def __init__(self, config: ExportConfig, reader: CacheReader) -> None:
        self._reader, self._dtype = reader, config.dtype

    def parts(self) -> list[Part]:
        blocks = self._reader.manifest.blocks
        parts = [
            Part(f"shards/{shard:08}.safetensors", *blocks.shard_range(shard)) for shard in range(blocks.num_shards)
        ]
        return [*parts, Part("tables.safetensors", 0, 0)] if table_arrays(self._reader) else parts

    def write(self, part: Part, path: Path, seen: Callable[[int], object]) -> None:
        from safetensors import safe_open
        from safetensors.numpy import save_file

        arrays = self._arrays(part, seen)
        about = {name: MEANING[name] for name in arrays}
        manifest = self._reader.manifest
        about |= {
            "format": "np",
            "fingerprint": manifest.fingerprint,
            "first_block": str(part.first_block),
            "temperatures": json.dumps(list(manifest.temperatures)),
        }
        save_file(arrays, path, metadata=about)
        path.chmod(_FILE_MODE)  # the library makes files that nobody else may read
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            same = names == set(arrays) and all(_equal(file.get_tensor(name), arrays[name]) for name in names)
        if not same:
            raise KdpipeError("not-as-written", path, expected="what was written", found="other values")

    def _arrays(self, part: Part, seen: Callable[[int], object]) -> dict[str, Array]:
        if not part.num_blocks:
            return table_arrays(self._reader)
        pieces = []
        for blocks in _batches(self._reader, part, bytes_of_block(self._reader)):
            pieces.append(shard_arrays(self._reader, blocks, self._dtype))
            seen(len(blocks) * self._reader.manifest.blocks.block_tokens)
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _equal(there: Array, here: Array) -> bool:
    return there.dtype == here.dtype and there.shape == here.shape and there.tobytes() == here.tobytes()


def _leaves(schema: Any) -> list[str]:
    """Paths of a schema's columns as Parquet names them."""
    return [field.name + ".list.element" * str(field.type).count("list<") for field in schema]


def _batches(reader: CacheReader, part: Part, block_bytes: int) -> Iterator[Array]:
    """Blocks of a part in order, some at a time; the shards after them are fetched ahead."""
    step = max(1, _BATCH_BYTES // block_bytes)
    blocks = reader.manifest.blocks
    with reader.read_ahead(reader.batch_arrays()) as ahead:
        for start in range(part.first_block, part.first_block + part.num_blocks, step):
            stop = min(start + step, part.first_block + part.num_blocks)
            first, after = start // blocks.shard_blocks, -(-stop // blocks.shard_blocks)
            ahead.want(range(first, after), range(after, min(after + _SHARDS_AHEAD, blocks.num_shards)))
            yield np.arange(start, stop)


def _publish(out: Path, form: Form, part: Part, seen: Callable[[int], object]) -> ExportedFile:
    """Write one file under a temporary name, and give it its own once it is whole; returns its entry in the index."""
    path = out / part.name
    make_folder(path.parent)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with writing(path):
        try:
            form.write(part, temporary, seen)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
                entry = ExportedFile(
                    num_bytes=os.fstat(file.fileno()).st_size,
                    sha256=hashlib.file_digest(file, "sha256").hexdigest(),
                    first_block=part.first_block,
                    num_blocks=part.num_blocks,
                )
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return entry


def _is_whole(path: Path, entry: ExportedFile | None) -> bool:
    """Whether a file that the index lists is there as it was written."""
    if entry is None or not path.is_file():
        return False
    if path.stat().st_size == entry.num_bytes and _sha256(path) == entry.sha256:
        return True
    logger.warning("%s is not as it was written: it is written again", path)
    return False


def _with_page(out: Path, index: Index, page: bytes) -> Index:
    """Write the export's page, unless somebody changed the one that is there; gives an index that knows it."""
    path, digest = out / _PAGE_NAME, hashlib.sha256(page).hexdigest()
    there = _sha256(path) if path.is_file() else None
    if there not in (None, digest, index.page_sha256):
        logger.info("%s was changed since it was written: it is left as it is", path)
        return index
    index = index.model_copy(update={"page_sha256": digest})
    if there != digest:
        write_index(out / INDEX_NAME, index)  # first: an interruption leaves no page that counts as somebody's
        replace_file(path, page)
    return index


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _exclusive(out: Path, new: Index) -> Iterator[Index]:
    """Hold the folder for this process; gives the index that is there, or ``new``."""
    if out.exists() and not out.is_dir():
        raise WouldLoseDataError("not-an-export", out, expected="a folder", found="a file")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = names - {_LOCK_NAME}
    if foreign and INDEX_NAME not in names:
        hint = "give another --out"
        raise WouldLoseDataError("not-an-export", out, expected="a new or empty folder", found=min(foreign), hint=hint)
    make_folder(out)
    lock = taken_lock(out, _LOCK_NAME, "export-in-use")
    try:
        index = _existing(out, new)
        if index is None:
            write_index(out / INDEX_NAME, new)
        remove_leftovers([out, out / "data", out / "shards"])
        yield index or new
    finally:
        lock.release()


def _existing(out: Path, new: Index) -> Index | None:
    """The index that is there, of the same cache and settings as ``new``."""
    path = out / INDEX_NAME
    if not path.exists():
        return None
    index = read_index(path)
    ours = {"fingerprint": new.fingerprint, **new.settings}
    theirs = {"fingerprint": index.fingerprint, **index.settings}
    if ours != theirs:
        found = ", ".join(f"{key} {theirs.get(key)}" for key in ours if ours[key] != theirs.get(key))
        hint = "give another --out, or the old settings"
        raise WouldLoseDataError("other-export", out, expected="an export of this cache", found=found, hint=hint)
    return index
