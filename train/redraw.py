"""Other draws in each epoch: a cache's N draws of a token come in, n of them go out.

The draws of a token are shuffled and dealt out, n to each epoch; when fewer than n are left, they are shuffled anew.
So what an epoch sees is a uniform choice of n of N draws, right on average for every token, and N // n epochs in a row
have no draw in common. It is a pure function of (seed, epoch, block): whatever else is in the batch, and wherever a run
goes on, a block has the same draws.

Legend: B batch, T time, N draws in the cache, n draws of an epoch, J points.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cache_spec.encodings.sampled import Sampled
from cache_spec.errors import BadInputError
from cache_spec.manifest import Manifest
from cache_spec.reader import TargetBatch
from cache_spec.targets import PointTargets

Ints = NDArray[np.int64]


def check_draws(draws_per_step: int | None, manifest: Manifest) -> None:
    """Raise BadInputError ``no-draws`` unless the cache holds at least so many draws for each token."""
    if draws_per_step is None:
        return
    encoding = manifest.encoding
    if not isinstance(encoding, Sampled):
        found, hint = f"encoding {encoding.name}", "leave draws_per_step out"
        raise BadInputError("no-draws", "draws_per_step", expected="a cache of drawn tokens", found=found, hint=hint)
    if draws_per_step > encoding.draws:
        expected = f"at most {encoding.draws}, the draws in the cache"
        raise BadInputError("no-draws", "draws_per_step", expected=expected, found=draws_per_step)


def redrawn(
    batch: TargetBatch, manifest: Manifest, blocks: Ints, *, draws_per_step: int | None, seed: int, epoch: int
) -> TargetBatch:
    """The same batch with this epoch's draws alone; as it is where all of them are used."""
    encoding, targets = manifest.encoding, batch.targets
    if draws_per_step is None or not isinstance(encoding, Sampled) or draws_per_step == encoding.draws:
        return batch
    assert isinstance(targets, PointTargets)
    # Counts of N as float32 shares of it: rounding gives them back exactly, as N is below 2^16.
    counts_BTJ = np.rint(targets.probs_BTJ * encoding.draws).astype(np.int64)
    chosen_BTJ = np.stack(
        [
            deal(counts_TJ, draws_per_step, seed=seed, epoch=epoch, block=int(block))
            for counts_TJ, block in zip(counts_BTJ, blocks, strict=True)
        ]
    )
    # Most often drawn first; n draws have no more than n points.
    order_BTJ = np.argsort(-chosen_BTJ, axis=2, kind="stable")[:, :, :draws_per_step]
    return replace(
        batch,
        targets=PointTargets(
            ids_BTJ=np.take_along_axis(targets.ids_BTJ, order_BTJ, axis=2),
            probs_BTJ=np.take_along_axis(chosen_BTJ, order_BTJ, axis=2).astype(np.float32) / np.float32(draws_per_step),
        ),
    )


def deal(counts_TJ: Ints, keep: int, *, seed: int, epoch: int, block: int) -> Ints:
    """How often each point is among the ``keep`` draws of this epoch, int64 [T, J]; every row has the same sum N."""
    num_tokens, num_points = counts_TJ.shape
    draws = int(counts_TJ[0].sum())
    cycle, part = divmod(epoch, draws // keep)
    digest = hashlib.sha256(f"draws\n{seed}\n{cycle}\n{block}".encode()).digest()
    words = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(num_tokens * draws)
    dealt_Tn = np.argsort(words.reshape(num_tokens, draws), axis=1, kind="stable")[:, part * keep : (part + 1) * keep]
    # The point of each draw, were they laid out in a row.
    points_TN = np.repeat(np.tile(np.arange(num_points), num_tokens), counts_TJ.ravel()).reshape(num_tokens, draws)
    rows_T1 = np.arange(num_tokens)[:, None] * num_points
    chosen = np.take_along_axis(points_TN, dealt_Tn, axis=1) + rows_T1
    return np.bincount(chosen.ravel(), minlength=counts_TJ.size).reshape(counts_TJ.shape)
