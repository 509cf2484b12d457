"""Synthetic caches for tests: random but valid targets, without any model.

In: sizes and a seed. Out: a manifest, arrays for each shard, or a whole finished cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cache_spec.commit import commit_shard, create_cache, tokens_digest
from cache_spec.manifest import (
    BlocksInfo,
    ComputeInfo,
    CorpusInfo,
    EncodingInfo,
    HiddenInfo,
    Manifest,
    SourceInfo,
    TeacherInfo,
    TokenizerInfo,
)
from cache_spec.receipts import write_seal
from cache_spec.shardfile import Array
from cache_spec.topk import DEFAULT_STEP_NATS, encode_gaps


def make_arrays(
    *, num_blocks: int, block_tokens: int, vocab_size: int, k: int, temperatures: tuple[float, ...], seed: int = 0
) -> dict[str, Array]:
    """Every array of N random blocks, from a random full distribution per token."""
    rng = np.random.default_rng(seed)
    id_dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    logits = rng.normal(size=(num_blocks, block_tokens, vocab_size)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    head_ids = np.argsort(-logprobs, axis=-1, kind="stable")[..., :k]
    normalisers, tails = [], []
    for temperature in temperatures:
        scaled = logprobs / temperature
        normaliser = np.log(np.exp(scaled).sum(-1))
        tail = np.exp(scaled - normaliser[..., None])
        np.put_along_axis(tail, head_ids, 0.0, axis=-1)
        normalisers.append(normaliser)
        with np.errstate(divide="ignore"):
            tails.append(np.log(tail.sum(-1)))
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
    input_ids = rng.integers(0, vocab_size, size=(num_blocks, block_tokens))
    gold = np.take_along_axis(logprobs[:, :-1], input_ids[:, 1:, None], axis=-1)[..., 0]
    return {
        "input_ids": input_ids.astype(id_dtype),
        "block_lengths": np.full(num_blocks, block_tokens, np.uint32),
        "head_ids": head_ids.astype(id_dtype),
        "head_gaps": encode_gaps(np.take_along_axis(logprobs, head_ids, axis=-1), DEFAULT_STEP_NATS),
        "log_normaliser": np.stack(normalisers, axis=1).astype(np.float32),
        "log_tail_mass": np.stack(tails, axis=1).astype(np.float16),
        "block_loss": -gold.mean(-1).astype(np.float32),
        "block_entropy": entropy.mean(-1).astype(np.float32),
    }


def make_manifest(
    *,
    num_blocks: int = 7,
    block_tokens: int = 8,
    shard_blocks: int = 3,
    vocab_size: int = 50,
    padded_vocab_size: int | None = None,
    k: int = 5,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    window: int | None = 4,
    hidden_size: int = 6,
    tokens_sha256: str = "0" * 64,
    teacher_name: str = "tiny-teacher",
    model_type: str = "gpt2",
    num_layers: int = 2,
    weights_sha256: str = "1" * 64,
) -> Manifest:
    """A consistent manifest of a made-up teacher."""
    return Manifest(
        teacher=TeacherInfo(
            name=teacher_name,
            revision=None,
            model_type=model_type,
            weights_sha256=weights_sha256,
            vocab_size=vocab_size,
            padded_vocab_size=padded_vocab_size or vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_parameters=1000,
            max_positions=1024,
        ),
        tokenizer=TokenizerInfo(sha256="2" * 64, eos_token_id=0),
        corpus=CorpusInfo(
            sources=(SourceInfo(name="made-up.txt", num_bytes=10, sha256="3" * 64),),
            text_field="text",
            num_documents=2,
            num_tokens=num_blocks * block_tokens,
            tokens_sha256=tokens_sha256,
        ),
        blocks=BlocksInfo(
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            shard_blocks=shard_blocks,
            last_block="drop",
            limit_tokens=None,
        ),
        encoding=EncodingInfo(name="topk", k=k, step_nats=DEFAULT_STEP_NATS),
        temperatures=temperatures,
        hidden=HiddenInfo(window=window) if window else None,
        compute=ComputeInfo(device_type="cpu", dtype="float32", batch_blocks=2),
        files={},
        provenance={"kdpipe": "test"},
    )


def make_rows(manifest: Manifest, seed: int = 0) -> dict[str, Array]:
    """Random arrays for all blocks of ``manifest``."""
    blocks = manifest.blocks
    rows = make_arrays(
        num_blocks=blocks.num_blocks,
        block_tokens=blocks.block_tokens,
        vocab_size=manifest.teacher.vocab_size,
        k=manifest.encoding.k,
        temperatures=manifest.temperatures,
        seed=seed,
    )
    if manifest.hidden:
        rng = np.random.default_rng(seed + 1)
        shape = (blocks.num_blocks, manifest.num_windows, manifest.teacher.hidden_size)
        rows["hidden"] = rng.normal(size=shape).astype(np.float16)
    return rows


def shard_rows(manifest: Manifest, rows: dict[str, Array], shard: int) -> dict[str, Array]:
    """The part of ``rows`` that belongs to one shard."""
    first, count = manifest.blocks.shard_range(shard)
    return {name: values[first : first + count] for name, values in rows.items()}


def write_cache(path: Path, manifest: Manifest, rows: dict[str, Array], *, seal: bool = True) -> Manifest:
    """Write a whole cache of ``rows``; the manifest's token digest is set to theirs."""
    corpus = manifest.corpus.model_copy(update={"tokens_sha256": tokens_digest(rows["input_ids"])})
    manifest = create_cache(path, manifest.model_copy(update={"corpus": corpus}))
    for shard in range(manifest.blocks.num_shards):
        commit_shard(path, manifest, shard, shard_rows(manifest, rows, shard))
    if seal:
        write_seal(path, manifest)
    return manifest
