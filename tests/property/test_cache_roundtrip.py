"""Shard files read back as written, for any shape, dtype and order, here and in zarr-python; so do whole caches.

In: random array specifications, bytes and block orders. Out: equality.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from cache_spec.layout import BLOSC_LEVEL, ArraySpec
from cache_spec.reader import CacheReader, TargetBatch
from cache_spec.shardfile import decode_chunk, decode_index, encode_shard, index_bytes
from cache_spec.targets import Array
from tests.synthetic import ENCODINGS, make_manifest, make_rows, write_cache

NUM_BLOCKS = 7


@st.composite
def specs_and_rows(draw: st.DrawFn) -> tuple[ArraySpec, Array]:
    """A specification of at most three shards, the last perhaps partial, and rows for all of them."""
    row_shape = tuple(draw(st.lists(st.integers(1, 6), max_size=2)))
    shard_blocks = draw(st.integers(1, 4))
    spec = ArraySpec(
        name="array",
        row_shape=row_shape,
        dtype=np.dtype(draw(st.sampled_from(["<u1", "<i1", "<u2", "<i2", "<u4", "<f2", "<f4"]))),
        dims=("block", *(f"axis{at}" for at in range(len(row_shape)))),
        num_blocks=draw(st.integers(1, 3 * shard_blocks)),
        shard_blocks=shard_blocks,
        chunk_blocks=1 if row_shape else shard_blocks,
        shuffle=draw(st.sampled_from(["noshuffle", "shuffle", "bitshuffle"])),
        compressor=draw(st.sampled_from(["zstd", "lz4"])),
    )
    size = int(np.prod(spec.shape)) * spec.dtype.itemsize
    # Any bit pattern, NaN among them; blocks of zeros, which stock writers leave out.
    data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), spec.dtype).reshape(spec.shape).copy()
    data[draw(st.lists(st.integers(0, spec.num_blocks - 1), max_size=2))] = 0
    return spec, data


def shard_files(spec: ArraySpec, rows: Array) -> dict[str, bytes]:
    """Path to bytes of every shard of an array."""
    firsts = range(0, spec.num_blocks, spec.shard_blocks)
    return {
        spec.shard_path(shard): encode_shard(spec, rows[first : first + spec.shard_blocks])
        for shard, first in enumerate(firsts)
    }


def decode_shard(spec: ArraySpec, data: bytes, num_rows: int) -> Array:
    """Rows of one shard by the direct path."""
    ranges = decode_index(spec, data[-index_bytes(spec) :], len(data), num_rows, "shard").tolist()
    rows = np.empty((len(ranges) * spec.chunk_blocks, *spec.row_shape), spec.dtype)
    for chunk, (offset, size) in enumerate(ranges):
        part = rows[chunk * spec.chunk_blocks : (chunk + 1) * spec.chunk_blocks]
        decode_chunk(spec, data[offset : offset + size], part, "shard")
    assert not rows[num_rows:].view(np.uint8).any(), "the last chunk is padded with zeros"
    return rows[:num_rows]


def decode_array(spec: ArraySpec, files: dict[str, bytes]) -> Array:
    sizes = [min(spec.shard_blocks, spec.num_blocks - first) for first in range(0, spec.num_blocks, spec.shard_blocks)]
    parts = [decode_shard(spec, files[spec.shard_path(shard)], size) for shard, size in enumerate(sizes)]
    return np.concatenate(parts)


def create_zarr_array(folder: Path, spec: ArraySpec) -> zarr.Array[Any]:
    """The array as zarr-python makes it, set to write chunks of zeros too."""
    return zarr.create_array(
        folder,
        name=spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=(spec.chunk_blocks, *spec.row_shape),
        shards=(spec.shard_blocks, *spec.row_shape),
        filters=None,
        compressors=(BloscCodec(cname=spec.compressor, clevel=BLOSC_LEVEL, shuffle=spec.shuffle), Crc32cCodec()),
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=spec.dims,
        config={"write_empty_chunks": True},
    )


def assert_same_bits(found: Array, expected: Array) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@given(specs_and_rows())
@settings(max_examples=100, deadline=None)
def test_any_shard_reads_back_bit_for_bit(case: tuple[ArraySpec, Array]) -> None:
    spec, rows = case
    assert_same_bits(decode_array(spec, shard_files(spec, rows)), rows)


@given(specs_and_rows())
@settings(max_examples=25, deadline=None)
def test_zarr_python_reads_our_shards_bit_for_bit(case: tuple[ArraySpec, Array]) -> None:
    spec, rows = case
    with TemporaryDirectory() as folder:
        array = create_zarr_array(Path(folder), spec)
        for path, data in shard_files(spec, rows).items():
            Path(folder, path).write_bytes(data)
        assert_same_bits(np.asarray(array[:]), rows)


@given(specs_and_rows())
@settings(max_examples=25, deadline=None)
def test_the_direct_path_reads_the_shards_of_zarr_python(case: tuple[ArraySpec, Array]) -> None:
    spec, rows = case
    with TemporaryDirectory() as folder:
        array = create_zarr_array(Path(folder), spec)
        array[:] = rows
        files = {path: Path(folder, path).read_bytes() for path in shard_files(spec, rows)}
        if not spec.row_shape:
            # zarr-python fills the rest of a partial chunk with the fill value, as we do.
            assert {p.relative_to(folder).as_posix() for p in Path(folder).rglob("c.*")} == set(files)
        assert_same_bits(decode_array(spec, files), rows)


@pytest.fixture(scope="module", params=ENCODINGS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    hidden_dtype = "int8" if request.param == "topk" else "float16"
    encoding = ENCODINGS[request.param]
    manifest = make_manifest(num_blocks=NUM_BLOCKS, shard_blocks=3, encoding=encoding, hidden_dtype=hidden_dtype)
    path = tmp_path_factory.mktemp("cache")
    write_cache(path, manifest, make_rows(manifest))
    return CacheReader.open(path)


@given(st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=10), st.sampled_from([1.0, 2.0]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_block_reads_equal_whatever_is_read_with_it(
    reader: CacheReader, blocks: Sequence[int], temperature: float
) -> None:
    everything = fields(reader.batch(range(NUM_BLOCKS), temperature))
    batch = fields(reader.batch(blocks, temperature))
    assert set(batch) == set(everything)
    for name, values in batch.items():
        np.testing.assert_array_equal(values, everything[name][list(blocks)], err_msg=name)
    for name in reader.specs:
        np.testing.assert_array_equal(reader.read(name, blocks), reader.read(name, range(NUM_BLOCKS))[list(blocks)])


def fields(batch: TargetBatch) -> dict[str, Array]:
    """Every array of a batch and of its targets, copied: what is let go may be written to again."""
    found = {name: getattr(part, name) for part in (batch, batch.targets) for name in part.__slots__}
    return {name: np.array(values) for name, values in found.items() if isinstance(values, np.ndarray)}
