"""Synthetic caches for tests: random but valid targets, without any model.

In: sizes, an encoding and a seed. Out: a manifest, arrays for each shard, or a whole finished cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_spec.commit import commit_shard, create_cache, tokens_digest
from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import TopK
from cache_spec.imported import ImportedInfo
from cache_spec.manifest import (
    BlocksInfo,
    ComputeInfo,
    CorpusInfo,
    HiddenInfo,
    Manifest,
    SourceInfo,
    TeacherInfo,
    TokenizerInfo,
)
from cache_spec.masking import MaskingInfo
from cache_spec.receipts import write_seal
from cache_spec.tables import draft_digests
from cache_spec.targets import Array, Geometry
from tests.conformance import examples

ENCODINGS: dict[str, Encoding] = {
    "topk": TopK(k=5),
    "prototype": Prototype(k=5, prototypes=3, residual_draws=4, calibration_tokens=40),
    "sampled": Sampled(draws=12),
    "sparsified": Sparsified(k=6),
    "hidden": Hidden(dtype="int8", head_dtype="float16", bias=True),
}
"""One small record of each encoding."""


def make_manifest(
    *,
    num_blocks: int = 7,
    block_tokens: int = 8,
    shard_blocks: int = 3,
    vocab_size: int = 50,
    padded_vocab_size: int | None = None,
    k: int = 5,
    encoding: Encoding | None = None,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    window: int | None = 4,
    hidden_dtype: str = "float16",
    hidden_size: int = 6,
    tokens_sha256: str = "0" * 64,
    teacher_name: str = "tiny-teacher",
    model_type: str = "gpt2",
    num_layers: int = 2,
    weights_sha256: str = "1" * 64,
    masking: MaskingInfo | None = None,
    imported: ImportedInfo | None = None,
) -> Manifest:
    """A consistent manifest of a made-up teacher; ``encoding`` is ``topk`` of ``k`` where none is given."""
    encoding = encoding or TopK(k=k)
    ran = imported is None
    return Manifest(
        teacher=TeacherInfo(
            name=teacher_name,
            revision=None,
            model_type=model_type if ran else None,
            weights_sha256=weights_sha256 if ran else None,
            vocab_size=vocab_size,
            padded_vocab_size=padded_vocab_size or vocab_size,
            hidden_size=hidden_size if ran else None,
            num_layers=num_layers if ran else None,
            num_parameters=1000 if ran else None,
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
        encoding=encoding,
        temperatures=temperatures,
        hidden=HiddenInfo(window=window, dtype=hidden_dtype) if window else None,  # type: ignore[arg-type]
        masking=masking,
        imported=imported,
        compute=ComputeInfo(device_type="cpu", dtype="float32", batch_blocks=2) if ran else None,
        tables=draft_digests(encoding.tables(Geometry(block_tokens, temperatures, vocab_size, hidden_size))),
        files={},
        provenance={"kdpipe": "test"},
    )


def make_rows(manifest: Manifest, seed: int = 0) -> dict[str, Array]:
    """Random arrays for all blocks of ``manifest``, which go with the tables of the same seed."""
    text = examples.make_text(manifest, seed)
    return examples.make_rows(manifest, text, make_tables(manifest, seed))


def make_tables(manifest: Manifest, seed: int = 0) -> dict[str, Array]:
    """Every table of a manifest's encoding."""
    return examples.make_tables(manifest, examples.make_text(manifest, seed), seed)


def make_arrays(
    *, num_blocks: int, block_tokens: int, vocab_size: int, k: int, temperatures: tuple[float, ...], seed: int = 0
) -> dict[str, Array]:
    """Every array of N random blocks of a ``topk`` cache without pooled hidden states."""
    sizes: dict[str, Any] = {"num_blocks": num_blocks, "block_tokens": block_tokens, "vocab_size": vocab_size, "k": k}
    return make_rows(make_manifest(**sizes, temperatures=temperatures, window=None), seed)


def shard_rows(manifest: Manifest, rows: dict[str, Array], shard: int) -> dict[str, Array]:
    """The part of ``rows`` that belongs to one shard."""
    first, count = manifest.blocks.shard_range(shard)
    return {name: values[first : first + count] for name, values in rows.items()}


def write_cache(
    path: Path, manifest: Manifest, rows: dict[str, Array], *, seal: bool = True, seed: int = 0
) -> Manifest:
    """Write a whole cache of ``rows`` and the tables of ``seed``; the manifest's token digest is set to theirs."""
    corpus = manifest.corpus.model_copy(update={"tokens_sha256": tokens_digest(rows["input_ids"])})
    tables = make_tables(manifest, seed)
    manifest = create_cache(path, manifest.model_copy(update={"corpus": corpus}), tables)
    for shard in range(manifest.blocks.num_shards):
        commit_shard(path, manifest, shard, shard_rows(manifest, rows, shard))
    if seal:
        write_seal(path, manifest)
    return manifest
