"""The chunked head loss against a dense float64 oracle, its error in lower precision, its memory and its guards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cache_spec.errors import BadInputError
from train.losses import HeadLoss, SparseTargets, TailTreatment, cosine_sum, head_loss, mse_sum, pool_windows

ROWS, WIDTH, VOCAB, KEPT = 23, 8, 41, 6
KL_SCALE, CE_SCALE = 0.7 / 19, 0.3 / 17


@dataclass(frozen=True)
class Case:
    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    targets: SparseTargets
    labels_N: Tensor
    kl_mask_N: Tensor
    teacher_NV: Tensor  # log-probabilities at temperature 1
    temperature: float
    vocab_size: int


def sparse_targets(teacher_NV: Tensor, kept: int, temperature: float) -> SparseTargets:
    """What a cache would hold of dense log-probabilities, unquantised."""
    head_logprobs_NK, head_ids_NK = teacher_NV.topk(kept, dim=1)
    tempered_NV = (teacher_NV / temperature).log_softmax(dim=1)
    return SparseTargets(
        head_ids_NK=head_ids_NK,
        head_logprobs_NK=head_logprobs_NK,
        log_normaliser_N=(teacher_NV / temperature).logsumexp(dim=1),
        log_tail_mass_N=tempered_NV.scatter(1, head_ids_NK, -torch.inf).logsumexp(dim=1),
    )


def make_case(
    *,
    temperature: float = 2.0,
    bias: bool = True,
    kept: int = KEPT,
    padding: int = 0,
    rows: int = ROWS,
    width: int = WIDTH,
    vocab: int = VOCAB,
    spread: float = 1.0,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_NV = (2.0 * normal(rows, vocab)).log_softmax(dim=1)
    labels_N = torch.randint(vocab, (rows,), generator=generator)
    labels_N[torch.rand(rows, generator=generator) < 0.2] = -100
    kl_mask_N = torch.rand(rows, generator=generator) > 0.2
    labels_N[:2], kl_mask_N[0], kl_mask_N[1] = -100, False, True
    return Case(
        hidden_ND=(spread * normal(rows, width)).requires_grad_(),
        weight_VD=normal(vocab + padding, width).requires_grad_(),
        bias_V=normal(vocab + padding).requires_grad_() if bias else None,
        targets=sparse_targets(teacher_NV, kept, temperature),
        labels_N=labels_N,
        kl_mask_N=kl_mask_N,
        teacher_NV=teacher_NV,
        temperature=temperature,
        vocab_size=vocab,
    )


def chunked(case: Case, *, tail: TailTreatment = "bucket", chunk_rows: int = 7, **changed: Any) -> HeadLoss:
    settings: dict[str, Any] = {"kl_scale": KL_SCALE, "ce_scale": CE_SCALE, "temperature": case.temperature}
    settings |= {"vocab_size": case.vocab_size, "labels_N": case.labels_N, "kl_mask_N": case.kl_mask_N}
    settings |= {"targets": case.targets, **changed}
    return head_loss(case.hidden_ND, case.weight_VD, case.bias_V, tail=tail, chunk_rows=chunk_rows, **settings)


def dense(case: Case, tail: TailTreatment) -> tuple[Tensor, Tensor, Tensor]:
    """(total, KL sum with squared temperature, CE sum) by plain operations over [N, V], for autograd."""
    targets, temperature = case.targets, case.temperature
    logits_NV = F.linear(case.hidden_ND, case.weight_VD, case.bias_V)[:, : case.vocab_size]
    log_q_NV = (logits_NV / temperature).log_softmax(dim=1)
    log_q_NK = log_q_NV.gather(1, targets.head_ids_NK)
    log_p_NK = targets.head_logprobs_NK / temperature - targets.log_normaliser_N[:, None]
    if tail == "renormalise":
        log_p_NK = log_p_NK - log_p_NK.logsumexp(dim=1, keepdim=True)
    kl_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(dim=1)
    if tail == "bucket" and targets.head_ids_NK.shape[1] < case.vocab_size:
        log_q_tail_N = log_q_NV.scatter(1, targets.head_ids_NK, -torch.inf).logsumexp(dim=1)
        kl_N = kl_N + targets.log_tail_mass_N.exp() * (targets.log_tail_mass_N - log_q_tail_N)
    kl_sum = temperature**2 * kl_N[case.kl_mask_N].sum()
    ce_sum = F.cross_entropy(logits_NV, case.labels_N, ignore_index=-100, reduction="sum")
    return KL_SCALE * kl_sum + CE_SCALE * ce_sum, kl_sum, ce_sum


def parameters(case: Case) -> list[Tensor]:
    return [t for t in (case.hidden_ND, case.weight_VD, case.bias_V) if t is not None and t.requires_grad]


def gradients(case: Case, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, parameters(case)))


def assert_equals_oracle(case: Case, tail: TailTreatment, chunk_rows: int, tolerance: float = 1e-11) -> None:
    got, want = chunked(case, tail=tail, chunk_rows=chunk_rows), dense(case, tail)
    for found, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(gradients(case, got.total), gradients(case, want[0]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_value_and_gradients_equal_dense_oracle(
    tail: TailTreatment, temperature: float, bias: bool, padding: int, chunk_rows: int
) -> None:
    assert_equals_oracle(make_case(temperature=temperature, bias=bias, padding=padding), tail, chunk_rows)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_full_head_equals_exact_dense_kl(temperature: float) -> None:
    case = make_case(temperature=temperature, kept=VOCAB)
    assert case.targets.log_tail_mass_N.eq(-torch.inf).all()
    got = chunked(case, ce_scale=0.0, kl_scale=1.0)
    logits_NV = F.linear(case.hidden_ND, case.weight_VD, case.bias_V)
    kl_NV = F.kl_div(
        (logits_NV / temperature).log_softmax(dim=1),
        (case.teacher_NV / temperature).log_softmax(dim=1),
        reduction="none",
        log_target=True,
    )
    want = temperature**2 * kl_NV[case.kl_mask_N].sum()
    assert abs(float(got.total.detach()) - float(want.detach())) <= 1e-10
    for found, wanted in zip(gradients(case, got.total), gradients(case, want), strict=True):
        assert float((found - wanted).abs().max()) <= 1e-10


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck(tail: TailTreatment, temperature: float) -> None:
    case = make_case(temperature=temperature, rows=5, vocab=11, width=3, kept=3, padding=2)

    def total(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        moved = replace(case, hidden_ND=hidden_ND, weight_VD=weight_VD, bias_V=bias_V)
        return chunked(moved, tail=tail, chunk_rows=2).total

    assert torch.autograd.gradcheck(total, tuple(parameters(case)))


def test_quantised_targets_that_do_not_sum_to_one_equal_oracle() -> None:
    case = make_case(temperature=2.0)
    step = 0.25
    rounded_NK = (case.targets.head_logprobs_NK / step).round() * step
    coarse = replace(case, targets=replace(case.targets, head_logprobs_NK=rounded_NK))
    p_NK = (rounded_NK / 2.0 - case.targets.log_normaliser_N[:, None]).exp()
    assert float((p_NK.sum(dim=1) + case.targets.log_tail_mass_N.exp() - 1).abs().max()) > 1e-3
    assert_equals_oracle(coarse, "bucket", 7)


@pytest.mark.parametrize("scales", [{"kl_scale": 0.0}, {"ce_scale": 0.0}])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_term_without_scale_changes_nothing(scales: dict[str, Any], temperature: float) -> None:
    case = make_case(temperature=temperature)
    got = chunked(case, **scales)
    _, kl_sum, ce_sum = dense(case, "bucket")
    want, skipped = (CE_SCALE * ce_sum, got.kl_sum) if "kl_scale" in scales else (KL_SCALE * kl_sum, got.ce_sum)
    torch.testing.assert_close(got.total, want)
    assert float(skipped) == 0
    for found, wanted in zip(gradients(case, got.total), gradients(case, want), strict=True):
        torch.testing.assert_close(found, wanted)


def test_rows_without_label_and_mask_get_zero_gradient_whatever_their_targets_hold() -> None:
    case = make_case()
    idle_N = (case.labels_N == -100) & ~case.kl_mask_N
    unmasked_N = ~case.kl_mask_N
    assert idle_N.any()
    assert (unmasked_N & ~idle_N).any()
    nan_NK = torch.where(unmasked_N[:, None], torch.nan, case.targets.head_logprobs_NK)
    nan_N = torch.where(unmasked_N, torch.nan, case.targets.log_tail_mass_N)
    broken = replace(case, targets=replace(case.targets, head_logprobs_NK=nan_NK, log_tail_mass_N=nan_N))
    got, want = chunked(broken), chunked(case)
    assert torch.equal(got.total, want.total)
    found, wanted = gradients(broken, got.total), gradients(case, want.total)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert not found[0][idle_N].any()
    assert found[0][~idle_N].any(dim=1).all()


@pytest.mark.parametrize(
    "idle",
    [
        {"labels_N": torch.full((ROWS,), -100), "kl_mask_N": torch.zeros(ROWS, dtype=torch.bool)},
        {"kl_scale": 0.0, "ce_scale": 0.0},
    ],
)
def test_nothing_to_learn_gives_zero_loss_and_zero_gradients(idle: dict[str, Any]) -> None:
    case = make_case()
    got = chunked(case, **idle)
    assert [float(t.detach()) for t in got] == [0.0, 0.0, 0.0]
    assert not any(g.any() for g in gradients(case, got.total))


def test_padded_vocabulary_rows_get_zero_gradient() -> None:
    case = make_case(padding=5)
    _, weight_VD, bias_V = gradients(case, chunked(case).total)
    assert not weight_VD[VOCAB:].any()
    assert not bias_V[VOCAB:].any()


def test_backward_multiplies_by_incoming_gradient_and_sums_are_detached() -> None:
    case = make_case()
    got = chunked(case)
    assert got.total.requires_grad
    assert not got.kl_sum.requires_grad
    assert not got.ce_sum.requires_grad
    whole, scaled = gradients(case, chunked(case).total), gradients(case, -3.0 * got.total)
    for one, other in zip(whole, scaled, strict=True):
        torch.testing.assert_close(-3.0 * one, other)


def test_frozen_head_still_passes_gradient_to_hidden() -> None:
    case = make_case()
    frozen = replace(case, weight_VD=case.weight_VD.detach(), bias_V=None)
    assert_equals_oracle(frozen, "bucket", 7)


def test_tail_term_vanishes_when_student_equals_teacher() -> None:
    case = make_case(temperature=2.0)
    same = replace(case, hidden_ND=case.teacher_NV, weight_VD=torch.eye(VOCAB, dtype=torch.float64), bias_V=None)
    same.hidden_ND.requires_grad_()
    got = chunked(same, ce_scale=0.0)
    assert abs(float(got.kl_sum)) < 1e-12
    assert float(gradients(same, got.total)[0].abs().max()) < 1e-14


def as_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case in a lower precision; targets in float32, as caches give them."""
    names = ("head_logprobs_NK", "log_normaliser_N", "log_tail_mass_N")
    targets = replace(case.targets, **{name: getattr(case.targets, name).float() for name in names})
    return replace(
        case,
        hidden_ND=case.hidden_ND.detach().to(dtype).requires_grad_(),
        weight_VD=case.weight_VD.detach().to(dtype).requires_grad_(),
        bias_V=None if case.bias_V is None else case.bias_V.detach().to(dtype).requires_grad_(),
        targets=targets,
    )


def errors(low: Case, tail: TailTreatment) -> tuple[float, list[float]]:
    """Relative errors of value and gradients against the oracle on the same (rounded) inputs in float64."""
    names = ("head_logprobs_NK", "log_normaliser_N", "log_tail_mass_N")
    exact = replace(
        low,
        hidden_ND=low.hidden_ND.detach().double().requires_grad_(),
        weight_VD=low.weight_VD.detach().double().requires_grad_(),
        bias_V=None if low.bias_V is None else low.bias_V.detach().double().requires_grad_(),
        targets=replace(low.targets, **{name: getattr(low.targets, name).double() for name in names}),
    )
    got, want = chunked(low, tail=tail).total, dense(exact, tail)[0]
    relative = [
        float((g.double() - w).norm() / w.norm())
        for g, w in zip(gradients(low, got), gradients(exact, want), strict=True)
    ]
    return abs(float(got.detach()) - float(want.detach())) / abs(float(want.detach())), relative


# Measured over the seeds and settings below: float32 value 1.3e-7, gradients 2.3e-7; bfloat16 value 7.4e-4,
# gradients 5.3e-3 (one rounding of a bfloat16 is up to 3.9e-3). The bounds are four times that.
@pytest.mark.parametrize(
    ("dtype", "value_bound", "gradient_bound"),
    [(torch.float32, 5e-7, 1e-6), (torch.bfloat16, 3e-3, 2.1e-2)],
)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_low_precision_error_is_bounded(
    dtype: torch.dtype, value_bound: float, gradient_bound: float, tail: TailTreatment, temperature: float
) -> None:
    for seed in range(5):
        value, relative = errors(as_dtype(make_case(temperature=temperature, seed=seed), dtype), tail)
        assert value <= value_bound
        assert max(relative) <= gradient_bound


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters_dtype() -> None:
    case = as_dtype(make_case(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = chunked(case)
    low = as_dtype(case, torch.bfloat16)
    assert mixed.total.dtype == torch.float32
    assert torch.equal(mixed.total, chunked(low).total)
    assert not torch.equal(mixed.total, chunked(case).total)
    assert all(g.dtype == torch.float32 for g in gradients(case, mixed.total))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_extreme_logits_stay_finite(dtype: torch.dtype, tail: TailTreatment, temperature: float) -> None:
    case = as_dtype(make_case(temperature=temperature, spread=1e3), dtype)
    got = chunked(case, tail=tail)
    assert all(torch.isfinite(t) for t in got)
    assert all(torch.isfinite(g).all() for g in gradients(case, got.total))


def test_saturated_head_and_empty_tail_stay_finite() -> None:
    case = make_case()
    logprobs_NK = torch.full_like(case.targets.head_logprobs_NK, -65535 / 256)
    logprobs_NK[:, 0] = 0.0
    sure = SparseTargets(
        head_ids_NK=case.targets.head_ids_NK,
        head_logprobs_NK=logprobs_NK,
        log_normaliser_N=torch.zeros(ROWS, dtype=torch.float64),
        log_tail_mass_N=torch.full((ROWS,), -torch.inf, dtype=torch.float64),
    )
    got = chunked(case, targets=sure, temperature=1.0)
    assert all(torch.isfinite(t) for t in got)
    assert all(torch.isfinite(g).all() for g in gradients(case, got.total))


class Operations(TorchDispatchMode):
    """Remembers the most elements that any operation returned, in memory of its own or any, and counts products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most_elements = 0
        self.num_products = 0
        self.largest_fresh = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.most_elements = max(self.most_elements, leaf.numel())
                if not any(leaf is given for given in tree_leaves(args)):
                    self.largest_fresh = max(self.largest_fresh, leaf.numel())
        return result


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_exist_for_one_chunk_of_rows_at_a_time(temperature: float, dtype: torch.dtype) -> None:
    rows, vocab, width, chunk_rows = 200, 500, 4, 16
    case = as_dtype(make_case(temperature=temperature, rows=rows, vocab=vocab, width=width), dtype)
    with Operations() as operations:
        chunked(case, chunk_rows=chunk_rows).total.backward()
    assert operations.most_elements == chunk_rows * vocab


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_backward_copies_no_gradient_as_large_as_the_head(dtype: torch.dtype) -> None:
    case = as_dtype(make_case(rows=4, vocab=500, width=16), dtype)
    total = chunked(case).total * 3
    want = [3 * gradient for gradient in gradients(case, chunked(case).total)]
    with Operations() as operations:
        found = gradients(case, total)
    # Only where the weights are narrower than the sums is there a copy, the narrow one.
    assert (operations.largest_fresh == case.weight_VD.numel()) == (dtype == torch.bfloat16)
    for left, right in zip(found, want, strict=True):
        torch.testing.assert_close(left, right)


def test_a_graph_that_is_kept_gives_the_same_gradient_twice() -> None:
    case = make_case()
    total = chunked(case).total
    first = torch.autograd.grad(total, parameters(case), grad_outputs=torch.tensor(2.0).double(), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(total, parameters(case), retain_graph=True)
    for once, again, third in zip(first, second, gradients(case, total), strict=True):
        torch.testing.assert_close(once, 2 * again)
        assert torch.equal(again, third)
    assert all(torch.equal(*pair) for pair in zip(first, kept, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_grad_the_value_is_the_same_and_no_gradient_is_computed(temperature: float) -> None:
    case = make_case(temperature=temperature)
    num_chunks = math.ceil(int((case.kl_mask_N | (case.labels_N != -100)).sum()) / 7)
    with Operations() as with_gradient:
        want = chunked(case, chunk_rows=7)
    with torch.no_grad(), Operations() as without_gradient:
        got = chunked(case, chunk_rows=7)
    for found, wanted in zip(got, want, strict=True):
        assert torch.equal(found, wanted)
    assert not got.total.requires_grad
    assert (without_gradient.num_products, with_gradient.num_products) == (num_chunks, 3 * num_chunks)


def test_micro_batches_with_global_scales_sum_to_the_whole() -> None:
    case = make_case()
    whole = chunked(case)
    parts = []
    for rows in torch.split(torch.arange(ROWS), 9):
        targets = SparseTargets(
            head_ids_NK=case.targets.head_ids_NK[rows],
            head_logprobs_NK=case.targets.head_logprobs_NK[rows],
            log_normaliser_N=case.targets.log_normaliser_N[rows],
            log_tail_mass_N=case.targets.log_tail_mass_N[rows],
        )
        part = replace(case, hidden_ND=case.hidden_ND[rows], targets=targets)
        parts.append(chunked(part, labels_N=case.labels_N[rows], kl_mask_N=case.kl_mask_N[rows]))
    total = torch.stack([part.total for part in parts]).sum()
    torch.testing.assert_close(total, whole.total)
    for found, wanted in zip(gradients(case, total), gradients(case, whole.total), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"temperature": 0.0}, "bad-temperature"),
        ({"temperature": math.nan}, "bad-temperature"),
        ({"kl_scale": -1.0}, "bad-loss-weight"),
        ({"ce_scale": math.inf}, "bad-loss-weight"),
        ({"chunk_rows": 0}, "bad-chunk-rows"),
        ({"tail": "nothing"}, "bad-tail"),
        ({"vocab_size": VOCAB + 1}, "bad-vocabulary"),
        ({"vocab_size": 0}, "bad-vocabulary"),
        ({"vocab_size": KEPT - 1}, "bad-shape"),
        ({"vocab_size": VOCAB - 1}, "id-outside-vocabulary"),
        ({"labels_N": torch.full((ROWS,), VOCAB)}, "id-outside-vocabulary"),
        ({"labels_N": torch.zeros(ROWS + 1, dtype=torch.int64)}, "bad-shape"),
        ({"kl_mask_N": torch.ones(ROWS, 1, dtype=torch.bool)}, "bad-shape"),
    ],
)
def test_bad_settings_and_shapes_are_refused(changed: dict[str, Any], kind: str) -> None:
    with pytest.raises(BadInputError) as caught:
        chunked(make_case(), **changed)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "change",
    [
        lambda case: replace(case, hidden_ND=case.hidden_ND[:, 1:]),
        lambda case: replace(case, hidden_ND=case.hidden_ND[1:]),
        lambda case: replace(case, hidden_ND=case.hidden_ND[None]),
        lambda case: replace(case, bias_V=torch.zeros(VOCAB + 1)),
        lambda case: replace(
            case, targets=replace(case.targets, log_tail_mass_N=case.targets.log_tail_mass_N[:, None])
        ),
        lambda case: replace(
            case, targets=replace(case.targets, head_logprobs_NK=case.targets.head_logprobs_NK[:, 1:])
        ),
    ],
)
def test_mismatched_tensors_are_refused(change: Callable[[Case], Case]) -> None:
    with pytest.raises(BadInputError) as caught:
        chunked(change(make_case()))
    assert caught.value.kind == "bad-shape"


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
    with pytest.raises(BadInputError) as caught:
        pool_windows(torch.zeros(1, 12, 2), torch.tensor([12]), window)
    assert caught.value.kind == "bad-window"


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
