"""What is masked: a pure function of seed, block and position, in the shares that were asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cache_spec.masking import MaskedText, MaskingInfo
from cache_spec.targets import Array
from pipeline.masking import Masker, Masks, kept_first
from tests.conformance.examples import masked as masked_by_the_rule

VOCABULARY, CLS, SEP, MASK = 200, 2, 3, 4
SPECIAL = (0, 1, 2, 3, 4)
NUM_BLOCKS, BLOCK_TOKENS = 400, 64
# Two-sided, at a false alarm in about a million runs of every test that uses it.
SIGMAS = 5.2


def info(**changes: Any) -> MaskingInfo:
    values: dict[str, Any] = {
        "probability": 0.15,
        "mask_share": 0.8,
        "keep_share": 0.1,
        "random_share": 0.1,
        "smoothing": 0.7,
        "seed": 7,
        "positions": "masked",
        "mask_token_id": MASK,
        "cls_token_id": CLS,
        "sep_token_id": SEP,
        "special_ids": SPECIAL,
    }
    return MaskingInfo(**values | changes)


def text(num_blocks: int = NUM_BLOCKS, num_tokens: int = BLOCK_TOKENS, seed: int = 0) -> tuple[Array, Array]:
    """Framed blocks of random length with a few special tokens inside; frequent ids are the small ones."""
    rng = np.random.default_rng(seed)
    ids_BT = 5 + (rng.random((num_blocks, num_tokens)) ** 3 * (VOCABULARY - 5)).astype(np.uint16)
    ids_BT[rng.random(ids_BT.shape) < 0.03] = 1
    lengths_B = rng.integers(3, num_tokens + 1, size=num_blocks).astype(np.uint32)
    ids_BT[0] = 1
    ids_BT[:, 0] = CLS
    ids_BT[np.arange(num_blocks), lengths_B - 1] = SEP
    ids_BT[np.arange(num_tokens) >= lengths_B[:, None]] = SEP
    return ids_BT.astype(np.uint16), lengths_B


def counts(ids_BT: Array) -> Array:
    return np.bincount(ids_BT.reshape(-1), minlength=VOCABULARY)


def masked(masking: MaskingInfo, ids_BT: Array, lengths_B: Array) -> tuple[Masks, MaskedText]:
    masks = Masker(masking, counts(ids_BT)).masks(ids_BT, lengths_B, np.arange(len(ids_BT)))
    return masks, masks.text(masking, ids_BT, lengths_B)


def test_a_block_is_masked_alike_in_any_batch_and_otherwise_elsewhere() -> None:
    ids_BT, lengths_B = text()
    masker = Masker(info(), counts(ids_BT))
    whole = masker.masks(ids_BT, lengths_B, np.arange(NUM_BLOCKS))
    chosen = np.array([7, 3, 301])
    some = masker.masks(ids_BT[chosen], lengths_B[chosen], chosen)
    for left, right in zip(whole, some, strict=True):
        np.testing.assert_array_equal(left[chosen], right)
    moved = masker.masks(ids_BT, lengths_B, np.arange(NUM_BLOCKS) + 1)
    seeded = Masker(info(seed=8), counts(ids_BT)).masks(ids_BT, lengths_B, np.arange(NUM_BLOCKS))
    for other in (moved, seeded):
        same = (whole.selected_BT & other.selected_BT).sum() / whole.selected_BT.sum()
        assert same < 0.5


def test_draws_are_those_of_the_specification() -> None:
    masking, (ids_BT, lengths_B) = info(probability=0.3), text(num_blocks=20, num_tokens=24)
    real_BT = np.arange(24) < lengths_B[:, None]
    found = Masker(masking, counts(ids_BT[real_BT])).masks(ids_BT, lengths_B, np.arange(20))
    for mine, wanted in zip(found, masked_by_the_rule(masking, ids_BT, lengths_B, VOCABULARY), strict=True):
        np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize("probability", [0.01, 0.15, 0.5, 1.0])
def test_only_ordinary_real_tokens_are_selected_and_as_many_as_asked(probability: float) -> None:
    ids_BT, lengths_B = text()
    masks, _ = masked(info(probability=probability), ids_BT, lengths_B)
    real_BT = np.arange(BLOCK_TOKENS) < lengths_B[:, None]
    ordinary_BT = real_BT & ~np.isin(ids_BT, SPECIAL)
    assert not (masks.selected_BT.astype(bool) & ~ordinary_BT).any()
    wanted_B = np.floor(probability * ordinary_BT.sum(1) + 0.5)
    np.testing.assert_array_equal(masks.selected_BT.sum(1), np.clip(wanted_B, ordinary_BT.any(1), None))
    assert (~ordinary_BT.any(1)).any(), "some blocks have nothing to select"
    assert not masks.replacements_BT[masks.selected_BT == 0].any()


def test_selected_tokens_are_masked_kept_and_exchanged_in_their_shares() -> None:
    ids_BT, lengths_B = text(num_blocks=2000)
    masking = info(probability=0.5, mask_share=0.6, keep_share=0.3, random_share=0.1)
    masks, shown = masked(masking, ids_BT, lengths_B)
    at = masks.selected_BT == 1
    number = int(at.sum())
    read, true = shown.read_ids_BT[at], ids_BT[at]
    np.testing.assert_array_equal(shown.read_ids_BT[~at], ids_BT[~at])
    kept = float((read == true).mean())
    # A random token is the mask, or the token itself, once in so many draws.
    for found, share in (
        (float((read == MASK).mean()), 0.6 + 0.1 / VOCABULARY),
        (kept, 0.3 + 0.1 / VOCABULARY),
    ):
        assert abs(found - share) < SIGMAS * np.sqrt(share * (1 - share) / number)
    others = read[(read != MASK) & (read != true)]
    assert len(np.unique(others)) > 0.9 * VOCABULARY
    assert abs(others.mean() / (VOCABULARY - 1) - 0.5) < SIGMAS / np.sqrt(12 * len(others)) + 0.01


def test_smoothing_prefers_rare_tokens_in_proportion_to_their_counts() -> None:
    ids_BT = np.full((4000, 8), 10, np.uint16)
    ids_BT[:, 0], ids_BT[:, -1], ids_BT[:, 3] = CLS, SEP, 20
    lengths_B = np.full(len(ids_BT), 8, np.uint32)
    for smoothing in (0.0, 0.7):
        masking = info(probability=0.1, smoothing=smoothing)
        often = np.ones(VOCABULARY, np.int64)
        often[10], often[20] = 1000, 50
        masks = Masker(masking, often).masks(ids_BT, lengths_B, np.arange(len(ids_BT)))
        assert (masks.selected_BT.sum(1) == 1).all()
        rare, frequent = 50.0**-smoothing, 1000.0**-smoothing
        share = rare / (rare + 5 * frequent)
        found = float(masks.selected_BT[:, 3].mean())
        assert abs(found - share) < SIGMAS * np.sqrt(share * (1 - share) / len(ids_BT))


def test_kept_rows_come_first_and_in_order() -> None:
    kept_BT = np.array([[False, True, False, True], [False] * 4])
    hidden_BTD = torch.arange(8.0).reshape(2, 4, 1)
    moved_BTD, number_B = kept_first(hidden_BTD, kept_BT)
    assert number_B.tolist() == [2, 0]
    assert moved_BTD[0, :2, 0].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"probability": 0.0},
        {"mask_share": 0.5},
        {"special_ids": (0, 1, 2, 3)},
        {"special_ids": (4, 3, 2)},
        {"smoothing": float("inf")},
        {"smoothing": -1.0},
        {"seed": 1 << 63},
        {"positions": "some"},
    ],
)
def test_a_masking_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        info(**changes)
