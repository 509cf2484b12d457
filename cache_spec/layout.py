"""The arrays of a cache: names, shapes, dtypes, codecs, and their Zarr v3 metadata.

In: a manifest. Out: one ``ArraySpec`` per array, and the ``zarr.json`` files that stock Zarr readers open.

Legend of axes: N blocks, T tokens in a block, K kept tokens, tau temperatures, W windows, D teacher width.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from cache_spec.errors import CacheError
from cache_spec.manifest import Manifest

ARRAY_NAMES = (
    "input_ids",
    "block_lengths",
    "head_ids",
    "head_gaps",
    "log_normaliser",
    "log_tail_mass",
    "hidden",
    "block_loss",
    "block_entropy",
)
"""Every array that a cache of this version may hold."""
BLOSC_LEVEL = 3
MAX_CHUNK_BYTES = 1 << 30


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
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"]
    """Blosc filter: ``noshuffle``, ``shuffle`` or ``bitshuffle``."""
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
        return f"{self.name}/c." + ".".join([str(shard), *["0"] * len(self.row_shape)])


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Every array of the cache that ``manifest`` describes, by name; CacheError for a chunk beyond any memory."""
    blocks, encoding = manifest.blocks, manifest.encoding
    tokens, num_temperatures = blocks.block_tokens, len(manifest.temperatures)
    specs: dict[str, ArraySpec] = {}

    def add(
        name: str, dims: tuple[str, ...], row_shape: tuple[int, ...], dtype: Any, shuffle: Any, **attributes: Any
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
            attributes=attributes,
        )

    add(
        "input_ids",
        ("token",),
        (tokens,),
        manifest.id_dtype,
        "bitshuffle",
        description="token ids of the block",
    )
    add("block_lengths", (), (), np.uint32, "shuffle", description="real tokens in the block; the rest is padding")
    add(
        "head_ids",
        ("token", "rank"),
        (tokens, encoding.k),
        manifest.id_dtype,
        "noshuffle",
        description="ids of the K most probable next tokens, most probable first",
    )
    add(
        "head_gaps",
        ("rank", "token"),
        (encoding.k, tokens),
        np.uint16,
        "bitshuffle",
        description="log-probability at temperature 1 is -step * cumulative sum along rank",
        step=encoding.step_nats,
        error_bound=encoding.step_nats / 2,
        units="nat",
    )
    add(
        "log_normaliser",
        ("temperature", "token"),
        (num_temperatures, tokens),
        np.float32,
        "bitshuffle",
        description="logsumexp(logprob / temperature) over the vocabulary",
        temperatures=list(manifest.temperatures),
        units="nat",
    )
    add(
        "log_tail_mass",
        ("temperature", "token"),
        (num_temperatures, tokens),
        np.float16,
        "bitshuffle",
        description="log of the probability outside the head at each temperature; -inf for none",
        temperatures=list(manifest.temperatures),
        units="nat",
    )
    if manifest.hidden is not None:
        add(
            "hidden",
            ("window", "width"),
            (manifest.num_windows, manifest.teacher.hidden_size),
            np.float16,
            "shuffle",
            description="last hidden state after the final norm, mean over each window's real tokens",
            window=manifest.hidden.window,
        )
    add("block_loss", (), (), np.float32, "shuffle", description="teacher's mean next-token loss", units="nat")
    add("block_entropy", (), (), np.float32, "shuffle", description="teacher's mean entropy", units="nat")
    assert set(specs) <= set(ARRAY_NAMES)
    for spec in specs.values():
        if spec.chunk_bytes > MAX_CHUNK_BYTES:
            raise CacheError(
                "bad-chunk", spec.name, expected=f"chunks of at most {MAX_CHUNK_BYTES} bytes", found=spec.chunk_bytes
            )
    return specs


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
            compressors=(BloscCodec(cname="zstd", clevel=BLOSC_LEVEL, shuffle=spec.shuffle), Crc32cCodec()),
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=spec.dims,
            attributes=spec.attributes,
        )

    async def contents() -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        async for key in store.list():
            buffer = await store.get(key, prototype=default_buffer_prototype())
            assert buffer is not None
            found[key] = buffer.to_bytes()
        return found

    return asyncio.run(contents())
