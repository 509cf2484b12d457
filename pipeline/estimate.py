"""``--dry-run`` of ``cache-teacher`` and ``transcode``: what a cache would cost, from one batch; nothing is written.

In: settings. Out: tokens, bytes and hours. The teacher runs on one batch of the real text (or the old cache's first
one is read), in the real shape, and its blocks are encoded as those of a shard would be. Prototypes are not learnt for
it: with flat ones in their place, heads and prototypes' numbers come out a little larger than they will be.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cache_spec.encodings.prototype import Prototype
from cache_spec.errors import BadInputError
from cache_spec.layout import ArraySpec, array_specs, target_arrays
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from cache_spec.shardfile import encode_shard, index_bytes
from cache_spec.targets import Array
from pipeline.config import CaptureConfig, TranscodeConfig
from pipeline.counting import count_tokens
from pipeline.inspect import describe_encoding
from pipeline.masking import Masker
from pipeline.shard import batches, encode_blocks, encoder_of
from pipeline.source import draft_manifest, resolve_source
from pipeline.tables import at_temperatures, settled
from pipeline.teacher import load_teacher
from pipeline.teacher_files import load_tokenizer
from pipeline.transcode import Transcoding

_CHUNK_FRAME_BYTES = 20
"""Blosc's header and the checksum of a chunk."""


def estimate(config: CaptureConfig) -> dict[str, Any]:
    """Tokens, bytes per token, bytes and hours of a capture; tokens are a lower bound for text beyond 256 MiB."""
    source = resolve_source(config)
    num_framing = 0 if source.masking is None else 2
    stream_tokens = config.block_tokens - num_framing
    counted = count_tokens(
        source.corpus,
        load_tokenizer(source.files),
        eos_token_id=source.tokenizer.eos_token_id,
        limit_tokens=config.limit_tokens,
        stream_tokens=stream_tokens,
    )
    num_tokens = counted.num_tokens
    batch_tokens = config.batch_blocks * config.block_tokens
    if num_tokens < stream_tokens and config.last_block == "drop":
        raise BadInputError("too-little-text", "text", expected=f"{stream_tokens} tokens", found=num_tokens)
    num_blocks = num_tokens // stream_tokens
    if config.last_block == "each":
        num_blocks = counted.num_blocks_each
    elif config.last_block == "drop":
        num_tokens = num_blocks * stream_tokens
    else:
        num_blocks = -(-num_tokens // stream_tokens)
    num_tokens += num_blocks * num_framing
    ids_BT = np.resize(counted.sample_ids, batch_tokens).reshape(config.batch_blocks, config.block_tokens)
    if source.masking is not None:
        ids_BT[:, 0], ids_BT[:, -1] = source.masking.cls_token_id, source.masking.sep_token_id
    lengths_B = np.full(config.batch_blocks, config.block_tokens, np.uint32)
    teacher = load_teacher(
        source.files, device=config.device, dtype=config.dtype, spread=config.spread, compiled=config.compile
    )
    manifest = draft_manifest(replace(source, encoding=settled(source.encoding, teacher.head)), num_blocks=num_blocks)
    encoder = encoder_of(manifest, _stand_ins(manifest, source.prototypes), teacher.device)
    ids_BT = ids_BT.astype(manifest.geometry.id_dtype)
    start = time.perf_counter()
    masks = None
    if source.masking is not None:
        counts_V = np.bincount(counted.sample_ids, minlength=source.teacher.vocab_size)
        masks = Masker(source.masking, counts_V).masks(ids_BT, lengths_B, np.arange(len(ids_BT)))
    arrays = encode_blocks(manifest, teacher, encoder, ids_BT, lengths_B, 0, masks)
    seconds = time.perf_counter() - start
    # One process keeps all cores of a CPU busy, so workers gain speed where each has a GPU of its own.
    num_devices = torch.cuda.device_count() if config.device in ("auto", "cuda") else 1
    tokens_per_s = batch_tokens / seconds * max(1, min(config.workers, num_devices))
    if config.last_block == "each":  # the teacher reads the padding too
        tokens_per_s *= num_tokens / (num_blocks * config.block_tokens)
    return _facts(manifest, arrays, num_tokens, counted.certainty, tokens_per_s, learnt=source.prototypes is None)


def estimate_transcoding(config: TranscodeConfig) -> dict[str, Any]:
    """Tokens, bytes per token, bytes and hours of a transcoding."""
    work = Transcoding(config)
    manifest, blocks = work.manifest, work.manifest.blocks
    tables = work.tables(True) if not work.learns else _stand_ins(manifest, work.prototypes)
    first, count = batches(manifest, 0)[0]
    start = time.perf_counter()
    arrays = work.arrays(range(first, first + count), tables)
    tokens_per_s = count * blocks.block_tokens / (time.perf_counter() - start)
    return _facts(manifest, arrays, manifest.corpus.num_tokens, "as in the cache", tokens_per_s, learnt=work.learns)


def _facts(
    manifest: Manifest, arrays: dict[str, Array], num_tokens: int, certainty: str, tokens_per_s: float, *, learnt: bool
) -> dict[str, Any]:
    """What is told of a cache to be, from the arrays of one batch."""
    blocks, encoding = manifest.blocks, manifest.encoding
    bytes_per_token = array_bytes(manifest, arrays, num_tokens)
    table_bytes = {
        table.name: math.prod(table.shape) * np.dtype(table.dtype).itemsize
        for table in encoding.tables(manifest.geometry)
    }
    total = sum(bytes_per_token.values()) + sum(table_bytes.values()) / num_tokens
    passes = num_tokens + (min(num_tokens, getattr(encoding, "calibration_tokens", 0)) if learnt else 0)
    return {
        "teacher": manifest.teacher.model_dump(mode="json"),
        "compute": manifest.compute.model_dump(mode="json") if manifest.compute else None,
        "encoding": encoding.model_dump(mode="json"),
        "tokens": num_tokens,
        "tokens_certainty": certainty,
        "shards": blocks.num_shards,
        "bytes_per_token": total,
        "bytes_per_token_by_array": bytes_per_token,
        "target_bytes_per_token": sum(bytes_per_token[name] for name in target_arrays(manifest)),
        "table_bytes": table_bytes,
        "bytes": round(num_tokens * total),
        "tokens_per_s": tokens_per_s,
        "hours": passes / tokens_per_s / 3600,
    }


def array_bytes(manifest: Manifest, arrays: dict[str, Array], num_tokens: int) -> dict[str, float]:
    """Bytes a token of each array of a cache of ``num_tokens``, by the rows of some of its blocks."""
    blocks = manifest.blocks
    return {
        name: (_block_bytes(spec, arrays[name]) * blocks.num_blocks + _shard_bytes(spec) * blocks.num_shards)
        / num_tokens
        for name, spec in array_specs(manifest).items()
    }


def _how(facts: dict[str, Any]) -> str:
    """The teacher's size, and what it runs or ran on; neither is known of what was imported."""
    if facts["compute"] is None:
        return "imported log-probabilities"
    compute = facts["compute"]
    return f"{facts['teacher']['num_parameters']:,} parameters, {compute['dtype']} on {compute['device_type']}"


def describe_estimate(facts: dict[str, Any]) -> list[str]:
    """Lines for people."""
    tables = sum(facts["table_bytes"].values())
    return [
        f"teacher   {facts['teacher']['name']}, {_how(facts)}",
        f"targets   {describe_encoding(facts['encoding'])}",
        f"tokens    {facts['tokens']:,} ({facts['tokens_certainty']}) in {facts['shards']:,} shards",
        f"size      {facts['bytes']:,} bytes, {facts['bytes_per_token']:.1f} bytes/token on one batch,"
        f" {facts['target_bytes_per_token']:.1f} of them targets",
        *([f"          at most {tables:,} of these bytes are stored once for the whole cache"] if tables else []),
        f"time      {facts['hours']:.2f} hours at {facts['tokens_per_s']:,.0f} tokens/s, timed on one batch",
        "nothing was written",
    ]


def _stand_ins(manifest: Manifest, prototypes: CacheReader | None) -> dict[str, Array]:
    """Tables to encode one batch with, where the real ones would have to be learnt."""
    if not isinstance(manifest.encoding, Prototype):
        return {}
    if prototypes is not None:
        return at_temperatures(prototypes, manifest.temperatures)
    classifier, shared = manifest.encoding.tables(manifest.geometry)
    rows = np.random.default_rng(0).normal(size=classifier.shape).astype(classifier.dtype)
    return {classifier.name: rows, shared.name: np.zeros(shared.shape, shared.dtype)}


def _block_bytes(spec: ArraySpec, rows: np.ndarray[Any, Any]) -> float:
    """Bytes of one block in a shard file, mean of a batch's; of the arrays of one number a block, uncompressed."""
    if not spec.row_shape:
        return spec.dtype.itemsize
    batch = replace(spec, shard_blocks=len(rows))
    return (len(encode_shard(batch, rows)) - index_bytes(batch)) / len(rows)


def _shard_bytes(spec: ArraySpec) -> int:
    """Bytes of a shard file beside its blocks: its index, and what frames a chunk of the whole shard."""
    return index_bytes(spec) + (0 if spec.row_shape else _CHUNK_FRAME_BYTES)
