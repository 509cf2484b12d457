"""The ``topk`` encoding in numpy: fixed-point gaps to log-probabilities and back.

In: descending log-probabilities at temperature 1, or their stored gaps. Out: the other. An entry is off by at most
half a step, unless it lies below 65535 steps, where it saturates (e^-256 at the default step).

Legend of axes: B blocks, T tokens, K kept, descending.
"""

from __future__ import annotations

import numpy as np

from cache_spec.errors import CacheError
from cache_spec.shardfile import Array

DEFAULT_STEP_NATS = 1 / 256
MAX_STEPS = (1 << 16) - 1


def encode_gaps(head_logprobs_BTK: Array, step_nats: float) -> Array:
    """uint16 gaps [B, K, T] of descending log-probabilities [B, T, K]."""
    steps = np.rint(head_logprobs_BTK.astype(np.float64) / -step_nats).clip(0, MAX_STEPS).astype(np.int64)
    return np.ascontiguousarray(np.diff(steps, axis=-1, prepend=0).astype(np.uint16).swapaxes(-1, -2))


def decode_gaps(gaps_BKT: Array, step_nats: float, place: object = "head_gaps") -> Array:
    """float32 log-probabilities [B, T, K] of stored gaps [B, K, T]; CacheError where a sum leaves the range."""
    steps = np.cumsum(gaps_BKT, axis=-2, dtype=np.uint32)
    if steps.size and steps[..., -1, :].max() > MAX_STEPS:
        raise CacheError("gap-overflow", place, expected=f"gaps summing to at most {MAX_STEPS}", found=steps.max())
    return steps.swapaxes(-1, -2).astype(np.float32, order="C") * np.float32(-step_nats)
