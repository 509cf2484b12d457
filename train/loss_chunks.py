"""The head loss of one chunk of rows: logits and what they are pulled to come in, sums and a gradient go out.

Legend: C rows of the chunk, V vocabulary, K kept, M the kept and their bucket, J points, 1 a trailing axis of one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from train.loss_divergences import FORWARD_KL, Divergence, Pulls, jensen_shannon, reverse_kl
from train.loss_targets import NO_LABEL, BucketTargets, LinearTargets


class TeacherLogits(NamedTuple):
    """The teacher's logits for the rows, by the temperature already; they are overwritten."""

    logits_CV: Tensor


class Pull(NamedTuple):
    """What the rows are pulled to, and how strongly each gradient counts."""

    targets: BucketTargets | LinearTargets | TeacherLogits | None
    """None where the divergence has no weight."""
    shared_logit_C: Tensor | None
    """Mean of the student's logits under the shared distribution, at temperature 1."""
    labels_C: Tensor
    kl_mask_C: Tensor
    temperature: float
    relative_kl: float
    """Scale of the divergence; 0 leaves it out."""
    relative_ce: float
    wants_gradient: bool
    divergence: Divergence = FORWARD_KL


class ChunkTerms(NamedTuple):
    """Unscaled sums over the rows, and the scaled gradient on the logits."""

    kl_sum: Tensor
    ce_sum: Tensor
    grad_CV: Tensor | None
    shared_scale_C: Tensor | None = None
    """The gradient on each row's mean logit under its shared distribution, which ``grad_CV`` leaves out."""


class _Weights(NamedTuple):
    """What multiplies softmax minus target in the gradient, row by row."""

    kl_C1: Tensor
    ce_C1: Tensor
    """Zeros where the cross-entropy has a softmax of its own."""


class _Divergence(NamedTuple):
    kl_C: Tensor
    logsumexp_C1: Tensor
    grad_CV: Tensor | None
    shared_scale_C: Tensor | None = None


def chunk_terms(logits_CV: Tensor, pull: Pull) -> ChunkTerms:
    """Both sums over one chunk, and the gradient on its logits; the logits are overwritten."""
    temperature, targets = pull.temperature, pull.targets
    with_kl, with_ce = targets is not None and pull.relative_kl > 0, pull.relative_ce > 0
    kl_sum, ce_sum = logits_CV.new_zeros(()), logits_CV.new_zeros(())
    label_C1 = pull.labels_C.clamp(min=0).unsqueeze(1)
    labelled_C1 = (pull.labels_C != NO_LABEL).unsqueeze(1)
    label_logit_C1 = logits_CV.gather(1, label_C1)
    ce_weight_C1 = pull.relative_ce * labelled_C1.to(logits_CV.dtype)
    one_softmax = with_kl and with_ce and temperature == 1.0
    grad_CV: Tensor | None = None
    shared_scale_C: Tensor | None = None

    if with_kl:
        scaled_CV = logits_CV
        if temperature != 1.0:
            scaled_CV = logits_CV.div(temperature) if with_ce else logits_CV.div_(temperature)
        # T**2 of the loss times 1/T of z/T leaves T.
        kl_weight_C1 = pull.relative_kl * temperature * pull.kl_mask_C.unsqueeze(1).to(logits_CV.dtype)
        weights = _Weights(kl_weight_C1, ce_weight_C1 if one_softmax else torch.zeros_like(ce_weight_C1))
        kl_C, logsumexp_C1, grad_CV, shared_scale_C = _divergence(scaled_CV, pull, weights)
        kl_sum = temperature**2 * torch.where(pull.kl_mask_C, kl_C, 0.0).sum()
        if one_softmax:
            ce_sum = torch.where(labelled_C1, logsumexp_C1 - label_logit_C1, 0.0).sum()
    if with_ce and not one_softmax:
        logsumexp_C1 = softmax_(logits_CV)
        ce_sum = torch.where(labelled_C1, logsumexp_C1 - label_logit_C1, 0.0).sum()
        if pull.wants_gradient:
            grad_CV = logits_CV.mul_(ce_weight_C1) if grad_CV is None else grad_CV.addcmul_(logits_CV, ce_weight_C1)
    if with_ce and grad_CV is not None:
        grad_CV = grad_CV.scatter_add_(1, label_C1, -ce_weight_C1)
    return ChunkTerms(kl_sum, ce_sum, grad_CV, shared_scale_C)


def softmax_(logits_CV: Tensor) -> Tensor:
    """Turn logits into probabilities in place, and return their logsumexp [C, 1]."""
    peak_C1 = logits_CV.amax(dim=1, keepdim=True)
    torch.softmax(logits_CV, dim=1, out=logits_CV)
    # One fused pass made the probabilities; the largest is at least 1 / V, so its log is good.
    return peak_C1 - logits_CV.amax(dim=1, keepdim=True).log()


def softcap_(logits_CV: Tensor, cap: float) -> Tensor:
    """Bend logits to ``cap * tanh(logits / cap)`` in place, and return the derivative of that."""
    torch.tanh(logits_CV.div_(cap), out=logits_CV)
    slope_CV = logits_CV.square().neg_().add_(1.0)
    logits_CV.mul_(cap)
    return slope_CV


def _divergence(scaled_CV: Tensor, pull: Pull, weights: _Weights) -> _Divergence:
    targets, forward = pull.targets, pull.divergence.kind == "forward"
    if isinstance(targets, BucketTargets):
        to_bucket = _to_bucket if forward else _to_bucket_otherwise
        return to_bucket(scaled_CV, targets, pull, weights)
    if isinstance(targets, LinearTargets):
        if forward:
            return _to_linear(scaled_CV, targets, pull, weights)
        logsumexp_C1 = softmax_(scaled_CV)
        pulls = jensen_shannon(_dense_rows(targets, pull, scaled_CV), scaled_CV, pull.divergence.beta)
        return _pulled(scaled_CV, pulls, logsumexp_C1, pull, weights)
    assert targets is not None
    to_dense = _to_dense if forward else _to_dense_otherwise
    return to_dense(scaled_CV, targets.logits_CV, pull, weights)


def _to_bucket(scaled_CV: Tensor, targets: BucketTargets, pull: Pull, weights: _Weights) -> _Divergence:
    ids_CK = targets.ids_NK
    scaled_CK = scaled_CV.gather(1, ids_CK)
    logsumexp_C1 = softmax_(scaled_CV)
    q_CK = scaled_CV.gather(1, ids_CK)
    # The rest is what remains when the head is set to zero: 1 - sum(head) would cancel.
    rest_C1 = scaled_CV.scatter_(1, ids_CK, 0.0).sum(dim=1, keepdim=True)
    rest_C1 = rest_C1.clamp(min=torch.finfo(rest_C1.dtype).tiny)
    mask_C1 = pull.kl_mask_C.unsqueeze(1)
    log_p_CK, log_mass_C1 = targets.log_probs_NK, targets.log_rest_N.unsqueeze(1)
    p_CK = torch.where(mask_C1, log_p_CK.exp(), 0.0)
    mass_C1 = torch.where(mask_C1, log_mass_C1.exp(), 0.0)
    head_C = torch.where(p_CK > 0, p_CK * (log_p_CK - scaled_CK + logsumexp_C1), 0.0).sum(dim=1)
    kl_C = head_C + torch.where(mass_C1 > 0, mass_C1 * (log_mass_C1 - rest_C1.log()), 0.0).squeeze(1)
    if not pull.wants_gradient:
        return _Divergence(kl_C, logsumexp_C1, None)
    head_grad_CK = (weights.kl_C1 + weights.ce_C1) * q_CK - weights.kl_C1 * p_CK
    per_rest_C1 = weights.kl_C1 * (1 - mass_C1 / rest_C1) + weights.ce_C1
    return _Divergence(kl_C, logsumexp_C1, scaled_CV.mul_(per_rest_C1).scatter_(1, ids_CK, head_grad_CK))


def _to_linear(scaled_CV: Tensor, targets: LinearTargets, pull: Pull, weights: _Weights) -> _Divergence:
    scaled_CJ = scaled_CV.gather(1, targets.ids_NJ)
    logsumexp_C1 = softmax_(scaled_CV)
    weights_CJ = torch.where(pull.kl_mask_C.unsqueeze(1), targets.weights_NJ, 0.0)
    kl_C = targets.self_nats_N + (weights_CJ * (logsumexp_C1 - scaled_CJ)).sum(dim=1)
    mass_C1 = weights_CJ.sum(dim=1, keepdim=True)
    shared_scale_C: Tensor | None = None
    if targets.shared is not None and pull.shared_logit_C is not None:
        shared_C = torch.where(pull.kl_mask_C, targets.shared.weight_N, 0.0)
        kl_C = kl_C + shared_C * (logsumexp_C1.squeeze(1) - pull.shared_logit_C / pull.temperature)
        mass_C1 = mass_C1 + shared_C.unsqueeze(1)
        # Its gradient needs no pass over the vocabulary here: it is added once for all chunks.
        shared_scale_C = -weights.kl_C1.squeeze(1) * shared_C
    if not pull.wants_gradient:
        return _Divergence(kl_C, logsumexp_C1, None)
    grad_CV = scaled_CV.mul_(weights.kl_C1 * mass_C1 + weights.ce_C1)
    grad_CV = grad_CV.scatter_add_(1, targets.ids_NJ, -weights.kl_C1 * weights_CJ)
    return _Divergence(kl_C, logsumexp_C1, grad_CV, shared_scale_C)


def _to_dense(scaled_CV: Tensor, teacher_CV: Tensor, pull: Pull, weights: _Weights) -> _Divergence:
    p_CV = teacher_CV.softmax(dim=1)
    teacher_logsumexp_C1 = teacher_CV.amax(dim=1, keepdim=True) - p_CV.amax(dim=1, keepdim=True).log()
    gap_C = teacher_CV.sub_(scaled_CV).mul_(p_CV).sum(dim=1)
    logsumexp_C1 = softmax_(scaled_CV)
    kl_C = gap_C + (logsumexp_C1 - teacher_logsumexp_C1).squeeze(1)
    if not pull.wants_gradient:
        return _Divergence(kl_C, logsumexp_C1, None)
    grad_CV = scaled_CV.mul_(weights.kl_C1 + weights.ce_C1).addcmul_(p_CV, weights.kl_C1, value=-1)
    return _Divergence(kl_C, logsumexp_C1, grad_CV)


def _to_bucket_otherwise(scaled_CV: Tensor, targets: BucketTargets, pull: Pull, weights: _Weights) -> _Divergence:
    ids_CK, mask_C1 = targets.ids_NK, pull.kl_mask_C.unsqueeze(1)
    log_p_CM = torch.where(mask_C1, torch.cat([targets.log_probs_NK, targets.log_rest_N.unsqueeze(1)], dim=1), 0.0)
    # A head token that was rounded to nothing is one of the others.
    named_CK = log_p_CM[:, :-1] > -torch.inf
    scaled_CK = scaled_CV.gather(1, ids_CK)
    logsumexp_C1 = softmax_(scaled_CV)
    q_CK = scaled_CV.gather(1, ids_CK)
    rest_C1 = scaled_CV.scatter_(1, ids_CK, torch.where(named_CK, 0.0, q_CK)).sum(dim=1, keepdim=True)
    rest_C1 = rest_C1.clamp(min=torch.finfo(rest_C1.dtype).tiny)
    q_CM = torch.cat([torch.where(named_CK, q_CK, 0.0), rest_C1], dim=1)
    if pull.divergence.kind == "reverse":
        log_q_CM = torch.cat([scaled_CK - logsumexp_C1, rest_C1.log()], dim=1)
        value_C, pull_CM = reverse_kl(log_p_CM, log_q_CM, q_CM)
    else:
        value_C, pull_CM = jensen_shannon(log_p_CM.exp(), q_CM, pull.divergence.beta)
    if not pull.wants_gradient:
        return _Divergence(value_C, logsumexp_C1, None)
    common_C1 = weights.ce_C1 - weights.kl_C1 * pull_CM.sum(dim=1, keepdim=True)
    per_rest_C1 = weights.kl_C1 * pull_CM[:, -1:] / rest_C1 + common_C1
    named_grad_CK = weights.kl_C1 * pull_CM[:, :-1] + common_C1 * q_CK
    head_grad_CK = torch.where(named_CK, named_grad_CK, per_rest_C1 * q_CK)
    return _Divergence(value_C, logsumexp_C1, scaled_CV.mul_(per_rest_C1).scatter_(1, ids_CK, head_grad_CK))


def _dense_rows(targets: LinearTargets, pull: Pull, like_CV: Tensor) -> Tensor:
    """What linear targets say of each token [C, V]; what rounding left below zero is zero."""
    mask_C1 = pull.kl_mask_C.unsqueeze(1)
    if targets.shared is None:
        p_CV = torch.zeros_like(like_CV)
    else:
        weight_C1 = torch.where(mask_C1, targets.shared.weight_N.unsqueeze(1), 0.0)
        p_CV = targets.shared.tails.probs_CV[targets.shared.tail_N].to(like_CV.dtype).mul_(weight_C1)
    return p_CV.scatter_add_(1, targets.ids_NJ, torch.where(mask_C1, targets.weights_NJ, 0.0)).clamp_(min=0.0)


def _to_dense_otherwise(scaled_CV: Tensor, teacher_CV: Tensor, pull: Pull, weights: _Weights) -> _Divergence:
    if pull.divergence.kind == "js":
        logsumexp_C1 = softmax_(scaled_CV)
        pulls = jensen_shannon(torch.softmax(teacher_CV, dim=1, out=teacher_CV), scaled_CV, pull.divergence.beta)
        return _pulled(scaled_CV, pulls, logsumexp_C1, pull, weights)
    log_p_CV = torch.log_softmax(teacher_CV, dim=1, out=teacher_CV)
    log_q_CV = scaled_CV.clone()
    logsumexp_C1 = softmax_(scaled_CV)
    pulls = reverse_kl(log_p_CV, log_q_CV.sub_(logsumexp_C1), scaled_CV)
    return _pulled(scaled_CV, pulls, logsumexp_C1, pull, weights)


def _pulled(q_CV: Tensor, pulls: Pulls, logsumexp_C1: Tensor, pull: Pull, weights: _Weights) -> _Divergence:
    if not pull.wants_gradient:
        return _Divergence(pulls.value_C, logsumexp_C1, None)
    common_C1 = weights.ce_C1 - weights.kl_C1 * pulls.pull_CM.sum(dim=1, keepdim=True)
    grad_CV = q_CV.mul_(common_C1).addcmul_(pulls.pull_CM, weights.kl_C1)
    return _Divergence(pulls.value_C, logsumexp_C1, grad_CV)
