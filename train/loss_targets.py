"""What the head loss pulls a student to, in three forms, and how heads and points become one of them.

In: cached heads, tails and points as tensors, at one temperature. Out: ``BucketTargets``, ``LinearTargets`` or
``DenseTargets`` for ``head_loss``. Sums are kept such that head and tail make one without being rescaled.

Legend: N rows, V vocabulary, K kept, J points, C shared distributions, D teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cache_spec.errors import BadInputError

NO_LABEL = -100
_PIECE_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketTargets:
    """A distribution over K tokens and one bucket for all the others; each row's probabilities sum to one."""

    ids_NK: Tensor
    """int64, distinct within a row."""
    log_probs_NK: Tensor
    """float32, nats, at the training temperature."""
    log_rest_N: Tensor
    """float32, log of the bucket's probability; -inf where it is empty."""

    def rows(self, rows_C: Tensor, dtype: torch.dtype) -> BucketTargets:
        """Some rows, with their floats in ``dtype``."""
        return BucketTargets(
            ids_NK=self.ids_NK[rows_C],
            log_probs_NK=self.log_probs_NK[rows_C].to(dtype),
            log_rest_N=self.log_rest_N[rows_C].to(dtype),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTails:
    """Distributions over the vocabulary that many rows have in common."""

    probs_CV: Tensor
    """float32, each row sums to one."""
    self_nats_C: Tensor
    """float32, the sum of u * log(u) of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPart:
    """What each row takes of a shared distribution."""

    tails: SharedTails
    tail_N: Tensor
    """int64, which of the distributions is the row's u."""
    weight_N: Tensor
    """float32, how much of it."""

    def rows(self, rows_C: Tensor, dtype: torch.dtype) -> SharedPart:
        """Some rows, with their weights in ``dtype``; the distributions stay as they are."""
        return SharedPart(tails=self.tails, tail_N=self.tail_N[rows_C], weight_N=self.weight_N[rows_C].to(dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTargets:
    """The distribution sum_j weights_j * [v = ids_j] + shared weight * u(v), weights being signed."""

    ids_NJ: Tensor
    """int64; an id may come more than once in a row: weights add up."""
    weights_NJ: Tensor
    """float32."""
    self_nats_N: Tensor
    """float32, the sum of p * log(p) over the vocabulary, which makes a divergence of a cross-entropy."""
    shared: SharedPart | None = None

    def rows(self, rows_C: Tensor, dtype: torch.dtype) -> LinearTargets:
        """Some rows, with their floats in ``dtype``."""
        return LinearTargets(
            ids_NJ=self.ids_NJ[rows_C],
            weights_NJ=self.weights_NJ[rows_C].to(dtype),
            self_nats_N=self.self_nats_N[rows_C].to(dtype),
            shared=None if self.shared is None else self.shared.rows(rows_C, dtype),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTargets:
    """The teacher's full distribution, softmax((hidden @ weight.T + bias) / T); it is made for a chunk at a time."""

    hidden_ND: Tensor
    """Last hidden state of the teacher, any float dtype."""
    weight_VD: Tensor
    """The teacher's output head, without padded rows."""
    bias_V: Tensor | None

    def rows(self, rows_C: Tensor, dtype: torch.dtype) -> DenseTargets:
        """Some rows, with their states in ``dtype``; the head stays as it is."""
        hidden_CD = self.hidden_ND[rows_C].to(dtype)
        return DenseTargets(hidden_ND=hidden_CD, weight_VD=self.weight_VD, bias_V=self.bias_V)


HeadLossTargets = BucketTargets | LinearTargets | DenseTargets


class HeadRows(NamedTuple):
    """What a cache with heads says at N positions."""

    ids_NK: Tensor
    """int64, distinct within a row."""
    logprobs_NK: Tensor
    """float32, nats, at temperature 1."""
    tail_log_odds_N: Tensor
    """float32, nats, at the training temperature; -inf where nothing is outside the head."""


def shared_tails(probs_CV: Tensor) -> SharedTails:
    """Shared distributions with their sums of u * log(u)."""
    # There may be thousands: few are multiplied at a time.
    self_nats = [torch.xlogy(piece, piece).sum(dim=1) for piece in probs_CV.split(_PIECE_ROWS)]
    return SharedTails(probs_CV=probs_CV, self_nats_C=torch.cat(self_nats))


def uniform_tail(vocab_size: int, dtype: torch.dtype = torch.float32) -> SharedTails:
    """The uniform distribution, as the only shared one."""
    return shared_tails(torch.full((1, vocab_size), 1 / vocab_size, dtype=dtype))


def bucket(head: HeadRows, temperature: float) -> BucketTargets:
    """The head at the temperature, and one bucket of the mass outside it."""
    log_head_N1 = F.logsigmoid(-head.tail_log_odds_N).unsqueeze(1)
    return BucketTargets(
        ids_NK=head.ids_NK,
        log_probs_NK=(head.logprobs_NK / temperature).log_softmax(dim=1) + log_head_N1,
        log_rest_N=F.logsigmoid(head.tail_log_odds_N),
    )


def renormalised(head: HeadRows, temperature: float) -> LinearTargets:
    """The head rescaled to sum to one, the tail forgotten: the biased baseline."""
    return points(head.ids_NK, (head.logprobs_NK / temperature).softmax(dim=1))


def points(ids_NJ: Tensor, probs_NJ: Tensor) -> LinearTargets:
    """A distribution on distinct tokens; entries of probability 0 are padding."""
    return LinearTargets(ids_NJ=ids_NJ, weights_NJ=probs_NJ, self_nats_N=torch.xlogy(probs_NJ, probs_NJ).sum(dim=1))


def gold(head: HeadRows, temperature: float, labels_N: Tensor) -> LinearTargets:
    """The head, with the mass outside it put on the label, whether that is in the head or not.

    Rows without a label mean nothing.
    """
    shape_NK = (head.logprobs_NK / temperature).softmax(dim=1)
    mass_N1 = head.tail_log_odds_N.sigmoid().unsqueeze(1)
    probs_NK = torch.sigmoid(-head.tail_log_odds_N).unsqueeze(1) * shape_NK
    label_N1 = labels_N.clamp(min=0).unsqueeze(1)
    is_label_NK = head.ids_NK == label_N1
    dense_NK = probs_NK + is_label_NK * mass_N1
    outside_N = torch.where(is_label_NK.any(dim=1), 0.0, torch.xlogy(mass_N1, mass_N1).squeeze(1))
    return LinearTargets(
        ids_NJ=torch.cat([head.ids_NK, label_N1], dim=1),
        weights_NJ=torch.cat([probs_NK, mass_N1], dim=1),
        self_nats_N=torch.xlogy(dense_NK, dense_NK).sum(dim=1) + outside_N,
    )


def spread(
    head: HeadRows,
    temperature: float,
    tails: SharedTails,
    tail_N: Tensor,
    residual: tuple[Tensor, Tensor] | None = None,
) -> LinearTargets:
    """The head, with the mass m outside it spread as a shared distribution u: m * u(v) / (1 - u(head)) for v outside.

    ``residual`` holds ids and signed weights, [N, S] each, that are added. They are left out of ``self_nats_N``: the
    loss is then, on average over draws, the divergence but for a constant that no student changes.
    """
    shape_NK = (head.logprobs_NK / temperature).softmax(dim=1)
    u_NK = tails.probs_CV[tail_N.unsqueeze(1), head.ids_NK].to(shape_NK.dtype)
    outside_N = 1 - u_NK.sum(dim=1)
    # Where nearly all of u lies in the head, what is left of it is rounding: such a row has a head alone.
    has_tail_N = outside_N > torch.finfo(shape_NK.dtype).eps ** 0.5
    mass_N = torch.where(has_tail_N, head.tail_log_odds_N.sigmoid(), 0.0)
    in_head_N1 = torch.where(has_tail_N, torch.sigmoid(-head.tail_log_odds_N), 1.0).unsqueeze(1)
    probs_NK = in_head_N1 * shape_NK
    weight_N = mass_N / torch.where(has_tail_N, outside_N, 1.0)
    tail_nats_N = tails.self_nats_C[tail_N].to(shape_NK.dtype) - torch.xlogy(u_NK, u_NK).sum(dim=1)
    self_nats_N = torch.xlogy(probs_NK, probs_NK).sum(dim=1) + torch.xlogy(mass_N, weight_N) + weight_N * tail_nats_N
    ids_NJ, weights_NJ = head.ids_NK, probs_NK - weight_N.unsqueeze(1) * u_NK
    if residual is not None:
        ids_NJ = torch.cat([ids_NJ, residual[0]], dim=1)
        weights_NJ = torch.cat([weights_NJ, residual[1].to(weights_NJ.dtype)], dim=1)
    return LinearTargets(
        ids_NJ=ids_NJ,
        weights_NJ=weights_NJ,
        self_nats_N=self_nats_N,
        shared=SharedPart(tails=tails, tail_N=tail_N, weight_N=weight_N),
    )


class Bounded(NamedTuple):
    """Indices whose largest must stay below a bound."""

    place: str
    indices: Tensor
    bound: int


def check_targets(targets: HeadLossTargets, num_rows: int, vocab_size: int) -> list[Bounded]:
    """Refuse shapes that do not fit, with BadInputError ``bad-shape``, and return the indices to be checked.

    Their values are left to the caller, which waits for the device once for all of them.
    """
    if isinstance(targets, DenseTargets):
        width = targets.hidden_ND.shape[-1]
        check_shapes(
            {
                "teacher hidden": (targets.hidden_ND, (num_rows, width)),
                "teacher head": (targets.weight_VD, (vocab_size, width)),
                "teacher bias": (targets.bias_V, (vocab_size,)),
            }
        )
        return []
    if isinstance(targets, BucketTargets):
        kept = targets.ids_NK.shape[-1]
        check_shapes(
            {
                "head ids": (targets.ids_NK, (num_rows, kept)),
                "head log-probabilities": (targets.log_probs_NK, (num_rows, kept)),
                "rest": (targets.log_rest_N, (num_rows,)),
            }
        )
        if not 1 <= kept <= vocab_size:
            raise BadInputError("bad-shape", "head ids", expected=f"1 to {vocab_size} kept", found=kept)
        return [Bounded("head ids", targets.ids_NK, vocab_size)]
    kept = targets.ids_NJ.shape[-1]
    check_shapes(
        {
            "ids": (targets.ids_NJ, (num_rows, kept)),
            "weights": (targets.weights_NJ, (num_rows, kept)),
            "self nats": (targets.self_nats_N, (num_rows,)),
        }
    )
    bounded = [Bounded("ids", targets.ids_NJ, vocab_size)]
    if targets.shared is not None:
        num_tails = len(targets.shared.tails.probs_CV)
        check_shapes(
            {
                "tails": (targets.shared.tails.probs_CV, (num_tails, vocab_size)),
                "tail": (targets.shared.tail_N, (num_rows,)),
                "tail weight": (targets.shared.weight_N, (num_rows,)),
            }
        )
        bounded.append(Bounded("tail", targets.shared.tail_N, num_tails))
    return bounded


def check_shapes(expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Refuse, with BadInputError ``bad-shape``, a tensor that is there and has not the shape beside it."""
    for place, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BadInputError("bad-shape", place, expected=shape, found=tuple(tensor.shape))
