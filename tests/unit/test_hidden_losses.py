"""Pooling over windows, and the losses between pooled hidden states, against their dense forms."""

from __future__ import annotations

import pytest
import torch

from tests.refusals import refused
from train.hidden_losses import centred, cosine_sum, mse_sum, pool_windows


def test_pooling_means_over_real_tokens_of_each_window() -> None:
    hidden_BTD = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
    lengths_B = torch.tensor([12, 6, 1])
    hidden_BTD[1, 6:] = torch.nan  # padding never leaks
    pooled_BWD, mask_BW = pool_windows(hidden_BTD, lengths_B, 4)
    assert mask_BW.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    torch.testing.assert_close(pooled_BWD[0], hidden_BTD[0].view(3, 4, 5).mean(dim=1))
    torch.testing.assert_close(pooled_BWD[1, 1], hidden_BTD[1, 4:6].mean(dim=0))
    torch.testing.assert_close(pooled_BWD[2, 0], hidden_BTD[2, 0])
    assert not pooled_BWD[~mask_BW].any()


def test_pooling_window_of_one_keeps_each_state_and_widens_low_precision() -> None:
    hidden_BTD = torch.randn(1, 4, 3).bfloat16()
    pooled_BWD, mask_BW = pool_windows(hidden_BTD, torch.tensor([4]), 1)
    assert mask_BW.all()
    assert torch.equal(pooled_BWD, hidden_BTD.float())


@pytest.mark.parametrize("window", [0, 5])
def test_pooling_window_that_does_not_divide_the_block_is_refused(window: int) -> None:
    refused("bad-window", pool_windows, torch.zeros(1, 12, 2), torch.tensor([12]), window)


def test_centring_takes_the_mean_of_each_blocks_real_windows_away() -> None:
    pooled_BWD = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask_BW = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    pooled_BWD[~mask_BW] = torch.nan
    got_BWD = centred(pooled_BWD, mask_BW)
    torch.testing.assert_close(got_BWD[0], pooled_BWD[0] - pooled_BWD[0].mean(dim=0))
    torch.testing.assert_close(got_BWD[1, :2], pooled_BWD[1, :2] - pooled_BWD[1, :2].mean(dim=0))
    assert not got_BWD[2].any()
    assert not got_BWD[~mask_BW].any()


def test_hidden_sums_equal_their_dense_form_and_ignore_empty_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    student_BWD = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    teacher_BWD = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    mask_BW = torch.tensor([[True, True, False], [True, False, False]])
    student_BWD[~mask_BW], teacher_BWD[~mask_BW] = 0.0, 0.0
    student_BWD.requires_grad_()
    cosine, mse = cosine_sum(student_BWD, teacher_BWD, mask_BW), mse_sum(student_BWD, teacher_BWD, mask_BW)
    pairs = [(student_BWD[b, w], teacher_BWD[b, w]) for b, w in mask_BW.nonzero().tolist()]
    torch.testing.assert_close(cosine, torch.stack([1 - s @ t / (s.norm() * t.norm()) for s, t in pairs]).sum())
    torch.testing.assert_close(mse, torch.stack([((s - t) ** 2).sum() / 5 for s, t in pairs]).sum())
    (grad_BWD,) = torch.autograd.grad(cosine + mse, student_BWD)
    assert torch.isfinite(grad_BWD).all()
    assert not grad_BWD[~mask_BW].any()
