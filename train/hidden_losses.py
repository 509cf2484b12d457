"""Losses between pooled hidden states: a student's states and the teacher's cached windows come in, sums go out.

Legend: B batch, T time, W windows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cache_spec.errors import BadInputError


def pool_windows(hidden_BTD: Tensor, lengths_B: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean hidden state over each window's real tokens, and which windows have any: [B, W, D] and bool [B, W].

    The mean is float32, or float64 for float64 states; windows without a real token are zeros. Raises BadInputError
    when the window does not divide T.
    """
    batch, time, width = hidden_BTD.shape
    if window < 1 or time % window:
        raise BadInputError("bad-window", "window", expected=f"a divisor of {time} tokens", found=window)
    wide = torch.float64 if hidden_BTD.dtype == torch.float64 else torch.float32
    real_BT1 = (torch.arange(time, device=hidden_BTD.device) < lengths_B.unsqueeze(1)).unsqueeze(2)
    kept_BTD = torch.where(real_BT1, hidden_BTD, 0.0).to(wide)
    num_real_BW1 = real_BT1.view(batch, time // window, window, 1).sum(dim=2)
    sum_BWD = kept_BTD.view(batch, time // window, window, width).sum(dim=2)
    return sum_BWD / num_real_BW1.clamp(min=1), num_real_BW1.squeeze(2) > 0


def centred(pooled_BWD: Tensor, mask_BW: Tensor) -> Tensor:
    """Pooled states less their mean over each block's masked windows; what is not masked is zero.

    A block's own mean depends on no other block, so it is the same however blocks are spread over batches and ranks.
    """
    mask_BW1 = mask_BW.unsqueeze(2)
    kept_BWD = torch.where(mask_BW1, pooled_BWD, 0.0)
    mean_B1D = kept_BWD.sum(dim=1, keepdim=True) / mask_BW1.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mask_BW1, kept_BWD - mean_B1D, 0.0)


def cosine_sum(student_BWD: Tensor, teacher_BWD: Tensor, mask_BW: Tensor) -> Tensor:
    """Sum over the masked windows of 1 - cos: ``(1 - F.cosine_similarity(s, t, dim=-1))[mask].sum()``."""
    cosine_BW = F.cosine_similarity(student_BWD, teacher_BWD.to(student_BWD.dtype), dim=-1)
    return torch.where(mask_BW, 1 - cosine_BW, 0.0).sum()


def mse_sum(student_BWD: Tensor, teacher_BWD: Tensor, mask_BW: Tensor) -> Tensor:
    """Sum over the masked windows of the mean squared difference: ``(s - t).square().mean(-1)[mask].sum()``."""
    error_BW = (student_BWD - teacher_BWD.to(student_BWD.dtype)).square().mean(dim=-1)
    return torch.where(mask_BW, error_BW, 0.0).sum()
