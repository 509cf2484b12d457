"""Cases of the head loss in every form of target, and a dense float64 oracle for them.

In: a form, a temperature and sizes. Out: random inputs with the targets that a cache would give, and what the loss over
all of [N, V] is. The dense meaning of heads and tails comes from ``cache_spec``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cache_spec.targets import HeadTargets
from cache_spec.targets import dense as dense_meaning
from train.loss_divergences import FORWARD_KL, Divergence
from train.loss_targets import (
    BucketTargets,
    DenseTargets,
    HeadLossTargets,
    HeadRows,
    LinearTargets,
    bucket,
    gold,
    points,
    renormalised,
    shared_tails,
    spread,
    uniform_tail,
)
from train.losses import HeadLoss, head_loss

ROWS, WIDTH, VOCAB, KEPT, TAILS, DRAWS, TEACHER_WIDTH = 23, 8, 41, 6, 4, 3, 5
KL_SCALE, CE_SCALE = 0.7 / 19, 0.3 / 17
FORMS = ["bucket", "renormalise", "uniform", "gold", "prototype", "residual", "points", "dense"]
REVERSE, JS, SKEWED_JS = Divergence("reverse"), Divergence("js"), Divergence("js", 0.1)
DIVERGENCES = [
    *[(form, FORWARD_KL) for form in FORMS],
    *[(form, REVERSE) for form in ("bucket", "dense")],
    *[(form, js) for form in FORMS if form != "residual" for js in (JS, SKEWED_JS)],
]
"""Each form with each divergence that it has."""


@dataclass(frozen=True)
class Case:
    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    labels_N: Tensor
    kl_mask_N: Tensor
    temperature: float
    vocab_size: int
    teacher_NV: Tensor
    """Log-probabilities at temperature 1."""
    targets: HeadLossTargets
    meaning_NV: Tensor | None
    """The distribution that the targets stand for; None for a bucket."""
    self_nats_N: Tensor | None
    """Sum of p * log(p), of the meaning without draws."""


def make_case(
    form: str = "bucket",
    *,
    temperature: float = 2.0,
    bias: bool = True,
    kept: int = KEPT,
    padding: int = 0,
    rows: int = ROWS,
    width: int = WIDTH,
    vocab: int = VOCAB,
    spread_of_states: float = 1.0,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_NV = (2.0 * normal(rows, vocab)).log_softmax(dim=1)
    labels_N = torch.randint(vocab, (rows,), generator=generator)
    labels_N[rows // 2 :] = teacher_NV.argmax(dim=1)[rows // 2 :]  # some labels lie in the head, some outside
    labels_N[torch.rand(rows, generator=generator) < 0.2] = -100
    kl_mask_N = torch.rand(rows, generator=generator) > 0.2
    labels_N[:2], kl_mask_N[0], kl_mask_N[1] = -100, False, True
    if form == "gold":
        kl_mask_N &= labels_N != -100
    case = Case(
        hidden_ND=(spread_of_states * normal(rows, width)).requires_grad_(),
        weight_VD=normal(vocab + padding, width).requires_grad_(),
        bias_V=normal(vocab + padding).requires_grad_() if bias else None,
        labels_N=labels_N,
        kl_mask_N=kl_mask_N,
        temperature=temperature,
        vocab_size=vocab,
        teacher_NV=teacher_NV,
        targets=bucket(head_rows(teacher_NV, kept, temperature), temperature),
        meaning_NV=None,
        self_nats_N=None,
    )
    return with_form(case, form, kept, generator)


def head_rows(teacher_NV: Tensor, kept: int, temperature: float) -> HeadRows:
    """What a cache would hold of dense log-probabilities, unquantised."""
    logprobs_NK, ids_NK = teacher_NV.topk(kept, dim=1)
    log_p_NV = (teacher_NV / temperature).log_softmax(dim=1)
    log_rest_N = log_p_NV.scatter(1, ids_NK, -torch.inf).logsumexp(dim=1)
    return HeadRows(ids_NK, logprobs_NK, log_rest_N - log_p_NV.gather(1, ids_NK).logsumexp(dim=1))


def with_form(case: Case, form: str, kept: int, generator: torch.Generator) -> Case:
    """The same case with targets of another form, and their dense meaning."""
    (rows, vocab), temperature = case.teacher_NV.shape, case.temperature
    head = head_rows(case.teacher_NV, kept, temperature)
    if form == "bucket":
        return case
    if form == "dense":
        hidden_ND = torch.randn(rows, TEACHER_WIDTH, generator=generator, dtype=torch.float64)
        weight_VD = torch.randn(vocab, TEACHER_WIDTH, generator=generator, dtype=torch.float64)
        bias_V = torch.randn(vocab, generator=generator, dtype=torch.float64) if case.bias_V is not None else None
        meaning_NV = (F.linear(hidden_ND, weight_VD, bias_V) / temperature).softmax(dim=1)
        targets: HeadLossTargets = DenseTargets(hidden_ND=hidden_ND, weight_VD=weight_VD, bias_V=bias_V)
        return _with(case, targets, meaning_NV)
    if form == "points":
        probs_NJ = torch.rand(rows, kept, generator=generator, dtype=torch.float64)
        probs_NJ[:, kept // 2 :] *= torch.rand(rows, 1, generator=generator) > 0.5  # padding, of any id
        probs_NJ /= probs_NJ.sum(dim=1, keepdim=True)
        ids_NJ = torch.where(probs_NJ > 0, head.ids_NK, 0)
        meaning_NV = torch.zeros_like(case.teacher_NV).scatter_add_(1, ids_NJ, probs_NJ)
        return _with(case, points(ids_NJ, probs_NJ), meaning_NV)

    tails_CV = (1.5 * torch.randn(TAILS, vocab, generator=generator, dtype=torch.float64)).softmax(dim=1)
    tail_N = torch.randint(TAILS, (rows,), generator=generator)
    residual = None
    if form == "renormalise":
        targets = renormalised(head, temperature)
    elif form == "gold":
        targets = gold(head, temperature, case.labels_N)
    elif form == "uniform":
        targets = spread(head, temperature, uniform_tail(vocab, torch.float64), torch.zeros_like(tail_N))
    else:
        if form == "residual":
            draws = torch.randint(vocab, (rows, DRAWS), generator=generator)
            residual = draws, 0.1 * torch.randn(rows, DRAWS, generator=generator, dtype=torch.float64)
            draws[:, 1] = draws[:, 0]  # draws repeat
        targets = spread(head, temperature, shared_tails(tails_CV), tail_N, residual)
    stored = HeadTargets(
        ids_BTK=head.ids_NK.numpy()[None],
        logprobs_BTK=head.logprobs_NK.numpy()[None],
        tail_log_odds_BT=head.tail_log_odds_N.numpy()[None],
        prototype_BT=tail_N.numpy()[None],
    )
    tail: Any = "prototype" if form == "residual" else form
    meaning_BTV = dense_meaning(
        stored,
        temperature=temperature,
        vocab_size=vocab,
        tail=tail,
        prototypes_CV=tails_CV.numpy(),
        gold_BT=case.labels_N.clamp(min=0).numpy()[None],
    )
    meaning_NV = torch.from_numpy(np.ascontiguousarray(meaning_BTV[0]))
    plain = _with(case, targets, meaning_NV)
    if residual is None:
        return plain
    return replace(plain, meaning_NV=meaning_NV.clone().scatter_add_(1, *residual))


def _with(case: Case, targets: HeadLossTargets, meaning_NV: Tensor) -> Case:
    self_nats_N = torch.xlogy(meaning_NV, meaning_NV).sum(dim=1)
    return replace(case, targets=targets, meaning_NV=meaning_NV, self_nats_N=self_nats_N)


def chunked(case: Case, *, chunk_rows: int = 7, **changed: Any) -> HeadLoss:
    """What the code under test says."""
    settings: dict[str, Any] = {"kl_scale": KL_SCALE, "ce_scale": CE_SCALE, "temperature": case.temperature}
    settings |= {"vocab_size": case.vocab_size, "labels_N": case.labels_N, "kl_mask_N": case.kl_mask_N}
    settings |= {"targets": case.targets, **changed}
    return head_loss(case.hidden_ND, case.weight_VD, case.bias_V, chunk_rows=chunk_rows, **settings)


def dense(
    case: Case, divergence: Divergence = FORWARD_KL, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, KL sum with squared temperature, CE sum) by plain operations over [N, V], for autograd."""
    temperature = case.temperature
    logits_NV = F.linear(case.hidden_ND, case.weight_VD, case.bias_V)[:, : case.vocab_size]
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    log_q_NV = (logits_NV / temperature).log_softmax(dim=1)
    kl_N = _divergences(case, divergence, log_q_NV)
    kl_sum = temperature**2 * kl_N[case.kl_mask_N].sum()
    ce_sum = F.cross_entropy(logits_NV, case.labels_N, ignore_index=-100, reduction="sum")
    return KL_SCALE * kl_sum + CE_SCALE * ce_sum, kl_sum, ce_sum


def _divergences(case: Case, divergence: Divergence, log_q_NV: Tensor) -> Tensor:
    if case.meaning_NV is None:
        log_p_NV, log_q_NV = _partition(case, log_q_NV)
        p_NV = log_p_NV.exp()
    elif divergence.kind == "forward":
        assert case.self_nats_N is not None
        # The mass of signed targets need not be one: with logsumexp for each unit of it, -p * log(q) holds for any.
        return case.self_nats_N - (case.meaning_NV * log_q_NV).sum(dim=1)
    else:
        p_NV, log_p_NV = case.meaning_NV, case.meaning_NV.log()
    q_NV = log_q_NV.exp()
    if divergence.kind == "forward":
        return (p_NV * (log_p_NV - log_q_NV)).sum(dim=1)
    if divergence.kind == "reverse":
        return (q_NV * (log_q_NV - log_p_NV)).sum(dim=1)
    log_m_NV = (divergence.beta * p_NV + (1 - divergence.beta) * q_NV).log()
    of_teacher_N = (torch.xlogy(p_NV, p_NV) - p_NV * log_m_NV).sum(dim=1)
    return divergence.beta * of_teacher_N + (1 - divergence.beta) * (q_NV * (log_q_NV - log_m_NV)).sum(dim=1)


def _partition(case: Case, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's full distribution, not what the targets hold of it, and the student's, on a head and a bucket."""
    assert isinstance(case.targets, BucketTargets)
    ids_NK = case.targets.ids_NK
    log_p_NV = (case.teacher_NV / case.temperature).log_softmax(dim=1)

    def parts(log_NV: Tensor) -> Tensor:
        log_NK = log_NV.gather(1, ids_NK)
        if ids_NK.shape[1] == case.vocab_size:
            return log_NK
        return torch.cat([log_NK, log_NV.scatter(1, ids_NK, -torch.inf).logsumexp(dim=1, keepdim=True)], dim=1)

    return parts(log_p_NV), parts(log_q_NV)


def parameters(case: Case) -> list[Tensor]:
    return [t for t in (case.hidden_ND, case.weight_VD, case.bias_V) if t is not None and t.requires_grad]


def gradients(case: Case, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, parameters(case)))


def assert_equals_oracle(
    case: Case,
    chunk_rows: int = 7,
    tolerance: float = 1e-10,
    divergence: Divergence = FORWARD_KL,
    softcap: float | None = None,
) -> None:
    got = chunked(case, chunk_rows=chunk_rows, divergence=divergence, softcap=softcap)
    want = dense(case, divergence, softcap)
    for found, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(gradients(case, got.total), gradients(case, want[0]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def floats_to(targets: HeadLossTargets, dtype: torch.dtype) -> HeadLossTargets:
    """The same targets with their floats in ``dtype``."""
    rows = torch.arange(len(targets.hidden_ND if isinstance(targets, DenseTargets) else _ids(targets)))
    moved = targets.rows(rows, dtype)
    if isinstance(moved, DenseTargets):
        bias_V = None if moved.bias_V is None else moved.bias_V.to(dtype)
        return replace(moved, weight_VD=moved.weight_VD.to(dtype), bias_V=bias_V)
    if isinstance(moved, LinearTargets) and moved.shared is not None:
        tails = moved.shared.tails
        tails = replace(tails, probs_CV=tails.probs_CV.to(dtype), self_nats_C=tails.self_nats_C.to(dtype))
        return replace(moved, shared=replace(moved.shared, tails=tails))
    return moved


def _ids(targets: BucketTargets | LinearTargets) -> Tensor:
    return targets.ids_NK if isinstance(targets, BucketTargets) else targets.ids_NJ


def as_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case in a lower precision; targets in float32, as caches give them."""
    return replace(
        case,
        hidden_ND=case.hidden_ND.detach().to(dtype).requires_grad_(),
        weight_VD=case.weight_VD.detach().to(dtype).requires_grad_(),
        bias_V=None if case.bias_V is None else case.bias_V.detach().to(dtype).requires_grad_(),
        targets=floats_to(case.targets, torch.float64 if dtype == torch.float64 else torch.float32),
    )
