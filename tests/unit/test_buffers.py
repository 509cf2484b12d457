"""Memory of a batch is taken again once nobody holds any array in it, and never before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cache_spec.buffers import take

SHAPE = (64, 1031)


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_taken_again_when_its_array_is_gone() -> None:
    array = take(SHAPE, np.float32)
    first = address(array)
    del array
    again = take(SHAPE[::-1], np.uint32)
    assert address(again) == first
    assert again.shape == SHAPE[::-1]
    assert again.dtype == np.uint32


def test_memory_is_kept_while_anything_views_it() -> None:
    views: tuple[Callable[[Any], object], ...] = (
        lambda array: array[3:5, ::2],
        lambda array: array.reshape(-1).view(np.uint8)[7:],
        torch.from_numpy,
        memoryview,
    )
    for view in views:
        array = take(SHAPE, np.float32)
        held, first = view(array), address(array)
        del array
        others = [take(SHAPE, np.float32) for _ in range(40)]
        assert first not in map(address, others)
        del held, others


def test_small_and_empty_arrays_are_plain_ones() -> None:
    assert take((3,), np.uint8).base is None
    assert take((0, 5), np.float32).shape == (0, 5)
