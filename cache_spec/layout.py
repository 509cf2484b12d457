"""The arrays of a cache: names, shapes, dtypes, codecs, and their Zarr v3 metadata.

In: a manifest. Out: one ``ArraySpec`` per array, and the ``zarr.json`` files that stock Zarr readers open.

Legend of axes: N blocks, T tokens in a block, K kept tokens, tau temperatures, W windows, D teacher width.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from cache_spec.errors import CacheError
from cache_spec.manifest import Manifest
from cache_spec.masking import REPLACEMENTS, SELECTED
from cache_spec.targets import Compressor, Shuffle, TablePart

BLOSC_LEVEL = 3
MAX_CHUNK_BYTES = 1 << 30
TABLE_CHUNK_BYTES = 1 << 24
MAX_TABLE_BYTES = 1 << 36
_CHUNK_KEYS: Any = {"name": "default", "separator": "."}


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array: its first axis is always the block."""

    name: str
    row_shape: tuple[int, ...]
    """Shape of one block's part."""
    dtype: np.dtype[Any]
    dims: tuple[str, ...]
    """Names of all axes, the first being ``block``."""
    num_blocks: int
    shard_blocks: int
    chunk_blocks: int
    """Blocks in an inner chunk: 1, or the whole shard for arrays of one number a block."""
    shuffle: Shuffle
    """Blosc filter."""
    compressor: Compressor
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_blocks, *self.row_shape)

    @cached_property
    def chunk_bytes(self) -> int:
        """Size of one decoded inner chunk."""
        return self.chunk_blocks * math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def chunks_in_shard(self) -> int:
        return self.shard_blocks // self.chunk_blocks

    def shard_path(self, shard: int) -> str:
        """Path of a shard's file inside the cache, with ``/`` between parts."""
        return f"{self.name}/{self.shard_name(shard)}"

    def shard_name(self, shard: int) -> str:
        """Name of a shard's file in the array's folder."""
        return f"c.{shard}{'.0' * len(self.row_shape)}"


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Every array of the cache that ``manifest`` describes, by name; CacheError for a chunk beyond any memory."""
    blocks, hidden = manifest.blocks, manifest.hidden
    specs: dict[str, ArraySpec] = {}

    def add(
        name: str,
        dims: tuple[str, ...],
        row_shape: tuple[int, ...],
        dtype: Any,
        shuffle: Shuffle,
        compressor: Compressor = "zstd",
        **attributes: Any,
    ) -> None:
        specs[name] = ArraySpec(
            name=name,
            row_shape=row_shape,
            dtype=np.dtype(dtype).newbyteorder("<"),
            dims=("block", *dims),
            num_blocks=blocks.num_blocks,
            shard_blocks=blocks.shard_blocks,
            chunk_blocks=1 if row_shape else blocks.shard_blocks,
            shuffle=shuffle,
            compressor=compressor,
            attributes=attributes,
        )

    add(
        "input_ids",
        ("token",),
        (blocks.block_tokens,),
        manifest.geometry.id_dtype,
        "bitshuffle",
        "lz4",
        description="token ids of the block",
    )
    add("block_lengths", (), (), np.uint32, "shuffle", description="real tokens in the block; the rest is padding")
    if manifest.masking is not None:
        shape, id_dtype = (blocks.block_tokens,), manifest.geometry.id_dtype
        add(
            SELECTED,
            ("token",),
            shape,
            np.uint8,
            "bitshuffle",
            "lz4",
            description="1 at tokens to be found out",
        )
        add(REPLACEMENTS, ("token",), shape, id_dtype, "shuffle", description="what the teacher read there; else 0")
    for part in manifest.encoding.arrays(manifest.geometry):
        add(part.name, part.dims, part.row_shape, part.dtype, part.shuffle, part.compressor, **part.attributes)
    if hidden is not None:
        width = manifest.teacher.width
        add(
            "hidden",
            ("window", "width"),
            (manifest.num_windows, width),
            np.float16 if hidden.dtype == "float16" else np.int8,
            "shuffle",
            description="last hidden state after the final norm, mean over each window's real tokens"
            + ("" if hidden.dtype == "float16" else "; times hidden_scale"),
            window=hidden.window,
        )
        if hidden.dtype == "int8":
            add("hidden_scale", ("width",), (width,), np.float32, "bitshuffle", description="of hidden in this block")
    if manifest.imported is None:
        of_loss = "next-token loss" if manifest.masking is None else "loss on selected tokens"
        add("block_loss", (), (), np.float32, "shuffle", description=f"teacher's mean {of_loss}", units="nat")
        add("block_entropy", (), (), np.float32, "shuffle", description="teacher's mean entropy", units="nat")
    for spec in specs.values():
        if spec.chunk_bytes > MAX_CHUNK_BYTES:
            raise CacheError(
                "bad-chunk", spec.name, expected=f"chunks of at most {MAX_CHUNK_BYTES} bytes", found=spec.chunk_bytes
            )
    return specs


def target_arrays(manifest: Manifest) -> list[str]:
    """Names of the arrays that hold the targets: what an encoding costs."""
    return [part.name for part in manifest.encoding.arrays(manifest.geometry)]


def zarr_metadata(manifest: Manifest) -> dict[str, bytes]:
    """Path to content of every ``zarr.json`` of the cache, as zarr-python writes it."""
    store = MemoryStore()
    zarr.create_group(store, attributes={"description": "kdpipe teacher cache; read manifest.json and SPEC.md"})
    for spec in array_specs(manifest).values():
        zarr.create_array(
            store,
            name=spec.name,
            shape=spec.shape,
            dtype=spec.dtype,
            chunks=(spec.chunk_blocks, *spec.row_shape),
            shards=(spec.shard_blocks, *spec.row_shape),
            filters=None,
            compressors=_compressors(spec.compressor, spec.shuffle),
            fill_value=0,
            chunk_key_encoding=_CHUNK_KEYS,
            dimension_names=spec.dims,
            attributes=spec.attributes,
        )
    for table in manifest.encoding.tables(manifest.geometry):
        create_table(store, table)
    return store_contents(store)


def table_chunks(table: TablePart) -> tuple[int, ...]:
    """Shape of a table's chunks, whole rows of its last two axes; CacheError for a table beyond any memory."""
    *outer, width = table.shape
    itemsize = np.dtype(table.dtype).itemsize
    rows = [min(outer[-1], max(1, TABLE_CHUNK_BYTES // (width * itemsize)))] if outer else []
    chunks = (*[1] * (len(outer) - 1), *rows, width)
    for shape, limit in ((chunks, MAX_CHUNK_BYTES), (table.shape, MAX_TABLE_BYTES)):
        if math.prod(shape) * itemsize > limit:
            expected = f"at most {limit} bytes in {'a chunk' if shape is chunks else 'a table'}"
            raise CacheError("bad-chunk", table.name, expected=expected, found=math.prod(shape) * itemsize)
    return chunks


def create_table(store: MemoryStore, table: TablePart) -> Any:
    """A table's empty Zarr array, unsharded; CacheError ``bad-chunk`` for one beyond any memory."""
    return zarr.create_array(
        store,
        name=table.name,
        shape=table.shape,
        dtype=np.dtype(table.dtype).newbyteorder("<"),
        chunks=table_chunks(table),
        filters=None,
        compressors=_compressors("zstd", "shuffle"),
        fill_value=0,
        chunk_key_encoding=_CHUNK_KEYS,
        dimension_names=table.dims,
        attributes=table.attributes,
        config={"write_empty_chunks": True},
    )


def _compressors(compressor: Compressor, shuffle: Shuffle) -> tuple[BloscCodec, Crc32cCodec]:
    return BloscCodec(cname=compressor, clevel=BLOSC_LEVEL, shuffle=shuffle), Crc32cCodec()


def store_contents(store: MemoryStore) -> dict[str, bytes]:
    """Path to content of everything in a memory store."""

    async def contents() -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        async for key in store.list():
            buffer = await store.get(key, prototype=default_buffer_prototype())
            assert buffer is not None
            found[key] = buffer.to_bytes()
        return found

    return asyncio.run(contents())
