"""Bytes of a cache that nobody has made: the exact shapes of its arrays, and how well such arrays compressed for us.

In: the teacher's sizes, settings, an amount of text. Out: the encoding's record, bytes of each array and of what is
stored once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.errors import BadInputError
from cache_spec.layout import ArraySpec, array_specs
from cache_spec.manifest import (
    BlocksInfo,
    ComputeInfo,
    CorpusInfo,
    HiddenInfo,
    Manifest,
    TeacherInfo,
    TokenizerInfo,
)
from cache_spec.shardfile import index_bytes
from cache_spec.tables import draft_digests
from cache_spec.targets import Geometry
from pipeline.encoding_config import encoding_record
from pipeline.plan.config import PlanConfig

RATIO_SOURCE = "inspect of caches of SmolLM2-135M, OpenWebText, blocks of 512 (docs/RESULTS.md, Encodings)"
_WIDE_IDS = 1.2
"""What ids of four bytes take of ids of two: their upper bytes compress well, but vocabularies are larger."""


class _Ratio(NamedTuple):
    """Stored bytes of raw ones: ``at_16`` with 16 tokens kept, and as a power of their number elsewhere."""

    at_16: float
    power: float = 0.0


# In the order of the encodings' arrays. The powers are from 7 and 16, or 16 and 32, tokens kept.
_RATIOS = {
    "input_ids": _Ratio(1.03),
    "head_ids": _Ratio(0.80),
    "head_ranks": _Ratio(0.60, 0.08),
    "head_gaps": _Ratio(0.42, -0.51),
    "tail_log_odds": _Ratio(0.58),
    "tail_prototype": _Ratio(1.07),
    "residual_ranks": _Ratio(0.83),
    "residual_log_mass": _Ratio(0.38),
    "draw_ids": _Ratio(0.69),
    "draw_counts": _Ratio(0.08),
    "kept_ids": _Ratio(0.92),
    "kept_gaps": _Ratio(0.19, -0.36),
    "last_hidden": _Ratio(0.93),
    "hidden": _Ratio(0.92),
    "hidden_scale": _Ratio(0.96),
    "prototype_classifier": _Ratio(0.91),
    "prototypes": _Ratio(0.62),
    "output_head": _Ratio(0.66),
}
_FINE_GAPS = _Ratio(0.51, -0.36)
"""Of ``head_gaps`` in two bytes."""
_INCOMPRESSIBLE = _Ratio(1.0)


class TeacherSizes(NamedTuple):
    """What a cache's shapes follow from."""

    model_type: str
    vocab_size: int
    width: int
    layers: int
    parameters: int


class CacheSize(NamedTuple):
    """What a cache takes, as planned or as measured on a part of it."""

    encoding: Encoding
    raw_bytes_per_token: dict[str, float]
    bytes_per_token: dict[str, float]
    table_bytes: dict[str, int]
    num_shards: int
    width: int
    """D: of the teacher."""

    def bytes(self, tokens: int) -> int:
        """Of ``tokens``, with what is stored once."""
        return round(tokens * sum(self.bytes_per_token.values())) + sum(self.table_bytes.values())


def cache_size(config: PlanConfig, teacher: TeacherSizes, tokens: int) -> CacheSize:
    """The size by shapes and stated ratios; BadInputError ``bad-encoding`` for what does not fit the teacher."""
    manifest = _manifest(config, teacher, tokens)
    kept = getattr(manifest.encoding, "k", 16)
    raw: dict[str, float] = {}
    stored: dict[str, float] = {}
    for name, spec in array_specs(manifest).items():
        row_bytes = math.prod(spec.row_shape) * spec.dtype.itemsize
        raw[name] = row_bytes / config.block_tokens
        stored[name] = _per_token(manifest, spec, _stored(spec, row_bytes, kept))
    tables = {
        part.name: round(math.prod(part.shape) * np.dtype(part.dtype).itemsize * _ratio(part.name, 16))
        for part in manifest.encoding.tables(manifest.geometry)
    }
    return CacheSize(manifest.encoding, raw, stored, tables, manifest.blocks.num_shards, teacher.width)


def measured_size(
    config: PlanConfig, teacher: TeacherSizes, tokens: int, block_bytes: dict[str, float], table_bytes: dict[str, int]
) -> CacheSize:
    """The size by the bytes of real blocks, and of real tables, that a probe wrote."""
    planned, manifest = cache_size(config, teacher, tokens), _manifest(config, teacher, tokens)
    stored = {name: _per_token(manifest, spec, block_bytes[name]) for name, spec in array_specs(manifest).items()}
    return planned._replace(bytes_per_token=stored, table_bytes=table_bytes)


def _per_token(manifest: Manifest, spec: ArraySpec, block_bytes: float) -> float:
    """Of an array's blocks, and of the index that each of its files has, however many blocks are in it."""
    blocks = manifest.blocks
    shards = blocks.num_shards * index_bytes(spec)
    return (block_bytes * blocks.num_blocks + shards) / (blocks.num_blocks * blocks.block_tokens)


def _stored(spec: ArraySpec, row_bytes: int, kept: int) -> float:
    if not spec.row_shape:
        return row_bytes
    if spec.name == "head_gaps" and spec.dtype.itemsize == 2:
        return row_bytes * _power(_FINE_GAPS, kept)
    wide = spec.dtype.itemsize == 4 and spec.dtype.kind == "u"
    return row_bytes * _ratio(spec.name, kept) * (_WIDE_IDS / 2 if wide else 1.0)


def _ratio(name: str, kept: int) -> float:
    return _power(_RATIOS.get(name, _INCOMPRESSIBLE), kept)


def _power(ratio: _Ratio, kept: int) -> float:
    return float(min(1.1, ratio.at_16 * (kept / 16) ** ratio.power))


def _manifest(config: PlanConfig, teacher: TeacherSizes, tokens: int) -> Manifest:
    """A manifest that is right in all that shapes follow from."""
    record = encoding_record(config, config.encoding)
    if isinstance(record, Hidden):
        record = record.model_copy(update={"head_dtype": "float16", "bias": False})
    geometry = Geometry(config.block_tokens, config.temperatures, teacher.vocab_size, teacher.width)
    if reason := record.refuse(geometry):
        raise BadInputError("bad-encoding", f"encoding {config.encoding}", found=reason)
    num_blocks = max(1, tokens // config.block_tokens)
    return Manifest(
        teacher=TeacherInfo(
            name="planned",
            revision=None,
            model_type=teacher.model_type,
            weights_sha256="0" * 64,
            vocab_size=teacher.vocab_size,
            padded_vocab_size=teacher.vocab_size,
            hidden_size=teacher.width,
            num_layers=teacher.layers,
            num_parameters=teacher.parameters,
            max_positions=None,
        ),
        tokenizer=TokenizerInfo(sha256="0" * 64, eos_token_id=0),
        corpus=CorpusInfo(
            sources=(),
            text_field=config.text_field,
            num_documents=1,
            num_tokens=num_blocks * config.block_tokens,
            tokens_sha256="0" * 64,
        ),
        blocks=BlocksInfo(
            num_blocks=num_blocks,
            block_tokens=config.block_tokens,
            shard_blocks=config.shard_blocks,
            last_block="drop",
            limit_tokens=None,
        ),
        encoding=record,
        temperatures=config.temperatures,
        hidden=HiddenInfo(window=config.hidden_window, dtype=config.hidden_dtype) if config.hidden_window else None,
        compute=ComputeInfo(device_type="cpu", dtype="float32", batch_blocks=config.capture_batch_blocks),
        tables=draft_digests(record.tables(geometry)),
        files={},
        provenance={},
    )


def learnt_from(encoding: Encoding, tokens: int) -> int:
    """Tokens that are read once more, because something is learnt from them first."""
    return min(tokens, encoding.calibration_tokens) if isinstance(encoding, Prototype) else 0
