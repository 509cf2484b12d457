"""Read a finished cache: any blocks, any order, each chunk checked and decompressed straight into the batch.

In: a cache's folder, or its URL in a store. Out: decoded targets in numpy. What is missing, foreign or damaged is
refused, never filled in. Of a store, files are read that a local copy fetched.

Legend of axes: B blocks, T tokens, W windows, D teacher width, C prototypes, V vocabulary.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from cache_spec.address import CopySettings
from cache_spec.buffers import take
from cache_spec.encodings.hidden import checked_scales
from cache_spec.encodings.prototype import decode_prototypes
from cache_spec.encodings.topk import checked_ids
from cache_spec.errors import BadInputError, CacheError
from cache_spec.layout import ArraySpec, array_specs, target_arrays
from cache_spec.local_copy import LocalCopy
from cache_spec.manifest import Manifest
from cache_spec.masking import REPLACEMENTS, SELECTED, MaskedText, at_positions, checked_masking, masked_text
from cache_spec.read_ahead import ReadAhead
from cache_spec.receipts import Receipt, read_manifest, read_receipt, read_seal, small_file_errors, unfinished
from cache_spec.shardfile import decode_chunk, decode_index, end_bytes, end_crc32c, index_bytes, max_shard_bytes
from cache_spec.store import is_url
from cache_spec.tables import read_table, table_paths
from cache_spec.targets import Array, Targets

# Times a dozen arrays, this stays below the 256 open files that some systems allow.
_OPEN_SHARDS = 16
_KEPT_RECEIPTS = 256
_SHARDS_AHEAD = 2
_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


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

    def __init__(self, cache: Path | str, spec: ArraySpec, receipt: Receipt, opened: int | None = None) -> None:
        """``opened``: the file's descriptor, which is closed with this; without it ``cache`` is its folder."""
        self.spec = spec
        self._place = os.path.join(cache, spec.shard_path(receipt.shard))
        try:
            self._handle = os.open(self._place, _PLAIN) if opened is None else opened
        except OSError as error:
            raise CacheError("missing-shard", self._place, found=error.strerror) from None
        known = receipt.files[spec.name]
        found, expected = os.fstat(self._handle).st_size, known.num_bytes
        if found != expected or not index_bytes(spec) <= found <= max_shard_bytes(spec):
            raise CacheError("truncated-shard", self._place, expected=f"{expected} bytes", found=found)
        end = os.pread(self._handle, end_bytes(spec), max(0, found - end_bytes(spec)))
        self._ranges = decode_index(spec, end[-index_bytes(spec) :], found, receipt.num_blocks, self._place)
        if (other := end_crc32c(spec, end)) != known.end_crc32c:
            expected_end, found_end = f"an end of CRC-32C {known.end_crc32c:08x}, as its receipt says", f"{other:08x}"
            raise CacheError("other-shard", self._place, expected=expected_end, found=found_end)
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

    def __init__(self, path: Path, manifest: Manifest, copy: LocalCopy | None = None) -> None:
        self.path = path
        """Where manifest and small files lie."""
        self.place = str(path) if copy is None else copy.url
        """What the cache is called."""
        self.manifest = manifest
        self._copy = copy
        self.specs = array_specs(manifest)
        self._files: OrderedDict[tuple[int, str], ShardFile] = OrderedDict()
        self._receipts: OrderedDict[int, Receipt] = OrderedDict()
        self._lock = threading.Lock()
        self._target_names = target_arrays(manifest)
        self._tables: dict[str, Array] = {}

    @classmethod
    def open(cls, address: str | Path, copy: CopySettings | None = None) -> CacheReader:
        """Open a finished cache; CacheError for a folder that is none, an unfinished or a damaged one.

        ``copy`` says where files of a cache in a store are kept.
        """
        if is_url(address):
            local = LocalCopy.open(str(address), copy or CopySettings())
            return cls(local.path, local.manifest, local)
        path = Path(address)
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
            raise BadInputError("no-such-block", self.place, expected=f"0 to {spec.num_blocks - 1}", found=max(wanted))
        out = take((len(wanted), *spec.row_shape), spec.dtype)
        file: ShardFile | None = None
        last = -1
        for row, block in enumerate(wanted):
            shard, inside = divmod(block, spec.shard_blocks)
            if file is None or shard != last:
                file, last = self.file(shard, spec), shard
            try:
                file.read_block(inside, out[row : row + 1])
            except CacheError:
                if self._copy is None:
                    raise
                self._discard(self._copy, shard, spec)
                file = self.file(shard, spec)
                file.read_block(inside, out[row : row + 1])
        return out

    def lengths(self, blocks: Sequence[int] | Array) -> Array:
        """Real tokens of each block, uint32 [B]."""
        lengths = self.read("block_lengths", blocks)
        if lengths.size and not 1 <= lengths.min() <= lengths.max() <= self.manifest.blocks.block_tokens:
            raise CacheError("bad-length", f"{self.place} block_lengths", found=lengths.max())
        return lengths

    def batch(self, blocks: Sequence[int] | Array, temperature: float, *, with_hidden: bool = True) -> TargetBatch:
        """Decoded targets of ``blocks`` at a declared temperature; BadInputError for any other."""
        manifest, geometry = self.manifest, self.manifest.geometry
        at = manifest.temperature_index(temperature)
        stored = {name: self.read(name, blocks) for name in self._target_names}
        input_ids_BT = checked_ids(self.read("input_ids", blocks), geometry, f"{self.place} input_ids")
        lengths_B = self.lengths(blocks)
        masked = self._masked(blocks, input_ids_BT, lengths_B)
        targets = manifest.encoding.decode(stored, geometry, at, self.place, self.prepared)
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
        checked_masking(selected_BT, replacements_BT, self.manifest.teacher.vocab_size, self.place)
        return masked_text(info, input_ids_BT, lengths_B, selected_BT, replacements_BT)

    @cached_property
    def prepared(self) -> Array | None:
        """What the encoding's ``decode`` needs of the tables."""
        return self.manifest.encoding.prepare(self.table)

    def table(self, name: str) -> Array:
        """The stored values of a table of the cache's encoding, compared with the manifest's digest once."""
        if name not in self._tables:
            copy = self._copy
            self._tables[name] = read_table(self.path, self.manifest, name) if copy is None else copy.table(name)
        return self._tables[name]

    def table_bytes(self, name: str) -> int:
        """Of the files that hold a table's values."""
        names = [path for path in table_paths(self.manifest) if PurePosixPath(path).parent.name == name]
        if self._copy is not None:
            return self._copy.num_bytes(f"{name}/", names)
        return sum((self.path / path).stat().st_size for path in names if (self.path / path).is_file())

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
        scale_BD = checked_scales(self.read("hidden_scale", blocks), f"{self.place} hidden_scale")
        scaled: Array = hidden_BWD * scale_BD[:, None]
        return scaled

    def batch_arrays(self, *, with_hidden: bool = True) -> list[str]:
        """Names of the arrays that ``batch`` reads."""
        manifest = self.manifest
        names = ["input_ids", "block_lengths", *self._target_names]
        names += [SELECTED, REPLACEMENTS] if manifest.masking is not None else []
        names += [name for name in ("hidden", "hidden_scale") if with_hidden and name in self.specs]
        return names

    def read_ahead(self, names: Sequence[str]) -> ReadAhead:
        """What fetches shards of these arrays before they are read; of a folder there is nothing to fetch."""
        return ReadAhead(self._copy, names)

    def sequence(self, num_blocks: int, names: Sequence[str]) -> Iterator[Array]:
        """All blocks in order, int64 [num_blocks] at a time; shards of these arrays are fetched ahead."""
        blocks = self.manifest.blocks
        with self.read_ahead(names) as ahead:
            for start in range(0, blocks.num_blocks, num_blocks):
                stop = min(start + num_blocks, blocks.num_blocks)
                first, after = start // blocks.shard_blocks, -(-stop // blocks.shard_blocks)
                ahead.want(range(first, after), range(after, min(after + _SHARDS_AHEAD, blocks.num_shards)))
                yield np.arange(start, stop)

    def file(self, shard: int, spec: ArraySpec) -> ShardFile:
        """The open file of an array's shard."""
        key = shard, spec.name
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
                return file
        file = self._opened(shard, spec)
        with self._lock:
            self._files[key] = file
            if len(self._files) > _OPEN_SHARDS * len(self.specs):
                self._files.popitem(last=False)
        return file

    def _opened(self, shard: int, spec: ArraySpec) -> ShardFile:
        receipt = self.receipt(shard)
        if self._copy is None:
            return ShardFile(self.path, spec, receipt)
        handle = self._copy.open_shard(spec, receipt)
        try:
            return ShardFile(self.place, spec, receipt, handle)
        except CacheError:
            self._discard(self._copy, shard, spec)
            return ShardFile(self.place, spec, receipt, self._copy.open_shard(spec, receipt))

    def _discard(self, copy: LocalCopy, shard: int, spec: ArraySpec) -> None:
        """Let go of a file that is damaged in the copy: the next one is fetched and compared with its receipt."""
        with self._lock:
            self._files.pop((shard, spec.name), None)
        copy.discard_shard(spec, shard)

    def receipt(self, shard: int) -> Receipt:
        """The receipt of a shard."""
        with self._lock:
            receipt = self._receipts.get(shard)
        if receipt is not None:
            return receipt
        if self._copy is not None:
            receipt = self._copy.receipt(shard)
        elif (receipt := read_receipt(self.path, self.manifest, shard)) is None:
            raise unfinished(self.path, self.manifest)
        with self._lock:
            self._receipts[shard] = receipt
            if len(self._receipts) > _KEPT_RECEIPTS:
                self._receipts.popitem(last=False)
        return receipt
