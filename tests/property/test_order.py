"""Whatever the shape of a cache and however an epoch is cut up, each block comes exactly once, in one order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.order import EpochOrder

ORDERS = st.builds(
    EpochOrder,
    num_blocks=st.integers(1, 300),
    shard_blocks=st.integers(1, 40),
    window_shards=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    fingerprint=st.text(alphabet="0123456789abcdef", min_size=1, max_size=64),
)


@given(ORDERS)
def test_every_block_comes_exactly_once_per_epoch(order: EpochOrder) -> None:
    assert sorted(order.indices(0, order.num_blocks).tolist()) == list(range(order.num_blocks))


@given(ORDERS, st.data())
def test_any_stretch_equals_the_same_stretch_of_the_whole_epoch(order: EpochOrder, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, order.num_blocks))
    count = data.draw(st.integers(0, order.num_blocks - start))
    whole = order.indices(0, order.num_blocks)
    np.testing.assert_array_equal(order.indices(start, count), whole[start : start + count])


@given(ORDERS, st.integers(1, 64))
def test_steps_of_any_size_tile_the_epoch(order: EpochOrder, size: int) -> None:
    total = order.num_blocks
    steps = [order.indices(start, min(size, total - start)) for start in range(0, total, size)]
    np.testing.assert_array_equal(np.concatenate(steps), order.indices(0, total))
