"""The order of blocks: pinned for ever, different where it must be, mixed within a window and local across windows."""

from __future__ import annotations

import numpy as np
import pytest

from train.order import EpochOrder, keyed_permutation

PINNED = [7, 5, 12, 6, 15, 4, 13, 14, 10, 21, 8, 11, 9, 20, 3, 16, 2, 19, 1, 18, 17, 0]


def order(**changes: object) -> EpochOrder:
    settings: dict[str, object] = {
        "num_blocks": 22,
        "shard_blocks": 4,
        "window_shards": 2,
        "seed": 0,
        "epoch": 0,
        "fingerprint": "abc",
    }
    return EpochOrder(**(settings | changes))  # type: ignore[arg-type]


def test_order_is_the_same_on_every_machine_for_ever() -> None:
    assert order().indices(0, 22).tolist() == PINNED


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"fingerprint": "abd"}])
def test_order_differs_between_seeds_epochs_and_caches(change: dict[str, object]) -> None:
    usual, other = order(num_blocks=500).indices(0, 500), order(num_blocks=500, **change).indices(0, 500)
    assert np.mean(usual == other) < 0.05


def test_blocks_of_a_window_come_from_its_shards_only() -> None:
    shards = order(num_blocks=80, window_shards=4).indices(0, 80) // 4
    for start in range(0, 80, 16):
        assert len(set(shards[start : start + 16].tolist())) == 4


def test_a_batch_mixes_shards_of_its_window() -> None:
    shards = order(num_blocks=640, shard_blocks=64, window_shards=10).indices(0, 64) // 64
    assert len(set(shards.tolist())) > 5


def test_a_stretch_touches_only_its_window() -> None:
    huge = order(num_blocks=10**9, shard_blocks=10**6, window_shards=1)
    assert len(huge.indices(5 * 10**8, 4)) == 4


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, -1), (20, 3), (23, 0)])
def test_a_stretch_outside_the_epoch_is_refused(start: int, count: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        order().indices(start, count)


@pytest.mark.parametrize(
    "change", [{"num_blocks": 0}, {"shard_blocks": 0}, {"window_shards": 0}, {"epoch": -1}, {"seed": -1}]
)
def test_an_order_of_nothing_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needs"):
        order(**change)


def test_permutation_is_unbiased_in_its_first_place() -> None:
    firsts = [int(keyed_permutation(5, "key", number)[0]) for number in range(2000)]
    counts = np.bincount(firsts, minlength=5)
    assert counts.min() > 320
    assert counts.max() < 480


LENGTHS = np.random.default_rng(0).integers(1, 1025, size=1000)


def grouped(**changes: object) -> EpochOrder:
    settings = {"num_blocks": 1000, "shard_blocks": 50, "window_shards": 4, "group_blocks": 8}
    return order(**settings, lengths=lambda blocks: LENGTHS[blocks], **changes)


def test_without_shuffling_blocks_come_as_they_lie() -> None:
    assert order(shuffle=False, epoch=3).indices(0, 22).tolist() == list(range(22))


def test_groups_are_of_like_length_and_cover_each_block_once() -> None:
    blocks = grouped().indices(0, 1000)
    assert sorted(blocks.tolist()) == list(range(1000))
    spread = np.ptp(LENGTHS[blocks].reshape(-1, 8), axis=1)
    usual = np.ptp(LENGTHS[order(num_blocks=1000).indices(0, 1000)].reshape(-1, 8), axis=1)
    assert np.median(spread) < 60 < 600 < np.median(usual)


def test_groups_come_in_no_order_of_length() -> None:
    means = LENGTHS[grouped().indices(0, 200)].reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5
    assert not np.array_equal(grouped().indices(0, 200), grouped(epoch=1).indices(0, 200))


@pytest.mark.parametrize("group_blocks", [7, 33, 300])
def test_any_stretch_of_grouped_blocks_is_that_of_the_whole_epoch(group_blocks: int) -> None:
    settings = {"num_blocks": 997, "shard_blocks": 50, "window_shards": 3, "group_blocks": group_blocks}
    made = [order(**settings, lengths=lambda blocks: LENGTHS[blocks]) for _ in range(2)]
    whole = made[0].indices(0, 997)
    assert sorted(whole.tolist()) == list(range(997))
    for start in range(990, 0, -37):
        assert made[1].indices(start, min(20, 997 - start)).tolist() == whole[start : start + 20].tolist()


def test_groups_start_where_passes_start_in_every_window() -> None:
    settings = {"num_blocks": 1000, "shard_blocks": 50, "window_shards": 3, "group_blocks": 8}
    blocks = order(**settings, lengths=lambda blocks: LENGTHS[blocks]).indices(0, 1000)
    spread = np.ptp(LENGTHS[blocks].reshape(-1, 8), axis=1)
    # One pass at each of the six seams between windows may mix two windows.
    assert (spread > 150).sum() <= 6


def test_grouping_without_shuffling_sorts_each_window() -> None:
    lengths = LENGTHS[grouped(shuffle=False).indices(0, 200)]
    assert (np.diff(lengths) >= 0).all()


def test_groups_spare_nearly_all_padding() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6.0, 0.9, 20_480), 8, 1024).astype(np.int64)
    settings = {"num_blocks": 20_480, "shard_blocks": 256, "window_shards": 16}

    def computed(**changes: object) -> float:
        blocks = order(**settings, **changes).indices(0, 20_480)
        return float(lengths[blocks].reshape(-1, 8).max(axis=1).sum() * 8 / lengths.sum())

    assert computed(group_blocks=8, lengths=lambda blocks: lengths[blocks]) < 1.01
    assert computed() > 1.9
