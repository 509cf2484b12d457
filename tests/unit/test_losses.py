"""The chunked head loss whatever its targets: chunks, masks, memory, precision of what it returns, and its guards."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.head_losses import (
    DIVERGENCES,
    FORMS,
    KEPT,
    REVERSE,
    ROWS,
    VOCAB,
    Case,
    as_dtype,
    chunked,
    gradients,
    make_case,
    parameters,
)
from tests.refusals import refused
from train.loss_divergences import FORWARD_KL, Divergence
from train.loss_targets import BucketTargets, DenseTargets, HeadLossTargets, LinearTargets

SHARED = ("uniform", "prototype", "residual")
"""Forms whose tail is one product with a shared distribution."""


def spoilt(targets: HeadLossTargets, rows_N: Tensor) -> HeadLossTargets:
    """The same targets, with no number in some rows."""

    def nan(values: Tensor) -> Tensor:
        return torch.where(rows_N.view(-1, *[1] * (values.ndim - 1)), torch.nan, values)

    if isinstance(targets, BucketTargets):
        return replace(targets, log_probs_NK=nan(targets.log_probs_NK), log_rest_N=nan(targets.log_rest_N))
    if isinstance(targets, DenseTargets):
        return replace(targets, hidden_ND=nan(targets.hidden_ND))
    shared = targets.shared
    return replace(
        targets,
        weights_NJ=nan(targets.weights_NJ),
        self_nats_N=nan(targets.self_nats_N),
        shared=None if shared is None else replace(shared, weight_N=nan(shared.weight_N)),
    )


@pytest.mark.parametrize(("form", "divergence"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_without_label_and_mask_get_zero_gradient_whatever_their_targets_hold(
    form: str, divergence: Divergence, temperature: float
) -> None:
    case = make_case(form, temperature=temperature)
    idle_N = (case.labels_N == -100) & ~case.kl_mask_N
    unmasked_N = ~case.kl_mask_N
    assert idle_N.any()
    if form == "gold":  # each label of these cases is masked in
        case = replace(case, labels_N=torch.where(torch.arange(ROWS) == 0, 3, case.labels_N))
        idle_N = (case.labels_N == -100) & ~case.kl_mask_N
    assert (unmasked_N & ~idle_N).any()
    broken = replace(case, targets=spoilt(case.targets, unmasked_N))
    got, want = chunked(broken, divergence=divergence), chunked(case, divergence=divergence)
    assert torch.equal(got.total, want.total)
    found, wanted = gradients(broken, got.total), gradients(case, want.total)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert not found[0][idle_N].any()
    assert found[0][~idle_N].any(dim=1).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "idle",
    [
        {"labels_N": torch.full((ROWS,), -100), "kl_mask_N": torch.zeros(ROWS, dtype=torch.bool)},
        {"kl_scale": 0.0, "ce_scale": 0.0},
    ],
)
def test_nothing_to_learn_gives_zero_loss_and_zero_gradients(form: str, idle: dict[str, Any]) -> None:
    case = make_case(form)
    got = chunked(case, **idle)
    assert [float(t.detach()) for t in got] == [0.0, 0.0, 0.0]
    assert not any(g.any() for g in gradients(case, got.total))


@pytest.mark.parametrize("form", FORMS)
def test_padded_vocabulary_rows_get_zero_gradient(form: str) -> None:
    case = make_case(form, padding=5)
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


@pytest.mark.parametrize("form", FORMS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters_dtype(form: str) -> None:
    case = as_dtype(make_case(form), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = chunked(case)
    low, whole = chunked(as_dtype(case, torch.bfloat16)), chunked(case)
    assert mixed.total.dtype == torch.float32
    torch.testing.assert_close(mixed.total, low.total, rtol=0.0, atol=0.0)
    torch.testing.assert_close(mixed.total, whole.total, rtol=1e-2, atol=0.0)
    assert not torch.equal(mixed.total, whole.total)
    assert all(g.dtype == torch.float32 for g in gradients(case, mixed.total))


FEW_ELEMENTS = {
    getattr(torch.ops.aten, name)
    for name in ("gather", "scatter_", "scatter_add_", "new_empty", "new_zeros", "zeros_like")
}


class Operations(TorchDispatchMode):
    """Remembers the most elements that any operation returned, in memory of its own or any, and counts products.

    Also counts the operations that read or write each element of a tensor of ``pass_elements``, products apart.
    """

    def __init__(self, pass_elements: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most_elements = 0
        self.num_products = 0
        self.largest_fresh = 0
        self.num_passes, self.pass_elements = 0, pass_elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_product = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        self.num_products += is_product
        if not is_product and not func.is_view and func.overloadpacket not in FEW_ELEMENTS:
            touched = [x.numel() for x in tree_leaves((result, args, kwargs)) if isinstance(x, Tensor)]
            self.num_passes += self.pass_elements in touched
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.most_elements = max(self.most_elements, leaf.numel())
                if not any(leaf is given for given in tree_leaves(args)):
                    self.largest_fresh = max(self.largest_fresh, leaf.numel())
        return result


@pytest.mark.parametrize(("form", "divergence"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, 8.0)])
def test_logits_exist_for_one_chunk_of_rows_at_a_time(
    form: str, divergence: Divergence, temperature: float, dtype: torch.dtype, softcap: float | None
) -> None:
    rows, vocab, width, chunk_rows = 200, 500, 4, 16
    case = as_dtype(make_case(form, temperature=temperature, rows=rows, vocab=vocab, width=width), dtype)
    with Operations() as operations:
        chunked(case, chunk_rows=chunk_rows, divergence=divergence, softcap=softcap).total.backward()
    assert operations.most_elements == chunk_rows * vocab


class Alive(TorchDispatchMode):
    """Remembers how many tensors of ``size`` elements there were at once, views apart."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.most = size, 0
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            fresh = isinstance(leaf, Tensor) and not any(leaf is given for given in tree_leaves((args, kwargs)))
            if fresh and not func.is_view and leaf.numel() == self.size:
                self._made.append(weakref.ref(leaf))
        self._made = [each for each in self._made if each() is not None]
        self.most = max(self.most, len(self._made))
        return result


@pytest.mark.parametrize(
    ("form", "temperature", "divergence", "most"),
    [
        ("bucket", 1.0, FORWARD_KL, 1),
        ("bucket", 2.0, FORWARD_KL, 2),
        ("prototype", 1.0, FORWARD_KL, 1),
        ("prototype", 2.0, FORWARD_KL, 2),
        ("dense", 1.0, FORWARD_KL, 3),
        ("bucket", 1.0, REVERSE, 1),
        ("bucket", 1.0, Divergence("js"), 1),
        ("dense", 1.0, Divergence("js"), 4),
    ],
)
def test_few_buffers_as_large_as_a_chunk_exist_at_once(
    form: str, temperature: float, divergence: Divergence, most: int
) -> None:
    rows, vocab, chunk_rows = 64, 500, 16
    case = as_dtype(make_case(form, temperature=temperature, rows=rows, vocab=vocab, width=4), torch.float32)
    everything = {"kl_mask_N": torch.ones(rows, dtype=torch.bool)}
    with Alive(chunk_rows * vocab) as alive:
        chunked(case, chunk_rows=chunk_rows, divergence=divergence, **everything).total.backward()
    assert alive.most == most


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


@pytest.fixture(params=["runs", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How shared distributions are met, whatever it costs."""
    monkeypatch.setattr("train.loss_shared.CPU_ROWS_PER_PRODUCT", {"runs": 1 << 40, "products": 0}[request.param])
    return str(request.param)


@pytest.mark.parametrize("form", sorted(SHARED))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_products_with_shared_distributions_say_what_passes_say(
    form: str, temperature: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(form, temperature=temperature, padding=3)
    got = chunked(case, chunk_rows=7)
    found = gradients(case, got.total)
    monkeypatch.setattr("train.losses.products_pay", lambda *_: way == "runs")
    want = chunked(case, chunk_rows=5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0.0)
    for one, other in zip(found, gradients(case, want.total), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_grad_the_value_is_the_same_and_no_gradient_is_computed(
    form: str, temperature: float, way: str
) -> None:
    case = make_case(form, temperature=temperature)
    num_chunks = math.ceil(int((case.kl_mask_N | (case.labels_N != -100)).sum()) / 7)
    with Operations() as with_gradient:
        want = chunked(case, chunk_rows=7)
    with torch.no_grad(), Operations() as without_gradient:
        got = chunked(case, chunk_rows=7)
    for found, wanted in zip(got, want, strict=True):
        assert torch.equal(found, wanted)
    assert not got.total.requires_grad
    # A teacher's logits are one more product of each chunk; shared distributions cost two of a whole call, or none.
    teacher, tails = num_chunks * (form == "dense"), int(form in SHARED and way == "products")
    assert without_gradient.num_products == num_chunks + teacher + tails
    assert with_gradient.num_products == 3 * num_chunks + teacher + 2 * tails


@pytest.mark.parametrize("ce_scale", [0.0, 1.0])
@pytest.mark.parametrize(("form", "passes"), [("bucket", 6), ("prototype", 5), ("points", 5), ("dense", 12)])
def test_passes_over_a_chunk_are_few_and_cross_entropy_needs_none_of_its_own(
    form: str, passes: int, ce_scale: float
) -> None:
    case = as_dtype(make_case(form, temperature=1.0, rows=16, vocab=500, width=4), torch.float32)
    with Operations(16 * 500) as operations:
        chunked(case, chunk_rows=16, ce_scale=ce_scale, kl_mask_N=torch.ones(16, dtype=torch.bool))
    assert operations.num_passes == passes


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_with_global_scales_sum_to_the_whole(form: str) -> None:
    case = make_case(form)
    whole = chunked(case)
    parts = []
    for rows in torch.split(torch.arange(ROWS), 9):
        part = replace(case, hidden_ND=case.hidden_ND[rows], targets=case.targets.rows(rows, torch.float64))
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
        ({"divergence": Divergence("backward")}, "bad-divergence"),  # type: ignore[arg-type]
        ({"softcap": 0.0}, "bad-softcap"),
        ({"softcap": math.nan}, "bad-softcap"),
        ({"divergence": Divergence("js", 0.0)}, "bad-divergence"),
        ({"divergence": Divergence("js", 1.0)}, "bad-divergence"),
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
    refused(kind, chunked, make_case(), **changed)


def of_targets(**changed: Callable[[Tensor], Tensor]) -> Callable[[Case], Case]:
    """Changes tensors of a case's targets."""

    def change(case: Case) -> Case:
        fields: dict[str, Any] = {name: f(getattr(case.targets, name)) for name, f in changed.items()}
        return replace(case, targets=replace(case.targets, **fields))

    return change


def of_shared(case: Case, **changed: Any) -> Case:
    assert isinstance(case.targets, LinearTargets)
    assert case.targets.shared is not None
    return replace(case, targets=replace(case.targets, shared=replace(case.targets.shared, **changed)))


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("bucket", lambda case: replace(case, hidden_ND=case.hidden_ND[:, 1:])),
        ("bucket", lambda case: replace(case, hidden_ND=case.hidden_ND[1:])),
        ("bucket", lambda case: replace(case, hidden_ND=case.hidden_ND[None])),
        ("bucket", lambda case: replace(case, bias_V=torch.zeros(VOCAB + 1))),
        ("bucket", of_targets(log_rest_N=lambda rest: rest[:, None])),
        ("bucket", of_targets(log_probs_NK=lambda log_probs: log_probs[:, 1:])),
        ("points", of_targets(weights_NJ=lambda weights: weights[:, 1:])),
        ("points", of_targets(self_nats_N=lambda nats: nats[1:])),
        ("dense", of_targets(hidden_ND=lambda hidden: hidden[1:])),
        ("dense", of_targets(hidden_ND=lambda hidden: hidden[:, 1:])),
        ("dense", of_targets(weight_VD=lambda weight: weight[1:])),
        ("prototype", lambda case: of_shared(case, tail_N=torch.zeros(ROWS + 1, dtype=torch.int64))),
        ("prototype", lambda case: of_shared(case, weight_N=torch.zeros(ROWS, 1))),
    ],
)
def test_mismatched_tensors_are_refused(form: str, change: Callable[[Case], Case]) -> None:
    refused("bad-shape", chunked, change(make_case(form)))


def test_a_shared_distribution_that_does_not_exist_is_refused() -> None:
    beyond = of_shared(make_case("prototype"), tail_N=torch.full((ROWS,), 99))
    assert "tail" in refused("id-outside-vocabulary", chunked, beyond)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("bucket", "dense")])
def test_reverse_kl_to_targets_with_zeros_is_refused(form: str) -> None:
    refused("bad-divergence", chunked, make_case(form), divergence=REVERSE)


@pytest.mark.parametrize(("form", "divergence"), DIVERGENCES)
def test_the_divergence_without_gradient_is_the_same(form: str, divergence: Divergence) -> None:
    case = make_case(form)
    with torch.no_grad():
        got = chunked(case, divergence=divergence)
    assert torch.equal(got.kl_sum, chunked(case, divergence=divergence).kl_sum)
