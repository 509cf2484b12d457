"""One batch of a cache as a table of Arrow: a row a block, lists of its real tokens, no padding.

In: a reader, blocks and what to keep. Out: tables of the columns that ``docs/interop.md`` lists, and digests that
do not depend on how a table is cut into chunks.

Legend of axes: B blocks, T tokens, K kept, J points, N real tokens of all blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.errors import BadInputError
from cache_spec.imported import refuse_import
from cache_spec.reader import CacheReader
from cache_spec.targets import Array, PointTargets
from pipeline.interop.config import ExportConfig
from pipeline.interop.decoded import kept_tokens, tail_masses, top_of

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What of a cache's targets goes into columns; checked before anything is written."""

    temperature: float
    k: int
    """Of heads; the most points that a position has where targets are drawn."""
    has_points: bool
    """Targets are drawn tokens, which are no top-k: they have columns of their own."""
    renormalised: bool
    tail_temperatures: tuple[float, ...]
    dtype: str

    @classmethod
    def of(cls, config: ExportConfig, reader: CacheReader) -> Columns:
        """Raises BadInputError ``masked-cache``, ``no-top-k``, ``undeclared-temperature``, ``imported-cache`` or
        ``unused-setting``."""
        manifest, encoding = reader.manifest, reader.manifest.encoding
        if manifest.masking is not None:
            hint = "--to safetensors keeps what was masked and where"
            found = "targets of masked tokens, which no such column has a place for"
            raise BadInputError("masked-cache", reader.place, expected="next-token targets", found=found, hint=hint)
        manifest.temperature_index(config.temperature)
        has_points = isinstance(encoding, Sampled | Sparsified)
        if has_points and (given := sorted(config.model_fields_set & {"k", "logprobs", "tail"})):
            found = f"{given[0]}, which means nothing to drawn tokens"
            raise BadInputError("unused-setting", reader.place, found=found)
        imported = manifest.imported
        if imported is not None and imported.logprobs == "renormalised" and (config.logprobs == "full" or config.tail):
            refuse_import(imported, reader.place, "log-probabilities of the whole vocabulary")
        if isinstance(encoding, Sampled):
            k = encoding.num_points(manifest.geometry)
        else:
            k = encoding.k if isinstance(encoding, Sparsified) else kept_tokens(reader, config.k)
        known = () if encoding.any_temperature else manifest.temperatures
        return cls(
            temperature=config.temperature,
            k=k,
            has_points=has_points,
            renormalised=config.logprobs == "renormalised",
            tail_temperatures=tuple(sorted({*known, config.temperature})) if config.tail else (),
            dtype=config.dtype,
        )

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        values = pa.float16() if self.dtype == "float16" else pa.float32()
        ids, flags = pa.int32(), pa.int8()
        columns = {"input_ids": pa.list_(ids), "attention_mask": pa.list_(flags), "labels": pa.list_(ids)}
        if self.has_points:
            columns |= {"point_token_ids": pa.list_(pa.list_(ids)), "point_probs": pa.list_(pa.list_(pa.float32()))}
        else:
            columns |= {
                "target_token_ids": pa.list_(pa.list_(ids)),
                "target_logprobs": pa.list_(pa.list_(values)),
                "target_mask": pa.list_(pa.list_(flags)),
            }
        for temperature in self.tail_temperatures:
            columns[tail_column(temperature)] = pa.list_(values)
        return pa.schema(columns)

    def table(self, reader: CacheReader, blocks: Sequence[int] | Array) -> pa.Table:
        """The rows of ``blocks``."""
        batch = reader.batch(blocks, self.temperature, with_hidden=False)
        lengths_B = batch.lengths_B.astype(np.int64)
        real_BT = np.arange(batch.input_ids_BT.shape[1]) < lengths_B[:, None]
        ids_N = batch.input_ids_BT[real_BT].astype(np.int32)
        num_tokens = len(ids_N)
        columns = {
            "input_ids": _lists(lengths_B, pa.array(ids_N)),
            "attention_mask": _lists(lengths_B, pa.array(np.ones(num_tokens, np.int8))),
            "labels": _lists(lengths_B, pa.array(ids_N)),
        }
        if self.has_points:
            assert isinstance(batch.targets, PointTargets)
            ids_NJ, probs_NJ = batch.targets.ids_BTJ[real_BT], batch.targets.probs_BTJ[real_BT]
            is_point_NJ = probs_NJ > 0
            counts_N = is_point_NJ.sum(1)
            columns |= {
                "point_token_ids": _lists(lengths_B, _lists(counts_N, pa.array(ids_NJ[is_point_NJ].astype(np.int32)))),
                "point_probs": _lists(lengths_B, _lists(counts_N, pa.array(probs_NJ[is_point_NJ].astype(np.float32)))),
            }
        else:
            top = top_of(reader, batch, self.temperature, self.k)
            logprobs_BTK = top.renormalised_BTK if self.renormalised else top.logprobs_BTK
            counts_N = np.full(num_tokens, self.k)
            mask_NK = np.ones((num_tokens, self.k), np.int8)
            # What follows a row's last token is no token of the row: there is no label to go with it.
            mask_NK[np.cumsum(lengths_B) - 1] = 0
            flat = {
                "target_token_ids": top.ids_BTK[real_BT],
                "target_logprobs": logprobs_BTK[real_BT].astype(self.dtype),
                "target_mask": mask_NK,
            }
            for name, values_NK in flat.items():
                columns[name] = _lists(lengths_B, _lists(counts_N, pa.array(values_NK.reshape(-1))))
            if self.tail_temperatures:
                masses = tail_masses(reader, blocks, self.tail_temperatures, self.k)
                for temperature, log_tail_BT in zip(self.tail_temperatures, masses, strict=True):
                    values_N = log_tail_BT[real_BT].astype(self.dtype)
                    columns[tail_column(temperature)] = _lists(lengths_B, pa.array(values_N))
        return pa.table(columns, schema=self.schema)


def tail_column(temperature: float) -> str:
    """Name of the column of the tail's mass at a temperature."""
    return f"log_tail_mass_t{temperature:g}"


def _lists(counts: Array, values: pa.Array) -> pa.ListArray:
    """Lists of so many values each."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def table_digest(table: pa.Table) -> str:
    """SHA-256 of all values of a table and of how lists divide them."""
    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        part: Any = column.combine_chunks()  # sizes of all lists first, then values: how chunks were cut does not show
        while isinstance(part, pa.ListArray):
            digest.update(np.diff(part.offsets.to_numpy()).astype("<i4").tobytes())
            part = part.flatten()
        digest.update(f"{name} {part.type}".encode() + part.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
