"""``python -m benchmarks.quantisation CACHE``: what the step of head log-probabilities costs in bytes and in accuracy.

In: a finished cache, made with a fine step, and a number of blocks. Out: JSON: for each coarser step, and for float16
and bfloat16 bit patterns as differences along rank, the bytes per token that the shard codec makes of the heads, the
largest error, and the KL divergence that rounding causes. The cache's own step counts as exact.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.reader import CacheReader
from cache_spec.shardfile import encode_shard
from cache_spec.topk import decode_gaps, encode_gaps

STEPS = (1 / 256, 1 / 128, 1 / 64, 1 / 32)


def measure(cache: Path, num_blocks: int) -> list[dict[str, Any]]:
    """One row per way to store the heads of the first ``num_blocks`` blocks."""
    reader = CacheReader.open(cache)
    batch = reader.batch(range(min(num_blocks, reader.manifest.blocks.num_blocks)), reader.manifest.temperatures[0])
    exact_BTK = batch.head_logprobs_BTK
    num_shard = len(exact_BTK)
    spec = dataclasses.replace(reader.specs["head_gaps"], shard_blocks=num_shard, num_blocks=num_shard)

    def row(name: str, gaps_BKT: np.ndarray[Any, Any], rounded_BTK: np.ndarray[Any, Any]) -> dict[str, Any]:
        error_BTK = rounded_BTK.astype(np.float64) - exact_BTK
        # Over the head alone, to second order: rounding errors are independent of the probabilities.
        kl_BT = (np.exp(exact_BTK) * error_BTK**2 / 2).sum(-1)
        return {
            "stored_as": name,
            "bytes_per_token": round(len(encode_shard(spec, gaps_BKT)) / exact_BTK[..., 0].size, 2),
            "largest_error_nats": float(np.abs(error_BTK).max()),
            "kl_nats": float(kl_BT.mean()),
        }

    rows = []
    for step in STEPS:
        gaps_BKT = encode_gaps(exact_BTK, step)
        rows.append(row(f"steps of 1/{round(1 / step)} nat", gaps_BKT, decode_gaps(gaps_BKT, step)))
    half_BTK = (-exact_BTK).astype(np.float16)
    bits_BTK = (-exact_BTK).view(np.uint32)
    brain_BTK = ((bits_BTK + 0x7FFF + ((bits_BTK >> 16) & 1)) >> 16).astype(np.uint16)
    for name, patterns_BTK, rounded_BTK in (
        ("float16 bit patterns", half_BTK.view(np.uint16), -half_BTK.astype(np.float32)),
        ("bfloat16 bit patterns", brain_BTK, -(brain_BTK.astype(np.uint32) << 16).view(np.float32)),
    ):
        gaps_BKT = np.ascontiguousarray(np.diff(patterns_BTK, axis=-1, prepend=np.uint16(0)).swapaxes(1, 2))
        rows.append(row(name, gaps_BKT, rounded_BTK))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    options = parser.parse_args()
    print(json.dumps(measure(options.cache, options.blocks), indent=2))


if __name__ == "__main__":
    main()
