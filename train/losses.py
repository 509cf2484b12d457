"""Losses of a student against cached targets.

In: hidden states that feed the student's output head, the head itself, and a cache's sparse targets, labels and
pooled hidden states. Out: differentiable totals and detached sums, in nats. The head loss takes rows in chunks and
works out its gradient on the way forward, so that logits exist for one chunk of rows at a time.

Legend: B batch, T time, N rows (B x T), C rows of a chunk, V vocabulary, K kept, D width, W windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cache_spec.errors import BadInputError

NO_LABEL = -100
TailTreatment = Literal["bucket", "renormalise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets:
    """What the teacher said at N positions; ids within one row are distinct."""

    head_ids_NK: Tensor
    """int64, the K most probable tokens."""
    head_logprobs_NK: Tensor
    """float32, their log-probabilities (nats) at temperature 1."""
    log_normaliser_N: Tensor
    """float32, logsumexp(log-probabilities / temperature) over the whole vocabulary, at the training temperature."""
    log_tail_mass_N: Tensor
    """float32, log of the mass outside the head at the training temperature; -inf where the tail is empty."""


class HeadLoss(NamedTuple):
    """The weighted head loss and its terms, 0-dim tensors."""

    total: Tensor
    """Differentiable: kl_scale * kl_sum + ce_scale * ce_sum."""
    kl_sum: Tensor
    """Detached: squared temperature times the sum of KL over the masked rows, nats (0 if kl_scale is 0)."""
    ce_sum: Tensor
    """Detached: the sum of cross-entropy at temperature 1 over the labelled rows, nats (0 if ce_scale is 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    temperature: float
    kl_scale: float
    ce_scale: float
    tail: TailTreatment
    chunk_rows: int
    vocab_size: int
    wants_gradient: bool


class _ChunkTerms(NamedTuple):
    kl_sum: Tensor
    ce_sum: Tensor
    grad_CV: Tensor | None


class _Computed(NamedTuple):
    kl_sum: Tensor
    ce_sum: Tensor
    grad_hidden_ND: Tensor | None
    grad_weight_VD: Tensor | None
    grad_bias_V: Tensor | None


def head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    targets: SparseTargets,
    labels_N: Tensor,
    kl_mask_N: Tensor,
    temperature: float,
    kl_scale: float,
    ce_scale: float,
    tail: TailTreatment = "bucket",
    chunk_rows: int,
    vocab_size: int | None = None,
) -> HeadLoss:
    """Distil sparse teacher targets, and next-token labels, into an output head, ``chunk_rows`` rows at a time.

    Dense equivalent, with q = softmax(z / T), p the teacher at T on its head and m the mass of its tail:
        z = hidden @ weight[:vocab_size].T + bias;  kl = sum_head(p * log(p / q)) + m * log(m / (1 - sum_head(q)))
        total = kl_scale * T**2 * sum(kl[mask]) + ce_scale * F.cross_entropy(z, labels, reduction="sum")

    With ``tail="renormalise"``, p over the head is rescaled to sum to one and the tail term is left out, the biased
    baseline. ``labels_N`` is int64 with -100 where there is none; ``kl_mask_N`` is bool. Rows with neither are not
    computed, nor is a term whose scale is 0. Matrix products run in the inputs' dtype (or autocast's), everything else
    in float32, or in float64 for float64 inputs. The gradient is computed in the forward pass, so it cannot be
    differentiated again. Where the student gives the whole tail less than exp(-87) of its largest probability, the
    tail's gradient is zero.

    Raises:
        BadInputError: mismatched shapes, an id outside the vocabulary, a bad temperature, scale or chunk.
    """
    settings = _Settings(
        temperature=temperature,
        kl_scale=kl_scale,
        ce_scale=ce_scale,
        tail=tail,
        chunk_rows=chunk_rows,
        vocab_size=weight_VD.shape[0] if vocab_size is None else vocab_size,
        wants_gradient=torch.is_grad_enabled(),
    )
    _check_settings(settings)
    _check_shapes(hidden_ND, weight_VD, bias_V, targets, labels_N, kl_mask_N, settings.vocab_size)
    inputs = (hidden_ND, weight_VD, bias_V, targets, labels_N, kl_mask_N, settings)
    return HeadLoss(*_HeadLossFunction.apply(*inputs))  # type: ignore[no-untyped-call]


def _keeps_graph() -> bool:
    """Whether the backward pass that is running was called with ``retain_graph``; True where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


class _HeadLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets: SparseTargets,
        labels_N: Tensor,
        kl_mask_N: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = tuple(bool(n) and settings.wants_gradient for n in ctx.needs_input_grad[:3])
        computed = _run_chunks(hidden_ND, weight_VD, bias_V, targets, labels_N, kl_mask_N, settings, needed)
        ctx.save_for_backward(computed.grad_hidden_ND, computed.grad_weight_VD, computed.grad_bias_V)
        ctx.unit = _unit(settings)
        ctx.dtypes = tuple(None if part is None else part.dtype for part in (hidden_ND, weight_VD, bias_V))
        ctx.mark_non_differentiable(computed.kl_sum, computed.ce_sum)
        total = settings.kl_scale * computed.kl_sum + settings.ce_scale * computed.ce_sum
        return total, computed.kl_sum, computed.ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The unit is applied here: gradients times 1 / count would underflow in float16 before a loss scaler sees them.
        scale = grad_total * ctx.unit
        # The weight's is as large as the head: it is scaled in place, unless the graph is kept for another backward.
        multiply = torch.mul if _keeps_graph() else torch.Tensor.mul_
        gradients = tuple(
            None if grad is None else multiply(grad, scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None, None)


def _unit(settings: _Settings) -> float:
    """The larger of the two scales: stored gradients are relative to it."""
    return max(settings.kl_scale, settings.ce_scale)


def _matmul_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    device_type = hidden_ND.device.type
    if hidden_ND.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(hidden_ND.dtype, weight_VD.dtype)


def _run_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: SparseTargets,
    labels_N: Tensor,
    kl_mask_N: Tensor,
    settings: _Settings,
    needed: tuple[bool, ...],
) -> _Computed:
    """Sums over all rows, and gradients divided by the unit, for those of (hidden, weight, bias) that are needed."""
    num_real, unit = settings.vocab_size, _unit(settings)
    dtype = _matmul_dtype(hidden_ND, weight_VD)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    device = hidden_ND.device
    kl_sum, ce_sum = torch.zeros((), dtype=wide, device=device), torch.zeros((), dtype=wide, device=device)
    grad_hidden_ND = torch.zeros_like(hidden_ND) if needed[0] else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needed[1] else None
    grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if needed[2] and bias_V is not None else None

    active_N = torch.zeros_like(kl_mask_N)
    if settings.kl_scale > 0:
        active_N |= kl_mask_N
    if settings.ce_scale > 0:
        active_N |= labels_N != NO_LABEL
    # Autocast would cast the whole head again for each chunk: the casts are made once, by hand.
    with torch.autocast(device_type=device.type, enabled=False):
        real_VD = weight_VD[:num_real].to(dtype)
        real_bias_V = None if bias_V is None else bias_V[:num_real].to(dtype)
        active_rows = active_N.nonzero().squeeze(1)
        for start in range(0, len(active_rows), settings.chunk_rows):
            rows_C = active_rows[start : start + settings.chunk_rows]
            hidden_CD = hidden_ND[rows_C].to(dtype)
            terms = _chunk_terms(
                F.linear(hidden_CD, real_VD, real_bias_V).to(wide),
                SparseTargets(
                    head_ids_NK=targets.head_ids_NK[rows_C],
                    head_logprobs_NK=targets.head_logprobs_NK[rows_C].to(wide),
                    log_normaliser_N=targets.log_normaliser_N[rows_C].to(wide),
                    log_tail_mass_N=targets.log_tail_mass_N[rows_C].to(wide),
                ),
                labels_N[rows_C],
                kl_mask_N[rows_C],
                settings,
                relative_kl=settings.kl_scale / unit,
                relative_ce=settings.ce_scale / unit,
                wants_gradient=any(needed),
            )
            kl_sum += terms.kl_sum
            ce_sum += terms.ce_sum
            if terms.grad_CV is None:
                continue
            if grad_bias_V is not None:
                grad_bias_V[:num_real] += terms.grad_CV.sum(dim=0)
            grad_CV = terms.grad_CV.to(dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows_C] = (grad_CV @ real_VD).to(hidden_ND.dtype)
            if grad_weight_VD is not None and dtype == wide:
                grad_weight_VD[:num_real].addmm_(grad_CV.T, hidden_CD)
            elif grad_weight_VD is not None:
                grad_weight_VD[:num_real] += grad_CV.T @ hidden_CD
    return _Computed(kl_sum, ce_sum, grad_hidden_ND, grad_weight_VD, grad_bias_V)


def _chunk_terms(
    logits_CV: Tensor,
    targets: SparseTargets,
    labels_C: Tensor,
    kl_mask_C: Tensor,
    settings: _Settings,
    *,
    relative_kl: float,
    relative_ce: float,
    wants_gradient: bool,
) -> _ChunkTerms:
    """Both sums over one chunk, and the gradient on its logits; the logits are overwritten."""
    temperature = settings.temperature
    logits_CV = logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))  # no term changes, and no exp overflows
    kl_sum, ce_sum = logits_CV.new_zeros(()), logits_CV.new_zeros(())
    label_C1 = labels_C.clamp(min=0).unsqueeze(1)
    labelled_C1 = (labels_C != NO_LABEL).unsqueeze(1)
    label_logit_C1 = logits_CV.gather(1, label_C1)
    ce_weight_C1 = relative_ce * labelled_C1.to(logits_CV.dtype)
    shares_softmax = temperature == 1.0 and relative_ce > 0
    grad_CV: Tensor | None = None

    if relative_kl > 0:
        head_ids_CK = targets.head_ids_NK
        head_logits_CK = logits_CV.gather(1, head_ids_CK) / temperature
        exp_CV = logits_CV.div(temperature) if relative_ce > 0 and not shares_softmax else logits_CV.div_(temperature)
        exp_CV = exp_CV.exp_()
        # The tail is what remains when the head is set to zero: 1 - sum(head) would cancel.
        head_exp_CK = exp_CV.gather(1, head_ids_CK)
        tail_C1 = exp_CV.scatter_(1, head_ids_CK, 0.0).sum(dim=1, keepdim=True)
        sum_C1 = head_exp_CK.sum(dim=1, keepdim=True) + tail_C1
        tail_C1 = tail_C1.clamp(min=torch.finfo(tail_C1.dtype).tiny)

        p_CK, log_p_CK, mass_C1, log_mass_C1 = _teacher(targets, kl_mask_C, settings)
        log_q_CK = head_logits_CK - sum_C1.log()
        kl_sum = torch.where(p_CK > 0, p_CK * (log_p_CK - log_q_CK), 0.0).sum()
        log_q_tail_C1 = tail_C1.log() - sum_C1.log()
        kl_sum = kl_sum + torch.where(mass_C1 > 0, mass_C1 * (log_mass_C1 - log_q_tail_C1), 0.0).sum()
        kl_sum = temperature**2 * kl_sum

        if wants_gradient:
            # T**2 of the loss times 1/T of z/T leaves T. A quantised head and its tail need not sum to exactly one.
            scale = relative_kl * temperature
            all_mass_C1 = p_CK.sum(dim=1, keepdim=True) + mass_C1
            q_CK = head_exp_CK / sum_C1
            head_grad_CK = scale * (all_mass_C1 * q_CK - p_CK)
            per_tail_exp_C1 = scale * (all_mass_C1 / sum_C1 - mass_C1 / tail_C1)
            if shares_softmax:
                head_grad_CK = head_grad_CK + ce_weight_C1 * q_CK
                per_tail_exp_C1 = per_tail_exp_C1 + ce_weight_C1 / sum_C1
            grad_CV = exp_CV.mul_(per_tail_exp_C1).scatter_(1, head_ids_CK, head_grad_CK)
        if shares_softmax:
            ce_sum = torch.where(labelled_C1, sum_C1.log() - label_logit_C1, 0.0).sum()

    if relative_ce > 0:
        if not (shares_softmax and relative_kl > 0):
            exp_CV = logits_CV.exp_()
            sum_C1 = exp_CV.sum(dim=1, keepdim=True)
            ce_sum = torch.where(labelled_C1, sum_C1.log() - label_logit_C1, 0.0).sum()
            if wants_gradient:
                per_exp_C1 = ce_weight_C1 / sum_C1
                grad_CV = exp_CV.mul_(per_exp_C1) if grad_CV is None else grad_CV.addcmul_(exp_CV, per_exp_C1)
        if grad_CV is not None:
            grad_CV = grad_CV.scatter_add_(1, label_C1, -ce_weight_C1)
    return _ChunkTerms(kl_sum, ce_sum, grad_CV)


def _teacher(targets: SparseTargets, kl_mask_C: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p over the head, its log, mass of the tail, its log) at the temperature; p and mass are 0 in unmasked rows."""
    log_p_CK = targets.head_logprobs_NK / settings.temperature
    mask_C1 = kl_mask_C.unsqueeze(1)
    if settings.tail == "renormalise":
        log_p_CK = log_p_CK.log_softmax(dim=1)
        log_mass_C1 = torch.full_like(log_p_CK[:, :1], -torch.inf)
    else:
        log_p_CK = log_p_CK - targets.log_normaliser_N.unsqueeze(1)
        log_mass_C1 = targets.log_tail_mass_N.unsqueeze(1)
    p_CK = torch.where(mask_C1, log_p_CK.exp(), 0.0)
    mass_C1 = torch.where(mask_C1, log_mass_C1.exp(), 0.0)
    return p_CK, log_p_CK, mass_C1, log_mass_C1


def _check_settings(settings: _Settings) -> None:
    scales = (settings.kl_scale, settings.ce_scale)
    if not math.isfinite(settings.temperature) or settings.temperature <= 0:
        raise BadInputError("bad-temperature", "temperature", expected="a number above 0", found=settings.temperature)
    if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
        found = f"kl {settings.kl_scale}, ce {settings.ce_scale}"
        raise BadInputError("bad-loss-weight", "loss weights", expected="numbers of at least 0", found=found)
    if settings.chunk_rows < 1:
        raise BadInputError("bad-chunk-rows", "chunk_rows", expected="at least 1", found=settings.chunk_rows)
    if settings.tail not in ("bucket", "renormalise"):
        raise BadInputError("bad-tail", "tail", expected="'bucket' or 'renormalise'", found=repr(settings.tail))


def _check_shapes(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: SparseTargets,
    labels_N: Tensor,
    kl_mask_N: Tensor,
    vocab_size: int,
) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or targets.head_ids_NK.ndim != 2:
        found = [tuple(t.shape) for t in (hidden_ND, weight_VD, targets.head_ids_NK)]
        raise BadInputError("bad-shape", "hidden, weight, head_ids", expected="[N, D], [V, D], [N, K]", found=found)
    num_rows, width = hidden_ND.shape
    kept, num_head_rows = targets.head_ids_NK.shape[1], weight_VD.shape[0]
    expected = {
        "weight": (weight_VD, (num_head_rows, width)),
        "bias": (bias_V, (num_head_rows,)),
        "head_ids": (targets.head_ids_NK, (num_rows, kept)),
        "head_logprobs": (targets.head_logprobs_NK, (num_rows, kept)),
        "log_normaliser": (targets.log_normaliser_N, (num_rows,)),
        "log_tail_mass": (targets.log_tail_mass_N, (num_rows,)),
        "labels": (labels_N, (num_rows,)),
        "kl_mask": (kl_mask_N, (num_rows,)),
    }
    for place, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BadInputError("bad-shape", place, expected=shape, found=tuple(tensor.shape))
    if not 1 <= vocab_size <= num_head_rows:
        raise BadInputError("bad-vocabulary", "vocab_size", expected=f"1 to {num_head_rows}", found=vocab_size)
    if not 1 <= kept <= vocab_size:
        raise BadInputError("bad-shape", "head_ids", expected=f"1 to {vocab_size} kept", found=kept)
    if num_rows == 0:
        return
    # On a GPU an id out of range would end the process in an assertion with no place and no value.
    largest = int(torch.maximum(targets.head_ids_NK.amax(), labels_N.amax()))
    if largest >= vocab_size:
        raise BadInputError("id-outside-vocabulary", "targets", expected=f"ids below {vocab_size}", found=largest)


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


def cosine_sum(student_BWD: Tensor, teacher_BWD: Tensor, mask_BW: Tensor) -> Tensor:
    """Sum over the masked windows of 1 - cos: ``(1 - F.cosine_similarity(s, t, dim=-1))[mask].sum()``."""
    cosine_BW = F.cosine_similarity(student_BWD, teacher_BWD.to(student_BWD.dtype), dim=-1)
    return torch.where(mask_BW, 1 - cosine_BW, 0.0).sum()


def mse_sum(student_BWD: Tensor, teacher_BWD: Tensor, mask_BW: Tensor) -> Tensor:
    """Sum over the masked windows of the mean squared difference: ``(s - t).square().mean(-1)[mask].sum()``."""
    error_BW = (student_BWD - teacher_BWD.to(student_BWD.dtype)).square().mean(dim=-1)
    return torch.where(mask_BW, error_BW, 0.0).sum()
