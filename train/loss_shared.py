"""The part of the head loss that rows share.

In: what each row takes of which distribution u. Out: for each row the mean logit under u, and the gradients of it.

There are two ways to them, both exact. With products of the student's head and the distributions, made once for the
call, a row's mean logit is a dot product of its state, h @ (W.T @ u). Or it is one of its logits, z @ u: rows then come
in the order of their distributions, so that each u is read once for many rows of a chunk.

Legend: N rows, C rows of a chunk, V vocabulary, D width, U distributions that occur.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from train.loss_targets import SharedPart

CPU_ROWS_PER_PRODUCT = 40
"""A processor makes the products with one distribution in the time that the passes of about so many rows take (measured
at V = 49,152 and D = 576 with float32)."""


class SharedProducts:
    """Mean logits under shared distributions, and the sums that their gradients are made of."""

    def __init__(
        self, shared: SharedPart, active_rows: Tensor, weight_VD: Tensor, bias_V: Tensor | None, piece_rows: int
    ) -> None:
        """Take the head's real rows, in the precision of sums; ``piece_rows`` distributions are gathered at a time."""
        self._probs_CV, self._piece_rows = shared.tails.probs_CV, piece_rows
        used, inverse = shared.tail_N[active_rows].unique(return_inverse=True)
        self._used_U = used
        self._at_N = torch.zeros_like(shared.tail_N).index_put_((active_rows,), inverse)
        self._head_UD = weight_VD.new_zeros(len(used), weight_VD.shape[1])
        self._bias_U = weight_VD.new_zeros(len(used))
        for piece, probs_UV in self._pieces(weight_VD.dtype):
            self._head_UD[piece] = probs_UV @ weight_VD
            if bias_V is not None:
                self._bias_U[piece] = probs_UV @ bias_V
        self._sum_UD, self._sum_U = torch.zeros_like(self._head_UD), torch.zeros_like(self._bias_U)

    def _pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self._used_U), self._piece_rows):
            piece = slice(start, min(start + self._piece_rows, len(self._used_U)))
            yield piece, self._probs_CV[self._used_U[piece]].to(dtype)

    def logits(self, rows_C: Tensor, hidden_CD: Tensor) -> Tensor:
        """The mean of each row's logits, at temperature 1, under its shared distribution [C]."""
        at_C = self._at_N[rows_C]
        return (hidden_CD * self._head_UD[at_C]).sum(dim=1) + self._bias_U[at_C]

    def pull(self, rows_C: Tensor, hidden_CD: Tensor, scale_C: Tensor) -> Tensor:
        """Gradient of ``scale_C`` times those logits on the hidden states [C, D]; the head's is kept for the end."""
        at_C, scale_C1 = self._at_N[rows_C], scale_C.unsqueeze(1)
        self._sum_UD.index_add_(0, at_C, scale_C1 * hidden_CD)
        self._sum_U.index_add_(0, at_C, scale_C)
        return scale_C1 * self._head_UD[at_C]

    def add_head_gradients(self, grad_weight_VD: Tensor | None, grad_bias_V: Tensor | None) -> None:
        """Add the gradients of all that was pulled to those of the head, which may have padded rows."""
        for piece, probs_UV in self._pieces(self._sum_UD.dtype):
            if grad_weight_VD is not None:
                grad_weight_VD[: probs_UV.shape[1]].addmm_(probs_UV.T, self._sum_UD[piece])
            if grad_bias_V is not None:
                grad_bias_V[: probs_UV.shape[1]].addmv_(probs_UV.T, self._sum_U[piece])


class SharedRuns:
    """The same without products: rows of one distribution stand together, and are met in runs."""

    def __init__(self, shared: SharedPart) -> None:
        self._probs_CV, self._tail_N = shared.tails.probs_CV, shared.tail_N

    def logits(self, rows_C: Tensor, logits_CV: Tensor) -> Tensor:
        """The mean of each row's logits under its shared distribution [C]."""
        means_C = logits_CV.new_empty(len(rows_C))
        for run, probs_V in self._runs(rows_C, logits_CV.dtype):
            torch.mv(logits_CV[run], probs_V, out=means_C[run])
        return means_C

    def add_gradient(self, rows_C: Tensor, grad_CV: Tensor, scale_C: Tensor) -> None:
        """Add the gradient of ``scale_C`` times those means to that on the logits."""
        for run, probs_V in self._runs(rows_C, grad_CV.dtype):
            grad_CV[run].addcmul_(scale_C[run].unsqueeze(1), probs_V)

    def _runs(self, rows_C: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        tails_R, counts_R = self._tail_N[rows_C].unique_consecutive(return_counts=True)
        start = 0
        for tail, count in zip(tails_R.tolist(), counts_R.tolist(), strict=True):
            yield slice(start, start + count), self._probs_CV[tail].to(dtype)
            start += count


def in_runs(shared: SharedPart, active_rows: Tensor) -> Tensor:
    """The rows, those of one distribution beside each other."""
    return active_rows[shared.tail_N[active_rows].argsort(stable=True)]


def products_pay(shared: SharedPart, active_rows: Tensor) -> bool:
    """Whether products with the distributions cost less than a pass over each row's logits."""
    if active_rows.device.type != "cpu":
        # Runs are many small kernels there.
        return True
    return len(active_rows) > CPU_ROWS_PER_PRODUCT * len(shared.tail_N[active_rows].unique())
