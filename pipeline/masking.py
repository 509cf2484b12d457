"""Which tokens a masked language model has to find out, and what it reads in their place: drawn once, for ever.

In: blocks of ids, and how often each token occurs in the corpus. Out: what the cache stores of the masking. A block's
draws are a function of (seed, block, position) alone: whatever the shard, the batch or the worker.

Legend of axes: B blocks, T tokens, V vocabulary, D width, N rows (B x T).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cache_spec.masking import MaskedText, MaskingInfo, masked_text
from cache_spec.targets import Array
from pipeline.encoders.draws import uniforms

STREAM = 1 << 20
"""Beyond those of any temperature, so that an encoder of the same seed draws other numbers."""


class Masks(NamedTuple):
    """What is stored of the masking of B blocks."""

    selected_BT: Array
    """uint8: 1 at the tokens to be found out."""
    replacements_BT: Array
    """Of the ids' dtype: what is read there, 0 elsewhere."""

    def text(self, info: MaskingInfo, ids_BT: Array, lengths_B: Array) -> MaskedText:
        """The masked blocks, and which of their positions are kept."""
        return masked_text(info, ids_BT, lengths_B, self.selected_BT, self.replacements_BT)


class Masker:
    """Masks blocks; ``counts_V`` is how often each token occurs in the corpus (less than once counts as once)."""

    def __init__(self, info: MaskingInfo, counts_V: Array) -> None:
        self.info, self.vocab_size = info, len(counts_V)
        self._slowness_V = np.maximum(counts_V, 1).astype(np.float64) ** info.smoothing

    def masks(self, ids_BT: Array, lengths_B: Array, blocks_B: Array) -> Masks:
        """The masking of these blocks; ``blocks_B`` are their indices in the cache.

        A block's tokens are drawn one after the other without replacement, in proportion to count^-smoothing: those
        whose exponential waiting times at these rates end first.
        """
        num_tokens, info = ids_BT.shape[1], self.info
        ordinary_BT = info.ordinary(ids_BT, lengths_B)
        row_N = torch.arange(ids_BT.size)
        block_N = torch.from_numpy(np.repeat(blocks_B.astype(np.int64), num_tokens))
        drawn_NS = uniforms(
            info.seed, block_N, row_N.remainder(num_tokens), num_streams=1, num_draws=3, first_stream=STREAM
        )[:, 0]
        wait_BT, fate_BT, other_BT = drawn_NS.numpy().T.reshape(3, *ids_BT.shape)
        ends_BT = np.where(ordinary_BT, -np.log1p(-wait_BT) * self._slowness_V[ids_BT], np.inf)
        place_BT = ends_BT.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        selected_BT = place_BT < info.num_selected(ordinary_BT.sum(1))[:, None]
        random_BT = np.floor(other_BT * self.vocab_size).astype(ids_BT.dtype)
        kept_share = info.mask_share + info.keep_share
        read_BT = np.where(fate_BT < kept_share, ids_BT, random_BT)
        read_BT = np.where(fate_BT < info.mask_share, info.mask_token_id, read_BT)
        return Masks(selected_BT.astype(np.uint8), np.where(selected_BT, read_BT, 0).astype(ids_BT.dtype))


def kept_first(hidden_BTD: torch.Tensor, kept_BT: Array) -> tuple[torch.Tensor, Array]:
    """Hidden states with those of kept positions in front, in their order, and how many these are, uint32 [B]."""
    order_BT = torch.from_numpy((~kept_BT).argsort(axis=1, kind="stable")).to(hidden_BTD.device)
    moved_BTD = hidden_BTD.gather(1, order_BT[:, :, None].expand_as(hidden_BTD))
    return moved_BTD, kept_BT.sum(1).astype(np.uint32)
