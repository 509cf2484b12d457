"""The loss of a student's output head against cached targets and labels.

In: hidden states that feed the student's output head, the head itself, targets in one of three forms, and labels. Out:
a differentiable total and detached sums, in nats. Rows are taken in chunks and the gradient is worked out on the way
forward, so that logits exist for one chunk of rows at a time.

Legend: N rows (blocks x time), C rows of a chunk, V vocabulary, D width, U shared distributions that occur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cache_spec.errors import BadInputError
from train.loss_chunks import Pull, TeacherLogits, chunk_terms, softcap_
from train.loss_divergences import FORWARD_KL, Divergence
from train.loss_shared import SharedProducts, SharedRuns, in_runs, products_pay
from train.loss_targets import (
    NO_LABEL,
    Bounded,
    BucketTargets,
    DenseTargets,
    HeadLossTargets,
    LinearTargets,
    check_shapes,
    check_targets,
)


class HeadLoss(NamedTuple):
    """The weighted head loss and its terms, 0-dim tensors."""

    total: Tensor
    """Differentiable: kl_scale * kl_sum + ce_scale * ce_sum."""
    kl_sum: Tensor
    """Detached: squared temperature times the sum of the divergence over the masked rows, nats (0 if kl_scale is 0)."""
    ce_sum: Tensor
    """Detached: the sum of cross-entropy at temperature 1 over the labelled rows, nats (0 if ce_scale is 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    temperature: float
    kl_scale: float
    ce_scale: float
    chunk_rows: int
    vocab_size: int
    divergence: Divergence
    softcap: float | None
    wants_gradient: bool

    @property
    def unit(self) -> float:
        """The larger of the two scales: stored gradients are relative to it."""
        return max(self.kl_scale, self.ce_scale) or 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gradients:
    """Divided by the unit; None for what needs none."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    def add(self, rows_C: Tensor, grad_CV: Tensor, hidden_CD: Tensor, head_VD: Tensor) -> None:
        """Add what a chunk's gradient on its logits, float32 or float64, comes to."""
        num_real = grad_CV.shape[1]
        if self.bias_V is not None:
            self.bias_V[:num_real] += grad_CV.sum(dim=0)
        low_CV = grad_CV.to(hidden_CD.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[rows_C] += (low_CV @ head_VD).to(self.hidden_ND.dtype)
        if self.weight_VD is not None and low_CV.dtype == self.weight_VD.dtype:
            self.weight_VD[:num_real].addmm_(low_CV.T, hidden_CD)
        elif self.weight_VD is not None:
            self.weight_VD[:num_real] += low_CV.T @ hidden_CD


class _Head(NamedTuple):
    weight_VD: Tensor
    bias_V: Tensor | None

    def to(self, dtype: torch.dtype) -> _Head:
        return _Head(self.weight_VD.to(dtype), None if self.bias_V is None else self.bias_V.to(dtype))

    def logits(self, hidden_CD: Tensor) -> Tensor:
        return F.linear(hidden_CD, self.weight_VD, self.bias_V)


def head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    targets: HeadLossTargets,
    labels_N: Tensor,
    kl_mask_N: Tensor,
    temperature: float,
    kl_scale: float,
    ce_scale: float,
    chunk_rows: int,
    vocab_size: int | None = None,
    divergence: Divergence = FORWARD_KL,
    softcap: float | None = None,
) -> HeadLoss:
    """Distil a teacher's targets, and next-token labels, into an output head, ``chunk_rows`` rows at a time.

    Dense equivalent, with q = softmax(z / T) and p the targets, which hold for the temperature already:
        z = hidden @ weight[:vocab_size].T + bias;  kl = sum_v(p * log(p / q))
        total = kl_scale * T**2 * sum(kl[mask]) + ce_scale * F.cross_entropy(z, labels, reduction="sum")

    For ``BucketTargets`` the sum is over the head and one bucket of all other tokens. Of ``LinearTargets``, whose
    weights may be negative, p * log(p) is what ``self_nats_N`` says. ``divergence`` puts another in the place of kl:
    ``js`` of ``LinearTargets`` makes them dense for a chunk and needs targets that are distributions; ``reverse`` does
    not take them, whose zeros would make it infinite. With a ``softcap`` z is softcap * tanh(z / softcap) of that.
    ``labels_N`` is int64 with -100 where there is none; ``kl_mask_N`` is bool. Rows with neither are not computed, nor
    is a term whose scale is 0. Matrix products of rows (the teacher's in ``DenseTargets`` too) run in the inputs' dtype
    or autocast's, everything else in float32, or in float64 for float64 inputs. The gradient is computed in the forward
    pass, so it cannot be differentiated again.
    Where the student gives the whole bucket less than the smallest float32, the bucket's gradient is zero.

    Raises:
        BadInputError: mismatched shapes, an id outside the vocabulary, a bad temperature, scale, divergence or chunk.
    """
    settings = _Settings(
        temperature=temperature,
        kl_scale=kl_scale,
        ce_scale=ce_scale,
        chunk_rows=chunk_rows,
        vocab_size=weight_VD.shape[0] if vocab_size is None else vocab_size,
        divergence=divergence,
        softcap=softcap,
        wants_gradient=torch.is_grad_enabled(),
    )
    _check_settings(settings, targets)
    _check_inputs(hidden_ND, weight_VD, bias_V, targets, labels_N, kl_mask_N, settings.vocab_size)
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
        targets: HeadLossTargets,
        labels_N: Tensor,
        kl_mask_N: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = tuple(bool(n) and settings.wants_gradient for n in ctx.needs_input_grad[:3])
        # Autocast would cast the whole head again for each chunk: the casts are made once, by hand.
        dtype = _matmul_dtype(hidden_ND, weight_VD)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gradients = _Gradients(
            hidden_ND=torch.zeros_like(hidden_ND) if needed[0] else None,
            weight_VD=torch.zeros_like(weight_VD, dtype=wide) if needed[1] else None,
            bias_V=torch.zeros_like(bias_V, dtype=wide) if needed[2] and bias_V is not None else None,
        )
        head = _Head(weight_VD[: settings.vocab_size], None if bias_V is None else bias_V[: settings.vocab_size])
        with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
            sums = _run_chunks(hidden_ND, head, targets, labels_N, kl_mask_N, settings, gradients, dtype)
        ctx.save_for_backward(gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        ctx.unit = settings.unit
        ctx.dtypes = tuple(None if part is None else part.dtype for part in (hidden_ND, weight_VD, bias_V))
        ctx.mark_non_differentiable(*sums)
        return settings.kl_scale * sums[0] + settings.ce_scale * sums[1], *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The unit is applied here: gradients times 1 / count would underflow in float16 before a loss scaler sees them.
        scale = grad_total * ctx.unit
        # The weight's is as large as the head: it is scaled in place, unless the graph is kept for another backward.
        multiply = torch.mul if _keeps_graph() else torch.Tensor.mul_
        scaled = tuple(
            None if grad is None else multiply(grad, scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


def _matmul_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    device_type = hidden_ND.device.type
    if hidden_ND.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(hidden_ND.dtype, weight_VD.dtype)


def _run_chunks(
    hidden_ND: Tensor,
    head: _Head,
    targets: HeadLossTargets,
    labels_N: Tensor,
    kl_mask_N: Tensor,
    settings: _Settings,
    gradients: _Gradients,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Sums of divergence and cross-entropy over all rows; their gradients are added to ``gradients``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wants_gradient = any(part is not None for part in (gradients.hidden_ND, gradients.weight_VD, gradients.bias_V))
    relative_kl, relative_ce = settings.kl_scale / settings.unit, settings.ce_scale / settings.unit
    kl_sum, ce_sum = (torch.zeros((), dtype=wide, device=hidden_ND.device) for _ in range(2))

    active_N = torch.zeros_like(kl_mask_N)
    if relative_kl > 0:
        active_N |= kl_mask_N
    if relative_ce > 0:
        active_N |= labels_N != NO_LABEL
    active_rows = active_N.nonzero().squeeze(1)
    products, runs, teacher = None, None, None
    part = targets.shared if isinstance(targets, LinearTargets) and settings.divergence.kind == "forward" else None
    if relative_kl > 0 and part is not None:
        if settings.softcap is None and products_pay(part, active_rows):
            products = SharedProducts(part, active_rows, *head.to(wide), settings.chunk_rows)
        else:
            runs, active_rows = SharedRuns(part), in_runs(part, active_rows)
    if relative_kl > 0 and isinstance(targets, DenseTargets):
        teacher = _Head(targets.weight_VD, targets.bias_V).to(dtype)
    head = head.to(dtype)

    for start in range(0, len(active_rows), settings.chunk_rows):
        rows_C = active_rows[start : start + settings.chunk_rows]
        hidden_CD, mask_C = hidden_ND[rows_C].to(dtype), kl_mask_N[rows_C]
        wide_CD = hidden_CD.to(wide)
        logits_CV = head.logits(hidden_CD).to(wide)
        slope_CV, shared_logit_C = None, None
        if settings.softcap is not None:
            slope_CV = softcap_(logits_CV, settings.softcap)
        if products is not None:
            shared_logit_C = products.logits(rows_C, wide_CD)
        elif runs is not None:
            shared_logit_C = runs.logits(rows_C, logits_CV)
        pull = Pull(
            targets=_rows(targets, teacher, rows_C, mask_C, settings.temperature, wide),
            shared_logit_C=shared_logit_C,
            labels_C=labels_N[rows_C],
            kl_mask_C=mask_C,
            temperature=settings.temperature,
            relative_kl=relative_kl,
            relative_ce=relative_ce,
            wants_gradient=wants_gradient,
            divergence=settings.divergence,
        )
        terms = chunk_terms(logits_CV, pull)
        kl_sum += terms.kl_sum
        ce_sum += terms.ce_sum
        if terms.grad_CV is not None and runs is not None and terms.shared_scale_C is not None:
            runs.add_gradient(rows_C, terms.grad_CV, terms.shared_scale_C)
        if terms.grad_CV is not None and slope_CV is not None:
            terms.grad_CV.mul_(slope_CV)
        if terms.grad_CV is not None:
            gradients.add(rows_C, terms.grad_CV, hidden_CD, head.weight_VD)
        if terms.grad_CV is not None and products is not None and terms.shared_scale_C is not None:
            grad_CD = products.pull(rows_C, wide_CD, terms.shared_scale_C)
            if gradients.hidden_ND is not None:
                gradients.hidden_ND[rows_C] += grad_CD.to(hidden_ND.dtype)
        # Or else they would still be there while the next chunk's are made.
        del logits_CV, slope_CV, pull, terms
    if products is not None and wants_gradient:
        products.add_head_gradients(gradients.weight_VD, gradients.bias_V)
    return kl_sum, ce_sum


def _rows(
    targets: HeadLossTargets,
    teacher: _Head | None,
    rows_C: Tensor,
    mask_C: Tensor,
    temperature: float,
    wide: torch.dtype,
) -> BucketTargets | LinearTargets | TeacherLogits | None:
    """What a chunk's rows are pulled to; None where the divergence has no weight."""
    if not isinstance(targets, DenseTargets):
        return targets.rows(rows_C, wide)
    if teacher is None:
        return None
    # What rows outside the mask hold may be anything.
    hidden_CD = torch.where(mask_C.unsqueeze(1), targets.hidden_ND[rows_C], 0.0).to(teacher.weight_VD.dtype)
    logits_CV = teacher.logits(hidden_CD).to(wide)
    return TeacherLogits(logits_CV if temperature == 1.0 else logits_CV.div_(temperature))


def _check_settings(settings: _Settings, targets: HeadLossTargets) -> None:
    settings.divergence.check()
    if settings.divergence.kind == "reverse" and isinstance(targets, LinearTargets):
        expected = "a head and a bucket, or a teacher's hidden states"
        raise BadInputError("bad-divergence", "divergence reverse", expected=expected, found="targets with zeros")
    scales = (settings.kl_scale, settings.ce_scale)
    if not math.isfinite(settings.temperature) or settings.temperature <= 0:
        raise BadInputError("bad-temperature", "temperature", expected="a number above 0", found=settings.temperature)
    if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
        found = f"kl {settings.kl_scale}, ce {settings.ce_scale}"
        raise BadInputError("bad-loss-weight", "loss weights", expected="numbers of at least 0", found=found)
    if settings.softcap is not None and not 0 < settings.softcap < math.inf:
        raise BadInputError("bad-softcap", "softcap", expected="a number above 0, or None", found=settings.softcap)
    if settings.chunk_rows < 1:
        raise BadInputError("bad-chunk-rows", "chunk_rows", expected="at least 1", found=settings.chunk_rows)


def _check_inputs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: HeadLossTargets,
    labels_N: Tensor,
    kl_mask_N: Tensor,
    vocab_size: int,
) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2:
        found = [tuple(t.shape) for t in (hidden_ND, weight_VD)]
        raise BadInputError("bad-shape", "hidden, weight", expected="[N, D], [V, D]", found=found)
    num_rows, width = hidden_ND.shape
    num_head_rows = weight_VD.shape[0]
    check_shapes(
        {
            "weight": (weight_VD, (num_head_rows, width)),
            "bias": (bias_V, (num_head_rows,)),
            "labels": (labels_N, (num_rows,)),
            "kl_mask": (kl_mask_N, (num_rows,)),
        }
    )
    if not 1 <= vocab_size <= num_head_rows:
        raise BadInputError("bad-vocabulary", "vocab_size", expected=f"1 to {num_head_rows}", found=vocab_size)
    bounded = [*check_targets(targets, num_rows, vocab_size), Bounded("labels", labels_N, vocab_size)]
    bounded = [each for each in bounded if each.indices.numel()]
    if not bounded:
        return
    # On a GPU an id out of range would end the process in an assertion with no place and no value.
    largest = torch.stack([each.indices.amax().long() for each in bounded]).tolist()
    for (place, _, bound), found in zip(bounded, largest, strict=True):
        if found >= bound:
            raise BadInputError("id-outside-vocabulary", place, expected=f"ids below {bound}", found=found)
