"""Read a finished cache: any blocks, any order, each chunk checked and decompressed straight into the batch.

In: a cache folder. Out: decoded targets in numpy. What is missing, foreign or damaged is refused, never filled in.

Legend of axes: B blocks, T tokens, W windows, D teacher width, C prototypes, V vocabulary.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cache_spec.buffers import take
from cache_spec.encodings.hidden import checked_scales
from cache_spec.encodings.prototype import decode_prototypes
from cache_spec.encodings.topk import checked_ids
from cache_spec.errors import BadInputError, CacheError
from cache_spec.layout import ArraySpec, array_specs, target_arrays
from cache_spec.manifest import Manifest
from cache_spec.masking import REPLACEMENTS, SELECTED, MaskedText, at_positions, checked_masking, masked_text
from cache_spec.receipts import Receipt, read_manifest, read_receipt, read_seal, small_file_errors, unfinished
from cache_spec.shardfile import decode_chunk, decode_index, index_bytes, max_shard_bytes
from cache_spec.tables import read_table
from cache_spec.targets import Array, Targets

# Times a dozen arrays, this stays below the 256 open files that some systems allow.
_OPEN_SHARDS = 16
_KEPT_RECEIPTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetBatch:
    """Decoded targets of B blocks at one temperature."""

    input_ids_BT: Array
    lengths_B: Array
    targets: Targets
    """What follows each token, or was masked there, in the form that the cache's encoding has."""
    hidden_BWD: Array | None
    """float16 (float32 of int8 ones), pooled, or None where the cache keeps none or they were not asked for."""
    masked: MaskedText | None = None
    """How the blocks were masked, or None where the teacher predicts the next token."""


class ShardFile:
    """One open shard file with its index; ``pread`` makes it safe to share between threads."""

    def __init__(self, cache: Path, spec: ArraySpec, receipt: Receipt) -> None:
        self.spec = spec
        self.path = cache / spec.shard_path(receipt.shard)
        self._place = str(self.path)
        try:
            self._handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CacheError("missing-shard", self.path, found=error.strerror) from None
        found, expected = os.fstat(self._handle).st_size, receipt.files[spec.name].num_bytes
        if found != expected or not index_bytes(spec) <= found <= max_shard_bytes(spec):
            raise CacheError("truncated-shard", self.path, expected=f"{expected} bytes", found=found)
        tail = os.pread(self._handle, index_bytes(spec), found - index_bytes(spec))
        self._ranges = decode_index(spec, tail, found, receipt.num_blocks, self.path)
        self._only_chunk: Array | None = None

    def __del__(self) -> None:
        # Freed by reference count, never by force: another thread may still be reading.
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read_chunk(self, chunk: int, out: Array) -> None:
        """Decode inner chunk ``chunk`` into ``out``, shape [chunk_blocks, *row_shape]."""
        offset, size = self._ranges[chunk].tolist()
        decode_chunk(self.spec, os.pread(self._handle, size, offset), out, f"{self._place} chunk {chunk}")

    def read_block(self, inside: int, out: Array) -> None:
        """Decode the part of block ``inside``, counted within the shard, into ``out``, shape [1, *row_shape]."""
        if self.spec.chunk_blocks == 1:
            self.read_chunk(inside, out)
            return
        if self._only_chunk is None:
            rows = np.empty((self.spec.chunk_blocks, *self.spec.row_shape), self.spec.dtype)
            self.read_chunk(0, rows)
            self._only_chunk = rows
        out[0] = self._only_chunk[inside]

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
        self._receipts: OrderedDict[int, Receipt] = OrderedDict()
        self._lock = threading.Lock()
        self._target_names = target_arrays(manifest)
        self._tables: dict[str, Array] = {}

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
        wanted = np.asarray(blocks, dtype=np.int64).tolist()
        if wanted and not 0 <= min(wanted) <= max(wanted) < spec.num_blocks:
            raise BadInputError("no-such-block", self.path, expected=f"0 to {spec.num_blocks - 1}", found=max(wanted))
        out = take((len(wanted), *spec.row_shape), spec.dtype)
        file: ShardFile | None = None
        last = -1
        for row, block in enumerate(wanted):
            shard, inside = divmod(block, spec.shard_blocks)
            if file is None or shard != last:
                file, last = self._file(shard, spec), shard
            file.read_block(inside, out[row : row + 1])
        return out

    def lengths(self, blocks: Sequence[int] | Array) -> Array:
        """Real tokens of each block, uint32 [B]."""
        lengths = self.read("block_lengths", blocks)
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= self.manifest.blocks.block_tokens:
            raise CacheError("bad-length", f"{self.path} block_lengths", found=lengths.max())
        return lengths

    def batch(self, blocks: Sequence[int] | Array, temperature: float, *, with_hidden: bool = True) -> TargetBatch:
        """Decoded targets of ``blocks`` at a declared temperature; BadInputError for any other."""
        manifest, geometry = self.manifest, self.manifest.geometry
        at = manifest.temperature_index(temperature)
        stored = {name: self.read(name, blocks) for name in self._target_names}
        input_ids_BT = checked_ids(self.read("input_ids", blocks), geometry, f"{self.path} input_ids")
        lengths_B = self.lengths(blocks)
        masked = self._masked(blocks, input_ids_BT, lengths_B)
        targets = manifest.encoding.decode(stored, geometry, at, self.path, self.prepared)
        if masked is not None and manifest.masking is not None and manifest.masking.positions == "masked":
            targets = at_positions(targets, masked.kept_BT)
        return TargetBatch(
            input_ids_BT=input_ids_BT,
            lengths_B=lengths_B,
            targets=targets,
            hidden_BWD=self._hidden(blocks) if manifest.hidden and with_hidden else None,
            masked=masked,
        )

    def masked(self, blocks: Sequence[int] | Array) -> MaskedText | None:
        """How ``blocks`` were masked; None where the teacher predicts the next token."""
        if self.manifest.masking is None:
            return None
        return self._masked(blocks, self.read("input_ids", blocks), self.lengths(blocks))

    def _masked(self, blocks: Sequence[int] | Array, input_ids_BT: Array, lengths_B: Array) -> MaskedText | None:
        info = self.manifest.masking
        if info is None:
            return None
        selected_BT, replacements_BT = self.read(SELECTED, blocks), self.read(REPLACEMENTS, blocks)
        checked_masking(selected_BT, replacements_BT, self.manifest.teacher.vocab_size, self.path)
        return masked_text(info, input_ids_BT, lengths_B, selected_BT, replacements_BT)

    @cached_property
    def prepared(self) -> Array | None:
        """What the encoding's ``decode`` needs of the tables."""
        return self.manifest.encoding.prepare(self.table)

    def table(self, name: str) -> Array:
        """The stored values of a table of the cache's encoding, compared with the manifest's digest once."""
        if name not in self._tables:
            self._tables[name] = read_table(self.path, self.manifest, name)
        return self._tables[name]

    def prototypes(self, temperature: float) -> Array:
        """The shared tail distributions at a declared temperature, float32 [C, V]."""
        return decode_prototypes(self.table("prototypes")[self.manifest.temperature_index(temperature)])

    def output_head(self) -> tuple[Array, Array | None]:
        """The teacher's output head, float32 weight [V, D] and bias [V] or None."""
        bias_V = self.table("output_bias") if "output_bias" in self.manifest.tables else None
        return self.table("output_head").astype(np.float32), bias_V

    def _hidden(self, blocks: Sequence[int] | Array) -> Array:
        assert self.manifest.hidden is not None
        hidden_BWD = self.read("hidden", blocks)
        if self.manifest.hidden.dtype == "float16":
            return hidden_BWD
        scale_BD = checked_scales(self.read("hidden_scale", blocks), f"{self.path} hidden_scale")
        scaled: Array = hidden_BWD * scale_BD[:, None]
        return scaled

    def _file(self, shard: int, spec: ArraySpec) -> ShardFile:
        with self._lock:
            file = self._files.get((shard, spec.name))
            if file is None:
                file = self._files[shard, spec.name] = ShardFile(self.path, spec, self._receipt(shard))
                if len(self._files) > _OPEN_SHARDS * len(self.specs):
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end((shard, spec.name))
            return file

    def _receipt(self, shard: int) -> Receipt:
        receipt = self._receipts.get(shard)
        if receipt is None:
            receipt = read_receipt(self.path, self.manifest, shard)
            if receipt is None:
                raise unfinished(self.path, self.manifest)
            self._receipts[shard] = receipt
            if len(self._receipts) > _KEPT_RECEIPTS:
                self._receipts.popitem(last=False)
        return receipt
