"""One Zarr v3 shard file, encoded and decoded directly.

In: the rows of one array in one shard. Out: the bytes that zarr-python's ``sharding_indexed`` codec would accept:
inner chunks (little-endian, blosc, crc32c) one after the other, then the index (offset and size of each chunk as
uint64, then its crc32c). zarr-python reads these files; this module does the same many times faster.
"""

from __future__ import annotations

import struct

import google_crc32c
import numpy as np
from numcodecs import blosc

from cache_spec.errors import CacheError
from cache_spec.layout import BLOSC_LEVEL, MAX_CHUNK_BYTES, ArraySpec
from cache_spec.targets import Array

_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
_EMPTY = (1 << 64) - 1
MAX_OVERHEAD_BYTES = 64
"""At most what Blosc's header, a frame that does not compress, and the checksum add to a chunk."""
_CRC_BYTES = 4
_BLOSC_HEADER_BYTES = 16
_BLOSC_SIZES = struct.Struct("<III")
# What CRC-32C makes of any data followed by its own CRC-32C: checking needs no copy of the data without it.
_CRC_OF_CHECKED = 0x48674BC7


def index_bytes(spec: ArraySpec) -> int:
    """Size of the index at the end of a shard file."""
    return 16 * spec.chunks_in_shard + _CRC_BYTES


def end_bytes(spec: ArraySpec) -> int:
    """Size of what a receipt binds to its file besides its size: the last chunk's checksum, and the index."""
    return _CRC_BYTES + index_bytes(spec)


def end_crc32c(spec: ArraySpec, data: bytes) -> int:
    """CRC-32C of the last chunk's checksum and of the index without its own, from a file or from its end.

    Every chunk's size is in it, and what the last one holds: no other shard's file has the same.
    """
    # With its own checksum the index would leave no trace: that is what makes any data check.
    return int(google_crc32c.value(data[-end_bytes(spec) : -_CRC_BYTES]))


def max_shard_bytes(spec: ArraySpec) -> int:
    """More than a shard's file can take."""
    return spec.chunks_in_shard * (spec.chunk_bytes + MAX_OVERHEAD_BYTES) + index_bytes(spec)


def encode_shard(spec: ArraySpec, rows: Array) -> bytes:
    """Bytes of a shard file for ``rows``, shape [n, *row_shape], n ≤ shard_blocks; the last chunk is zero-padded."""
    assert rows.dtype == spec.dtype, (spec.name, rows.dtype)
    assert rows.shape[1:] == spec.row_shape, (spec.name, rows.shape)
    assert 0 < len(rows) <= spec.shard_blocks, (spec.name, rows.shape)
    parts: list[bytes] = []
    index = np.full((spec.chunks_in_shard, 2), _EMPTY, dtype="<u8")
    offset = 0
    for number, first in enumerate(range(0, len(rows), spec.chunk_blocks)):
        chunk = rows[first : first + spec.chunk_blocks]
        if len(chunk) < spec.chunk_blocks:
            padding = np.zeros((spec.chunk_blocks - len(chunk), *spec.row_shape), spec.dtype)
            chunk = np.concatenate([chunk, padding])
        packed = blosc.compress(
            np.ascontiguousarray(chunk).reshape(-1).view(np.uint8),
            spec.compressor.encode(),
            BLOSC_LEVEL,
            _SHUFFLES[spec.shuffle],
            typesize=spec.dtype.itemsize,
        )
        part = packed + _crc(packed)
        index[number] = offset, len(part)
        parts.append(part)
        offset += len(part)
    table = index.tobytes()
    return b"".join([*parts, table, _crc(table)])


def decode_index(spec: ArraySpec, data: bytes, file_bytes: int, num_rows: int, place: object) -> Array:
    """Offsets and sizes of the chunks that hold ``num_rows`` rows, shape [chunks, 2], from a shard's last bytes.

    Raises CacheError unless the checksum holds and every needed chunk lies inside the file.
    """
    if len(data) != index_bytes(spec):
        raise CacheError("truncated-shard", place, expected=f"an index of {index_bytes(spec)} bytes", found=len(data))
    table, checksum = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    if _crc(table) != checksum:
        raise CacheError("shard-index-checksum", place, expected=_crc(table).hex(), found=checksum.hex())
    index = np.frombuffer(table, "<u8").reshape(-1, 2)
    num_chunks = -(-num_rows // spec.chunk_blocks)
    used, unused = index[:num_chunks], index[num_chunks:]
    if (used == _EMPTY).any() or (unused != _EMPTY).any():
        raise CacheError("missing-chunk", place, expected=f"exactly the first {num_chunks} chunks present")
    end = file_bytes - index_bytes(spec)
    limit = spec.chunk_bytes + MAX_OVERHEAD_BYTES
    # Compared as Python integers: uint64 sums wrap around.
    if any(not _CRC_BYTES < size <= min(end - offset, limit) for offset, size in used.tolist()):
        expected = f"chunks of at most {limit} bytes inside the first {end} bytes"
        raise CacheError("bad-chunk-range", place, expected=expected)
    return used


def decode_chunk(spec: ArraySpec, data: bytes, out: Array, place: object) -> None:
    """Check one inner chunk and decompress it straight into ``out``, shape [chunk_blocks, *row_shape], C order."""
    if google_crc32c.value(data) != _CRC_OF_CHECKED:
        body, checksum = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        raise CacheError("chunk-checksum", place, expected=_crc(body).hex(), found=checksum.hex())
    body_bytes = len(data) - _CRC_BYTES
    if body_bytes < _BLOSC_HEADER_BYTES or spec.chunk_bytes > MAX_CHUNK_BYTES:
        raise CacheError("bad-chunk", place, found=f"{body_bytes} bytes")
    decoded_bytes, _, packed_bytes = _BLOSC_SIZES.unpack_from(data, 4)
    if decoded_bytes != spec.chunk_bytes or packed_bytes != body_bytes:
        raise CacheError(
            "bad-chunk",
            place,
            expected=f"{spec.chunk_bytes} bytes from {body_bytes}",
            found=f"{decoded_bytes} from {packed_bytes}",
        )
    try:
        # Blosc goes by the size in its header, so the checksum behind it need not be cut off.
        blosc.decompress(data, out)
    except RuntimeError as error:
        raise CacheError("bad-chunk", place, found=str(error)) from None


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")
