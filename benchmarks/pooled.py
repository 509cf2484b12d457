"""``python -m benchmarks.pooled CACHE``: what pooled hidden states cost in bytes, and what rounding does to the cosine.

In: a finished cache of encoding ``hidden`` in float16, which holds every token's last hidden state. Out: JSON: for
windows of several lengths, and for float16 and int8 with a scale for each dimension of a block, bytes per token as
shards would hold them, the relative error of a vector, and how far rounding moves a cosine loss. The loss compares each
window with the next one, which stands for a student that is somewhere near; also with the mean of all windows
subtracted, since a direction that all vectors share hides what they differ in.

Legend of axes: B blocks, T tokens, W windows, D width.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_spec.errors import BadInputError
from cache_spec.layout import array_specs
from cache_spec.manifest import HiddenInfo, Manifest
from cache_spec.reader import CacheReader
from cache_spec.shardfile import encode_shard
from cache_spec.targets import Array, HiddenTargets
from pipeline.shard import pooled_arrays
from pipeline.targets import pool_hidden

WINDOWS = (1, 8, 32, 128)


def measure(cache: Path, num_blocks: int) -> list[dict[str, Any]]:
    """One row per window and dtype, over the first ``num_blocks`` blocks."""
    reader = CacheReader.open(cache)
    manifest = reader.manifest
    blocks = range(min(num_blocks, manifest.blocks.num_blocks))
    targets = reader.batch(blocks, manifest.temperatures[0], with_hidden=False).targets
    if not isinstance(targets, HiddenTargets):
        raise BadInputError("other-encoding", cache, expected="encoding hidden", found=manifest.encoding.name)
    hidden_BTD = torch.from_numpy(targets.hidden_BTD.astype(np.float32))
    lengths_B = torch.from_numpy(reader.lengths(blocks).astype(np.int64))
    rows = []
    for window in WINDOWS:
        if manifest.blocks.block_tokens % window:
            continue
        # Means of float32 values, rounded once: what a capture stores.
        exact_BWD = hidden_BTD.unflatten(1, (-1, window)).mean(2).numpy()
        pooled_BWD = pool_hidden(hidden_BTD, lengths_B, window).numpy()
        for info in (HiddenInfo(window=window, dtype="float16"), HiddenInfo(window=window, dtype="int8")):
            arrays = pooled_arrays(info, pooled_BWD)
            stored_BWD = arrays["hidden"].astype(np.float32)
            if info.dtype == "int8":
                stored_BWD *= arrays["hidden_scale"][:, None]
            norms_BW = np.linalg.norm(exact_BWD, axis=-1)
            mean_D = exact_BWD.mean((0, 1))
            rows.append(
                {
                    "window": window,
                    "dtype": info.dtype,
                    "bytes_per_token": round(_bytes(manifest, info, arrays) / (len(blocks) * hidden_BTD.shape[1]), 2),
                    "relative_error": float((np.linalg.norm(stored_BWD - exact_BWD, axis=-1) / norms_BW).mean()),
                    "cosine_loss": float(_losses(exact_BWD, exact_BWD).mean()),
                    "cosine_loss_moves_by": float(_moves(exact_BWD, stored_BWD)),
                    "centred_cosine_loss": float(_losses(exact_BWD - mean_D, exact_BWD - mean_D).mean()),
                    "centred_cosine_loss_moves_by": float(_moves(exact_BWD - mean_D, stored_BWD - mean_D)),
                }
            )
    return rows


def _losses(student_BWD: Array, teacher_BWD: Array) -> Array:
    """1 - cosine of each window's vector with the teacher's of the next one."""
    ours, theirs = student_BWD[:, :-1].astype(np.float64), teacher_BWD[:, 1:].astype(np.float64)
    result: Array = 1 - (ours * theirs).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1))
    return result


def _moves(exact_BWD: Array, stored_BWD: Array) -> float:
    """Mean absolute difference that storing the teacher's side makes."""
    return float(np.abs(_losses(exact_BWD, stored_BWD) - _losses(exact_BWD, exact_BWD)).mean())


def _bytes(manifest: Manifest, info: HiddenInfo, arrays: dict[str, Array]) -> int:
    """Bytes of the shard files that hold these arrays, one shard each."""
    specs = array_specs(manifest.model_copy(update={"hidden": info}))
    count = len(arrays["hidden"])
    return sum(
        len(encode_shard(dataclasses.replace(specs[name], num_blocks=count, shard_blocks=count), rows))
        for name, rows in arrays.items()
    )


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    options = parser.parse_args()
    print(json.dumps(measure(options.cache, options.blocks), indent=2))


if __name__ == "__main__":
    main()
