"""``python -m benchmarks.quantisation CACHE``: what the levels of head probabilities cost in bytes and in accuracy.

In: a finished cache with a head, made with many levels, and a number of blocks. Out: JSON: for fewer levels of square
roots, for steps of log-probabilities, and for float16 and bfloat16 bit patterns, each as differences along rank, the
bytes per token that the shard codec makes of the heads, the largest error of a root, and the KL divergence that
rounding causes. The cache's own levels count as exact.

Legend of axes: B blocks, T tokens, K kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.encodings.topk import decode_gaps, encode_gaps
from cache_spec.errors import BadInputError
from cache_spec.reader import CacheReader
from cache_spec.shardfile import encode_shard
from cache_spec.targets import Array, HeadTargets

LEVELS = (1024, 255, 128, 64, 32)
STEPS = (1 / 256, 1 / 64, 1 / 16)


def measure(cache: Path, num_blocks: int) -> list[dict[str, Any]]:
    """One row per way to store the heads of the first ``num_blocks`` blocks."""
    reader = CacheReader.open(cache)
    blocks = range(min(num_blocks, reader.manifest.blocks.num_blocks))
    targets = reader.batch(blocks, reader.manifest.temperatures[0]).targets
    if not isinstance(targets, HeadTargets):
        found = reader.manifest.encoding.name
        raise BadInputError("other-encoding", cache, expected="an encoding with a head", found=found)
    exact_BTK = targets.logprobs_BTK
    num_shard = len(exact_BTK)

    def row(name: str, gaps_BKT: Array, rounded_BTK: Array) -> dict[str, Any]:
        spec = dataclasses.replace(
            reader.specs["head_gaps"], shard_blocks=num_shard, num_blocks=num_shard, dtype=gaps_BKT.dtype
        )
        probs_BTK, others_BTK = (np.exp(values.astype(np.float64)) for values in (exact_BTK, rounded_BTK))
        # Heads are made to sum to what they summed to: the tail's mass is stored apart.
        others_BTK *= probs_BTK.sum(-1, keepdims=True) / others_BTK.sum(-1, keepdims=True)
        # To second order, which a value rounded to nothing does not make infinite.
        kl_BT = ((others_BTK - probs_BTK) ** 2 / np.maximum(probs_BTK, 1e-12) / 2).sum(-1)
        return {
            "stored_as": name,
            "bytes_per_token": round(len(encode_shard(spec, gaps_BKT)) / exact_BTK[..., 0].size, 2),
            "largest_error_of_a_root": float(np.abs(np.exp(rounded_BTK / 2) - np.exp(exact_BTK / 2)).max()),
            "kl_nats": float(kl_BT.mean()),
        }

    rows = []
    for levels in LEVELS:
        gaps_BKT = encode_gaps(exact_BTK, levels)
        rows.append(row(f"{levels} levels of roots", gaps_BKT, decode_gaps(gaps_BKT, levels)))
    finite_BTK = np.maximum(exact_BTK, -50.0)
    for step in STEPS:
        codes_BTK = np.rint(finite_BTK / -step).clip(0, (1 << 16) - 1).astype(np.uint16)
        rows.append(row(f"steps of 1/{round(1 / step)} nat", _gaps(codes_BTK), codes_BTK * np.float32(-step)))
    half_BTK = (-finite_BTK).astype(np.float16)
    bits_BTK = (-finite_BTK).view(np.uint32)
    brain_BTK = ((bits_BTK + 0x7FFF + ((bits_BTK >> 16) & 1)) >> 16).astype(np.uint16)
    for name, patterns_BTK, rounded_BTK in (
        ("float16 bit patterns", half_BTK.view(np.uint16), -half_BTK.astype(np.float32)),
        ("bfloat16 bit patterns", brain_BTK, -(brain_BTK.astype(np.uint32) << 16).view(np.float32)),
    ):
        rows.append(row(name, _gaps(patterns_BTK), rounded_BTK))
    return rows


def _gaps(codes_BTK: Array) -> Array:
    """Differences along rank, [B, K, T]."""
    return np.ascontiguousarray(np.diff(codes_BTK, axis=-1, prepend=np.uint16(0)).swapaxes(1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    options = parser.parse_args()
    print(json.dumps(measure(options.cache, options.blocks), indent=2))


if __name__ == "__main__":
    main()
