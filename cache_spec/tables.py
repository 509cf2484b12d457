"""Tables: arrays that an encoding stores once for a whole cache, such as shared distributions or an output head.

In: values in numpy. Out: plain Zarr v3 arrays beside the sharded ones, and their values again, compared with the
digests in the manifest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from zarr.storage import MemoryStore

from cache_spec.durable import make_folder, replace_file
from cache_spec.errors import CacheError
from cache_spec.layout import ArraySpec, create_table, store_contents, table_chunks
from cache_spec.manifest import Manifest
from cache_spec.shardfile import MAX_OVERHEAD_BYTES, decode_chunk
from cache_spec.targets import Array, Geometry, TablePart

METADATA_NAME = "zarr.json"


def table_digest(values: Array) -> str:
    """SHA-256 of a table's values, little-endian and in C order."""
    return hashlib.sha256(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data).hexdigest()


def write_tables(cache: Path, manifest: Manifest, tables: Mapping[str, Array]) -> None:
    """Write every table of the manifest's encoding, each file durably."""
    parts = _parts(manifest)
    assert set(tables) == set(parts), (sorted(tables), sorted(parts))
    for name, part in parts.items():
        assert tables[name].shape == part.shape, (name, tables[name].shape, part.shape)
        assert tables[name].dtype == part.dtype, (name, tables[name].dtype)
        for path, data in _files(part, tables[name]).items():
            make_folder((cache / path).parent)
            replace_file(cache / path, data)


def read_table(cache: Path, manifest: Manifest, name: str) -> Array:
    """The values of one table; CacheError ``missing-table``, ``table-mismatch``, ``non-finite``, ``bad-chunk``."""
    part = _parts(manifest)[name]
    paths = [cache / path for path in table_files(part)]
    for path in paths:
        if path.parent.is_symlink() or path.is_symlink() or not path.is_file():
            raise CacheError("missing-table", path, expected="a plain file with a chunk of the table")
    chunks, dtype = table_chunks(part), np.dtype(part.dtype).newbyteorder("<")
    # To the codec a chunk is a shard of one chunk: same bytes, same checks before anything is decompressed.
    spec = ArraySpec(
        name=name,
        row_shape=chunks[1:],
        dtype=dtype,
        dims=part.dims,
        num_blocks=chunks[0],
        shard_blocks=chunks[0],
        chunk_blocks=chunks[0],
        shuffle="shuffle",
        compressor="zstd",
    )
    values, chunk = np.empty(part.shape, dtype), np.empty(chunks, dtype)
    for path, at in zip(paths, np.ndindex(*_grid(part)), strict=True):
        try:
            decode_chunk(spec, _read_chunk(path, spec.chunk_bytes), chunk, path)
        except CacheError as error:
            raise CacheError("table-mismatch", path, expected=error.expected, found=error.found) from None
        firsts = [index * size for index, size in zip(at, chunks, strict=True)]
        target = values[tuple(slice(first, first + size) for first, size in zip(firsts, chunks, strict=True))]
        target[...] = chunk[tuple(slice(size) for size in target.shape)]
    digest = table_digest(values)
    if digest != manifest.tables[name]:
        raise CacheError("table-mismatch", cache / name, expected=manifest.tables[name], found=digest)
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise CacheError("non-finite", cache / name, expected="finite values")
    return values


def _read_chunk(path: Path, chunk_bytes: int) -> bytes:
    """The bytes of a chunk's file, unless they are more than such a chunk can take."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise CacheError("missing-table", path, found=error.strerror) from None
    with open(handle, "rb") as file:
        limit, found = chunk_bytes + MAX_OVERHEAD_BYTES, os.fstat(handle).st_size
        if found > limit:
            raise CacheError("table-mismatch", path, expected=f"at most {limit} bytes", found=found)
        return file.read()


def table_files(part: TablePart) -> list[str]:
    """Paths of the files that hold a table's values, its metadata apart."""
    return [f"{part.name}/c." + ".".join(map(str, at)) for at in np.ndindex(*_grid(part))]


def _grid(part: TablePart) -> list[int]:
    """Number of a table's chunks along each axis."""
    return [-(-size // chunk) for size, chunk in zip(part.shape, table_chunks(part), strict=True)]


def table_names(manifest: Manifest) -> dict[str, list[str]]:
    """Paths of the files that hold the values of each table of a cache."""
    return {name: table_files(part) for name, part in _parts(manifest).items()}


def table_paths(manifest: Manifest) -> list[str]:
    """Paths of the files that hold the values of all tables of a cache."""
    return [path for paths in table_names(manifest).values() for path in paths]


def table_digests(tables: Mapping[str, Array]) -> dict[str, str]:
    """What a manifest says of tables."""
    return {name: table_digest(values) for name, values in tables.items()}


def draft_digests(tables: tuple[TablePart, ...]) -> dict[str, str]:
    """What stands in a manifest's place of tables that are not made yet."""
    return {table.name: "0" * 64 for table in tables}


def _parts(manifest: Manifest) -> dict[str, TablePart]:
    geometry: Geometry = manifest.geometry
    return {part.name: part for part in manifest.encoding.tables(geometry)}


def _files(part: TablePart, values: Array) -> dict[str, bytes]:
    store = MemoryStore()
    create_table(store, part)[...] = values
    return {path: data for path, data in store_contents(store).items() if not path.endswith(METADATA_NAME)}
