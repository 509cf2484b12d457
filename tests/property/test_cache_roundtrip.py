"""Shard files and gaps read back as written, for any shape, dtype and order, here and in zarr-python.

In: random array specifications, bytes and log-probabilities. Out: equality, or the declared error bound.

Legend of axes: T tokens, K kept.
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
from cache_spec.reader import CacheReader
from cache_spec.shardfile import Array, decode_chunk, decode_index, encode_shard, index_bytes
from cache_spec.topk import DEFAULT_STEP_NATS, MAX_STEPS, decode_gaps, encode_gaps
from tests.synthetic import make_manifest, make_rows, write_cache

NUM_BLOCKS = 7


@st.composite
def specs_and_rows(draw: st.DrawFn) -> tuple[ArraySpec, Array]:
    """A specification of at most three shards, the last perhaps partial, and rows for all of them."""
    row_shape = tuple(draw(st.lists(st.integers(1, 6), max_size=2)))
    shard_blocks = draw(st.integers(1, 4))
    spec = ArraySpec(
        name="array",
        row_shape=row_shape,
        dtype=np.dtype(draw(st.sampled_from(["<u2", "<u4", "<f2", "<f4"]))),
        dims=("block", *(f"axis{at}" for at in range(len(row_shape)))),
        num_blocks=draw(st.integers(1, 3 * shard_blocks)),
        shard_blocks=shard_blocks,
        chunk_blocks=1 if row_shape else shard_blocks,
        shuffle=draw(st.sampled_from(["noshuffle", "shuffle", "bitshuffle"])),
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
        compressors=(BloscCodec(cname="zstd", clevel=BLOSC_LEVEL, shuffle=spec.shuffle), Crc32cCodec()),
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


@st.composite
def heads(draw: st.DrawFn, lowest_nats: float) -> Array:
    """Descending float32 log-probabilities [1, T, K] down to ``lowest_nats``."""
    num_tokens, k = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    count = num_tokens * k
    values = draw(st.lists(st.floats(lowest_nats, 0, width=32), min_size=count, max_size=count))
    return -np.sort(-np.array(values, np.float32).reshape(1, num_tokens, k), axis=-1)


steps = st.sampled_from([DEFAULT_STEP_NATS, 1 / 1024, 0.01, 1.0])


@given(heads(-60.0), steps)
@settings(deadline=None)
def test_a_decoded_logprob_is_off_by_at_most_half_a_step(logprobs_BTK: Array, step: float) -> None:
    decoded_BTK = decode_gaps(encode_gaps(logprobs_BTK, step), step)
    assert decoded_BTK.dtype == np.float32
    rounding = np.spacing(np.float32(64))
    assert np.abs(decoded_BTK.astype(np.float64) - logprobs_BTK).max() <= step / 2 + rounding


@given(heads(-1000.0), steps)
@settings(deadline=None)
def test_heads_stay_descending_and_saturate_at_the_lowest_step(logprobs_BTK: Array, step: float) -> None:
    gaps_BKT = encode_gaps(logprobs_BTK, step)
    assert gaps_BKT.dtype == np.uint16
    assert gaps_BKT.shape == logprobs_BTK.swapaxes(1, 2).shape
    decoded_BTK = decode_gaps(gaps_BKT, step)
    assert (np.diff(decoded_BTK, axis=-1) <= 0).all()
    lowest = np.float32(-step) * MAX_STEPS
    assert (decoded_BTK >= lowest).all()
    np.testing.assert_array_equal(decoded_BTK[logprobs_BTK <= lowest - step], lowest)


@given(heads(-1000.0), steps)
@settings(deadline=None)
def test_decoded_logprobs_encode_to_the_same_gaps(logprobs_BTK: Array, step: float) -> None:
    gaps_BKT = encode_gaps(logprobs_BTK, step)
    np.testing.assert_array_equal(encode_gaps(decode_gaps(gaps_BKT, step), step), gaps_BKT)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    manifest = make_manifest(num_blocks=NUM_BLOCKS, shard_blocks=3)
    path = tmp_path_factory.mktemp("cache")
    write_cache(path, manifest, make_rows(manifest))
    return CacheReader.open(path)


@given(st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=10), st.sampled_from([1.0, 2.0]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_block_reads_equal_whatever_is_read_with_it(
    reader: CacheReader, blocks: Sequence[int], temperature: float
) -> None:
    everything = reader.batch(range(NUM_BLOCKS), temperature)
    batch = reader.batch(blocks, temperature)
    for name in batch.__slots__:
        np.testing.assert_array_equal(getattr(batch, name), getattr(everything, name)[list(blocks)], err_msg=name)
    for name in reader.specs:
        np.testing.assert_array_equal(reader.read(name, blocks), reader.read(name, range(NUM_BLOCKS))[list(blocks)])
