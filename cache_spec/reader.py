"""Read a finished cache: any blocks, any order, each chunk checked and decompressed straight into the batch.

In: a cache folder. Out: decoded targets in numpy. What is missing, foreign or damaged is refused, never filled in.

Legend of axes: B blocks, T tokens, K kept, W windows, D teacher width.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_spec.errors import BadInputError, CacheError
from cache_spec.layout import ArraySpec, array_specs
from cache_spec.manifest import Manifest
from cache_spec.receipts import Receipt, read_manifest, read_receipt, read_seal, small_file_errors, unfinished
from cache_spec.shardfile import Array, decode_chunk, decode_index, index_bytes
from cache_spec.topk import decode_gaps

# Times nine arrays, this stays below the 256 open files that some systems allow.
_OPEN_SHARDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetBatch:
    """Decoded targets of B blocks at one temperature."""

    input_ids_BT: Array
    lengths_B: Array
    head_ids_BTK: Array
    head_logprobs_BTK: Array
    """float32, temperature 1, descending."""
    log_normaliser_BT: Array
    """float32, at the asked temperature."""
    log_tail_mass_BT: Array
    """float32, at the asked temperature; -inf for an empty tail."""
    hidden_BWD: Array | None
    """float16, or None where the cache keeps no hidden states or they were not asked for."""


class ShardFile:
    """One open shard file with its index; ``pread`` makes it safe to share between threads."""

    def __init__(self, cache: Path, spec: ArraySpec, receipt: Receipt) -> None:
        self.spec = spec
        self.path = cache / spec.shard_path(receipt.shard)
        try:
            self._handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise CacheError("missing-shard", self.path, found=error.strerror) from None
        found, expected = os.fstat(self._handle).st_size, receipt.files[spec.name].num_bytes
        if found != expected or found < index_bytes(spec):
            raise CacheError("truncated-shard", self.path, expected=f"{expected} bytes", found=found)
        tail = os.pread(self._handle, index_bytes(spec), found - index_bytes(spec))
        self._ranges = decode_index(spec, tail, found, receipt.num_blocks, self.path)

    def __del__(self) -> None:
        # Freed by reference count, never by force: another thread may still be reading.
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read_chunk(self, chunk: int, out: Array) -> None:
        """Decode inner chunk ``chunk`` into ``out``, shape [chunk_blocks, *row_shape]."""
        offset, size = self._ranges[chunk].tolist()
        decode_chunk(self.spec, os.pread(self._handle, size, offset), out, f"{self.path} chunk {chunk}")

    def read_rows(self, num_rows: int) -> Array:
        """The first ``num_rows`` rows of the shard, shape [num_rows, *row_shape]."""
        size = self.spec.chunk_blocks
        num_chunks = -(-num_rows // size)
        rows = np.empty((num_chunks * size, *self.spec.row_shape), self.spec.dtype)
        for chunk in range(num_chunks):
            self.read_chunk(chunk, rows[chunk * size : (chunk + 1) * size])
        return rows[:num_rows]


class CacheReader:
    """Random access to the blocks of a finished cache; safe to share between threads."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.specs = array_specs(manifest)
        self._files: OrderedDict[tuple[int, str], ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> CacheReader:
        """Open a finished cache; CacheError for a folder that is none, an unfinished or a damaged one."""
        path = Path(path)
        manifest = read_manifest(path)
        if read_seal(path, manifest) is None:
            raise unfinished(path, manifest)
        for error in small_file_errors(path, manifest):
            raise error
        return cls(path, manifest)

    def read(self, name: str, blocks: Sequence[int] | Array) -> Array:
        """Rows of one array for ``blocks``, in that order and as stored: shape [len(blocks), *row_shape]."""
        spec = self.specs[name]
        wanted = np.asarray(blocks, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < spec.num_blocks:
            raise BadInputError("no-such-block", self.path, expected=f"0 to {spec.num_blocks - 1}", found=wanted.max())
        out = np.empty((len(wanted), *spec.row_shape), spec.dtype)
        chunk_rows = np.empty((spec.chunk_blocks, *spec.row_shape), spec.dtype)
        last: tuple[int, int] | None = None
        for row, block in enumerate(wanted.tolist()):
            shard, inside = divmod(block, spec.shard_blocks)
            chunk, offset = divmod(inside, spec.chunk_blocks)
            if spec.chunk_blocks == 1:
                self._file(shard, spec).read_chunk(chunk, out[row : row + 1])
                continue
            if last != (shard, chunk):
                self._file(shard, spec).read_chunk(chunk, chunk_rows)
                last = shard, chunk
            out[row] = chunk_rows[offset]
        return out

    def lengths(self, blocks: Sequence[int] | Array) -> Array:
        """Real tokens of each block, uint32 [B]."""
        lengths = self.read("block_lengths", blocks)
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= self.manifest.blocks.block_tokens:
            raise CacheError("bad-length", f"{self.path} block_lengths", found=lengths.max())
        return lengths

    def batch(self, blocks: Sequence[int] | Array, temperature: float, *, with_hidden: bool = True) -> TargetBatch:
        """Decoded targets of ``blocks`` at a declared temperature; BadInputError for any other."""
        at = self.manifest.temperature_index(temperature)
        log_normaliser, log_tail_mass = (
            self.read(name, blocks)[:, at].astype(np.float32) for name in ("log_normaliser", "log_tail_mass")
        )
        # NaN compares false, so this refuses it too; -inf is an empty tail.
        if not (np.isfinite(log_normaliser).all() and (log_tail_mass < np.inf).all()):
            raise CacheError("non-finite", f"{self.path} log_normaliser or log_tail_mass")
        return TargetBatch(
            input_ids_BT=self._ids("input_ids", blocks),
            lengths_B=self.lengths(blocks),
            head_ids_BTK=self._ids("head_ids", blocks),
            head_logprobs_BTK=decode_gaps(
                self.read("head_gaps", blocks), self.manifest.encoding.step_nats, f"{self.path} head_gaps"
            ),
            log_normaliser_BT=log_normaliser,
            log_tail_mass_BT=log_tail_mass,
            hidden_BWD=self.read("hidden", blocks) if self.manifest.hidden and with_hidden else None,
        )

    def _ids(self, name: str, blocks: Sequence[int] | Array) -> Array:
        ids = self.read(name, blocks)
        if ids.size and ids.max() >= self.manifest.teacher.vocab_size:
            raise CacheError(
                "id-out-of-range",
                f"{self.path} {name}",
                expected=f"ids below {self.manifest.teacher.vocab_size}",
                found=ids.max(),
            )
        return ids

    def _file(self, shard: int, spec: ArraySpec) -> ShardFile:
        with self._lock:
            file = self._files.get((shard, spec.name))
            if file is None:
                receipt = read_receipt(self.path, self.manifest, shard)
                if receipt is None:
                    raise unfinished(self.path, self.manifest)
                file = self._files[shard, spec.name] = ShardFile(self.path, spec, receipt)
                if len(self._files) > _OPEN_SHARDS * len(self.specs):
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end((shard, spec.name))
            return file
