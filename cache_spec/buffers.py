"""Memory for batches, taken again once nobody holds an array in it.

In: a shape and a dtype. Out: an uninitialised array, as from ``numpy.empty``. A training run reads batch after batch
of one size; a fresh page from the system costs more than decoding what goes into it.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np

from cache_spec.targets import Array

# Smaller ones stay inside the allocator's own heap anyway.
_LEAST_BYTES = 1 << 16
_MOST_BUFFERS = 24


class _Kept(threading.local):
    """A thread's buffers, the longest unused first; an array may well be let go by another thread."""

    def __init__(self) -> None:
        self.buffers: list[Array] = []


def _references(buffers: list[Array], at: int) -> int:
    return sys.getrefcount(buffers[at])


_kept = _Kept()
_UNUSED = _references([np.empty(1, np.uint8)], 0)


def take(shape: tuple[int, ...], dtype: np.dtype[Any] | type[np.generic]) -> Array:
    """An uninitialised array in C order. Its memory is taken again only when neither it nor any view of it is left."""
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LEAST_BYTES:
        return np.empty(shape, dtype)
    buffers = _kept.buffers
    for at in range(len(buffers)):
        # Every view's base is the array that owns the memory, so its references tell whether any is left.
        if buffers[at].nbytes == num_bytes and _references(buffers, at) == _UNUSED:
            buffers.append(buffers.pop(at))
            break
    else:
        del buffers[: len(buffers) + 1 - _MOST_BUFFERS]
        buffers.append(np.empty(num_bytes, np.uint8))
    return buffers[-1].view(dtype).reshape(shape)
