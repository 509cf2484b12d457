"""The distiller against a naive dense implementation through ``student(...).logits``, on tiny models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Model, PreTrainedModel

from cache_spec.targets import HeadTargets, HiddenTargets, PointTargets, Tail, Targets, dense
from tests.models import make_model
from tests.refusals import refusal
from train.distil_batch import (
    DistilBatch,
    HeadTensors,
    HiddenTensors,
    PointTensors,
    StoredTensors,
    TermCounts,
    count_terms,
)
from train.distiller import (
    Distiller,
    DistilOutput,
    LossWeights,
    check_student_head,
    default_chunk_rows,
    shift_labels,
)
from train.loss_divergences import Divergence
from train.loss_targets import BucketTargets
from train.teacher_targets import TeacherTargets

BLOCKS, TIME, WINDOW, KEPT, WIDTH = 3, 12, 4, 5, 16
VOCAB, PADDED, TAILS, TEACHER_WIDTH = 97, 104, 3, 6
TREATMENTS: list[Tail | None] = ["bucket", "renormalise", "uniform", "gold", "prototype", None]
ALL_TERMS = LossWeights(kl=0.6, ce=0.4, cosine=0.3, mse=0.2)
FAMILIES = ["gpt2", "llama", "gpt_neox", "qwen2", "phi"]
TRANSFORMED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
}
"""Families that cap or scale their logits, and their settings."""


def make_student(family: str = "gpt2", *, width: int = WIDTH, **changes: Any) -> PreTrainedModel:
    """Of a padded vocabulary; no row of its embedding is the padding's, which would get no gradient."""
    settings: dict[str, Any] = {"hidden_size": width, "vocab_size": PADDED, "pad_token_id": None} | changes
    if family == "phi":
        settings["num_key_value_heads"] = 2
    student = make_model(family, **settings)
    assert isinstance(student, PreTrainedModel)
    return student


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored_targets(kind: str, temperature: float) -> StoredTensors:
    """Of each form that a cache decodes into."""
    teacher_BTV = (2 * normal(3, BLOCKS, TIME, VOCAB)).log_softmax(dim=-1)
    logprobs_BTK, ids_BTK = teacher_BTV.topk(KEPT, dim=-1)
    tempered_BTV = (teacher_BTV / temperature).log_softmax(dim=-1)
    if kind == "points":
        probs_BTK = tempered_BTV.gather(-1, ids_BTK).softmax(dim=-1)
        return PointTensors(ids_BTJ=ids_BTK.int(), probs_BTJ=probs_BTK)
    if kind == "hidden":
        return HiddenTensors(hidden_BTD=normal(4, BLOCKS, TIME, TEACHER_WIDTH))
    rest_BT = tempered_BTV.scatter(-1, ids_BTK, -torch.inf).logsumexp(dim=-1)
    generator = torch.Generator().manual_seed(5)
    return HeadTensors(
        ids_BTK=ids_BTK.int(),
        logprobs_BTK=logprobs_BTK,
        tail_log_odds_BT=rest_BT - tempered_BTV.gather(-1, ids_BTK).logsumexp(dim=-1),
        prototype_BT=torch.randint(TAILS, (BLOCKS, TIME), generator=generator).int(),
        residual_ids_BTS=torch.randint(VOCAB, (BLOCKS, TIME, 2), generator=generator).int(),
        residual_weights_BTS=0.1 * normal(6, BLOCKS, TIME, 2),
    )


def make_batch(
    kind: str = "head",
    *,
    temperature: float = 2.0,
    teacher_width: int = WIDTH,
    lengths: tuple[int, ...] = (12, 7, 1),
) -> DistilBatch:
    return DistilBatch(
        input_ids_BT=torch.randint(VOCAB, (BLOCKS, TIME), generator=torch.Generator().manual_seed(3)).int(),
        lengths_B=torch.tensor(lengths),
        targets=stored_targets(kind, temperature),
        hidden_BWD=normal(7, BLOCKS, TIME // WINDOW, teacher_width),
    )


def make_targets(tail: Tail | None = "bucket", *, temperature: float = 2.0, vocab_size: int = VOCAB) -> TeacherTargets:
    return TeacherTargets(
        temperature=temperature,
        vocab_size=vocab_size,
        tail=tail,
        prototypes_CV=normal(8, TAILS, vocab_size).softmax(dim=1) if tail == "prototype" else None,
        output_head=(normal(9, vocab_size, TEACHER_WIDTH), normal(10, vocab_size)) if tail is None else None,
    )


def make_distiller(student: PreTrainedModel, targets: TeacherTargets | None = None, **changed: Any) -> Distiller:
    """In float64 and without dropout, to be compared exactly."""
    settings: dict[str, Any] = {"targets": targets or make_targets(), "teacher_width": WIDTH, "weights": ALL_TERMS}
    settings |= {"window": WINDOW, "chunk_rows": 5}
    return Distiller(student, **settings | changed).double().eval()


def as_numpy(stored: StoredTensors) -> Targets:
    if isinstance(stored, PointTensors):
        return PointTargets(ids_BTJ=stored.ids_BTJ.numpy(), probs_BTJ=stored.probs_BTJ.numpy())
    if isinstance(stored, HiddenTensors):
        return HiddenTargets(hidden_BTD=stored.hidden_BTD.numpy())
    return HeadTargets(**{name: getattr(stored, name).numpy() for name in HeadTargets.__slots__})


def meaning(targets: TeacherTargets, batch: DistilBatch) -> tuple[Tensor, Tensor]:
    """The distributions [B, T, V] that are taught, by the words of the format, and the sums of p * log(p)."""
    stored = as_numpy(batch.targets)
    without_draws = stored
    if isinstance(stored, HeadTargets):
        without_draws = replace(stored, residual_ids_BTS=None, residual_weights_BTS=None)

    def of(kept: Targets) -> Tensor:
        weight_VD, bias_V = targets.head_weight_VD, targets.head_bias_V
        return torch.from_numpy(
            dense(
                kept,
                temperature=targets.temperature,
                vocab_size=VOCAB,
                tail=targets.tail or "renormalise",
                prototypes_CV=None if targets.tails_CV is None else targets.tails_CV.numpy(),
                head=None if weight_VD is None or bias_V is None else (weight_VD.numpy(), bias_V.numpy()),
                gold_BT=np.roll(batch.input_ids_BT.numpy(), -1, axis=1),
            )
        )

    plain_BTV = of(without_draws)
    return of(stored), torch.xlogy(plain_BTV, plain_BTV).sum(dim=-1)


def naive_kl(distiller: Distiller, batch: DistilBatch, block: int, log_q_TV: Tensor) -> Tensor:
    """Sum over the real positions of one block that have a target, without the squared temperature."""
    targets, length = distiller.targets, len(log_q_TV)
    if targets.tail == "bucket":
        head = batch.targets
        assert isinstance(head, HeadTensors)
        kl = torch.zeros((), dtype=torch.float64)
        for t in range(length):
            ids_K = head.ids_BTK[block, t].long()
            in_head = torch.sigmoid(-head.tail_log_odds_BT[block, t])
            p_K = in_head * (head.logprobs_BTK[block, t] / targets.temperature).softmax(dim=0)
            outside_V = torch.ones(VOCAB, dtype=torch.bool).scatter(0, ids_K, False)
            p_M = torch.cat([p_K, (1 - in_head)[None]])
            log_q_M = torch.cat([log_q_TV[t, ids_K], log_q_TV[t][outside_V].logsumexp(dim=0)[None]])
            m_M = (p_M + log_q_M.exp()) / 2
            kl = (
                kl
                + {
                    "forward": (p_M * (p_M.log() - log_q_M)).sum(),
                    "reverse": (log_q_M.exp() * (log_q_M - p_M.log())).sum(),
                    "js": (p_M * (p_M / m_M).log() + log_q_M.exp() * (log_q_M - m_M.log())).sum() / 2,
                }[targets.divergence.kind]
            )
        return kl
    p_BTV, self_nats_BT = meaning(targets, batch)
    kl_T = self_nats_BT[block, :length] - (p_BTV[block, :length] * log_q_TV).sum(dim=-1)
    return kl_T[: length - 1 if targets.tail == "gold" else length].sum()


def naive(distiller: Distiller, batch: DistilBatch, counts: TermCounts) -> Tensor:
    """The loss block by block, unpadded, with the student's own logits and plain loops over windows."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("kl", "ce", "cosine", "mse")}
    temperature, weights = distiller.targets.temperature, distiller.weights
    for b, length in enumerate(batch.lengths_B.tolist()):
        ids_T = batch.input_ids_BT[b, :length].long()
        output: Any = distiller.student(input_ids=ids_T[None], output_hidden_states=True)
        logits_TV, hidden_TD = output.logits[0, :, :VOCAB], output.hidden_states[-1][0]
        log_q_TV = (logits_TV / temperature).log_softmax(dim=-1)
        sums["kl"] = sums["kl"] + temperature**2 * naive_kl(distiller, batch, b, log_q_TV)
        if length > 1:
            sums["ce"] = sums["ce"] + F.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum")
        for w, states in enumerate(torch.split(hidden_TD, WINDOW)):
            assert batch.hidden_BWD is not None
            pooled_D, teacher_D = states.mean(dim=0), batch.hidden_BWD[b, w]
            if distiller.projection is not None:
                pooled_D = distiller.projection.weight @ pooled_D
            sums["cosine"] = sums["cosine"] + 1 - pooled_D @ teacher_D / (pooled_D.norm() * teacher_D.norm())
            sums["mse"] = sums["mse"] + ((pooled_D - teacher_D) ** 2).mean()
    kl_count = counts.ce_tokens if distiller.targets.tail == "gold" else counts.kl_tokens
    loss = weights.kl * sums["kl"] / kl_count + weights.ce * sums["ce"] / counts.ce_tokens
    hidden = weights.cosine * sums["cosine"] + weights.mse * sums["mse"]
    return loss + hidden / counts.hidden_windows


def gradients(distiller: Distiller, loss: Tensor) -> dict[str, Tensor]:
    named = dict(distiller.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_equals_naive(distiller: Distiller, batch: DistilBatch, tolerance: float = 1e-10) -> None:
    counts = count_terms(batch.lengths_B, WINDOW)
    got: DistilOutput = distiller(batch, counts)
    want = naive(distiller, batch, counts)
    torch.testing.assert_close(got.loss, want, rtol=tolerance, atol=tolerance)
    found, wanted = gradients(distiller, got.loss), gradients(distiller, want)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=100 * tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_naive_dense_implementation(family: str, tied: bool) -> None:
    torch.manual_seed(0)
    student = make_student(family, tie_word_embeddings=tied)
    embeddings: Any = student.get_input_embeddings()
    head: Any = student.get_output_embeddings()
    assert (embeddings.weight is head.weight) == tied
    assert_equals_naive(make_distiller(student), make_batch())


@pytest.mark.parametrize("tail", [tail for tail in TREATMENTS if tail])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_tail_and_temperature_equals_naive(tail: Tail, temperature: float) -> None:
    torch.manual_seed(0)
    distiller = make_distiller(make_student(), make_targets(tail, temperature=temperature))
    # The uniform distribution is a float32 table, 1e-8 off.
    tolerance = 1e-6 if tail == "uniform" else 1e-10
    assert_equals_naive(distiller, make_batch(temperature=temperature), tolerance)


@pytest.mark.parametrize("kind", ["points", "hidden"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_points_and_hidden_states_equal_naive(kind: str, temperature: float) -> None:
    torch.manual_seed(0)
    distiller = make_distiller(make_student(), make_targets(None, temperature=temperature))
    assert_equals_naive(distiller, make_batch(kind, temperature=temperature))


def test_divergences_equal_naive_and_tokens_rounded_to_level_0_are_left_to_the_bucket() -> None:
    torch.manual_seed(0)
    batch = make_batch()
    assert isinstance(batch.targets, HeadTensors)
    rounded = replace(batch.targets, logprobs_BTK=batch.targets.logprobs_BTK.index_fill(2, torch.tensor([4]), -37.4))
    for kind in ("forward", "reverse", "js"):
        targets = make_targets()
        targets.divergence = Divergence(kind)
        bucket = targets(rounded, torch.zeros(BLOCKS * TIME, dtype=torch.long))
        assert isinstance(bucket, BucketTargets)
        assert bucket.log_probs_NK[:, 4].isneginf().all() == (kind != "forward")
        assert bucket.log_probs_NK[:, :4].isfinite().all()
        assert_equals_naive(make_distiller(make_student(), targets), batch)


def test_the_teachers_tables_are_no_parameters_and_in_no_checkpoint() -> None:
    for tail, tables in (("prototype", {"tails_CV", "tail_nats_C"}), (None, {"head_weight_VD", "head_bias_V"})):
        distiller = make_distiller(make_student(), make_targets(tail))  # type: ignore[arg-type]
        assert {name for name, table in distiller.targets.named_buffers() if table is not None} == tables
        assert not list(distiller.targets.parameters())
        assert not [name for name in distiller.state_dict() if name.startswith("targets")]
        assert {table.device.type for table in distiller.to("meta").targets.buffers()} == {"meta"}


@pytest.mark.parametrize("student_width", [8, 24])
def test_projection_bridges_other_widths_and_is_trained(student_width: int) -> None:
    torch.manual_seed(0)
    distiller = make_distiller(make_student(width=student_width))
    assert distiller.projection is not None
    assert tuple(distiller.projection.weight.shape) == (WIDTH, student_width)
    assert distiller.projection.bias is None
    assert_equals_naive(distiller, make_batch())
    loss = distiller(make_batch(), count_terms(make_batch().lengths_B, WINDOW)).loss
    assert gradients(distiller, loss)["projection.weight"].any()


def test_projection_exists_only_for_a_hidden_loss_between_different_widths() -> None:
    head_only = LossWeights(kl=1.0, ce=1.0)
    assert make_distiller(make_student()).projection is None
    assert make_distiller(make_student(width=8), weights=head_only).projection is None
    assert make_distiller(make_student(width=8), weights=LossWeights(kl=1.0, ce=1.0, mse=0.1)).projection is not None


@pytest.mark.parametrize("student_width", [8, WIDTH])
@pytest.mark.parametrize("window", [1, 4])
def test_hidden_losses_of_windows_and_of_single_tokens_equal_plain_ones(student_width: int, window: int) -> None:
    """Centred and not; a window of one token is a loss for each token."""
    torch.manual_seed(0)
    hidden_BWD = normal(7, BLOCKS, TIME // window, WIDTH)
    batch = replace(make_batch(), hidden_BWD=hidden_BWD)
    counts = count_terms(batch.lengths_B, window)
    for centre in (False, True):
        distiller = make_distiller(make_student(width=student_width), window=window, centre_hidden=centre)
        got: DistilOutput = distiller(batch, counts)
        cosine = mse = torch.zeros((), dtype=torch.float64)
        for b, length in enumerate(batch.lengths_B.tolist()):
            output: Any = distiller.student(input_ids=batch.input_ids_BT[b : b + 1, :length], output_hidden_states=True)
            states_TD = output.hidden_states[-1][0]
            student_WD = torch.stack([states.mean(dim=0) for states in states_TD.split(window)])
            if distiller.projection is not None:
                student_WD = distiller.projection(student_WD)
            teacher_WD = hidden_BWD[b, : len(student_WD)]
            if centre:
                student_WD, teacher_WD = (each - each.mean(dim=0) for each in (student_WD, teacher_WD))
            if not centre or len(student_WD) > 1:
                cosine = cosine + (1 - F.cosine_similarity(student_WD, teacher_WD, dim=1)).sum()
                mse = mse + (student_WD - teacher_WD).square().mean(dim=1).sum()
        torch.testing.assert_close(got.cosine_sum, cosine.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got.mse_sum, mse.detach(), rtol=1e-10, atol=1e-10)
        wanted = gradients(distiller, (0.3 * cosine + 0.2 * mse) / counts.hidden_windows)
        distiller.weights = replace(ALL_TERMS, kl=0.0, ce=0.0)
        for name, found in gradients(distiller, distiller(batch, counts).loss).items():
            torch.testing.assert_close(found, wanted[name], rtol=1e-8, atol=1e-12, msg=name)
            assert torch.isfinite(found).all()


def test_a_hidden_loss_that_its_schedule_leaves_out_costs_nothing_and_its_projection_still_gets_a_gradient() -> None:
    torch.manual_seed(0)
    distiller, batch = make_distiller(make_student(width=8)), make_batch()
    counts = count_terms(batch.lengths_B, WINDOW)
    distiller.weights = replace(ALL_TERMS, cosine=0.0, mse=0.0)
    got: DistilOutput = distiller(replace(batch, hidden_BWD=None), counts)
    assert float(got.cosine_sum) == float(got.mse_sum) == 0
    torch.testing.assert_close(
        got.loss.detach(), 0.6 * got.kl_sum / counts.kl_tokens + 0.4 * got.ce_sum / counts.ce_tokens
    )
    got.loss.backward()
    assert distiller.projection is not None
    assert distiller.projection.weight.grad is not None
    assert not distiller.projection.weight.grad.any()


def test_micro_batches_with_global_counts_sum_to_one_big_batch() -> None:
    torch.manual_seed(0)
    distiller, batch = make_distiller(make_student()), make_batch()
    counts = count_terms(batch.lengths_B, WINDOW)
    whole: DistilOutput = distiller(batch, counts)
    parts: list[DistilOutput] = []
    for b in range(BLOCKS):
        assert batch.hidden_BWD is not None
        assert isinstance(batch.targets, HeadTensors)
        head = {name: getattr(batch.targets, name)[b : b + 1] for name in HeadTensors.__slots__}
        part = DistilBatch(
            input_ids_BT=batch.input_ids_BT[b : b + 1],
            lengths_B=batch.lengths_B[b : b + 1],
            targets=HeadTensors(**head),
            hidden_BWD=batch.hidden_BWD[b : b + 1],
        )
        parts.append(distiller(part, counts))
    for found, wanted in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.stack(found).sum(), wanted, rtol=1e-10, atol=1e-12)
    summed = gradients(distiller, torch.stack([part.loss for part in parts]).sum())
    for name, wanted in gradients(distiller, whole.loss).items():
        torch.testing.assert_close(summed[name], wanted, rtol=1e-8, atol=1e-12)


def test_chunks_are_small_on_a_cpu() -> None:
    assert default_chunk_rows(50_257, torch.device("cpu")) == 83
    assert default_chunk_rows(50_257, torch.device("cuda")) == 333
    assert default_chunk_rows(1 << 30, torch.device("cpu")) == 1


def test_loss_is_the_weighted_sum_of_the_logged_terms() -> None:
    torch.manual_seed(0)
    batch = make_batch()
    counts = count_terms(batch.lengths_B, WINDOW)
    got: DistilOutput = make_distiller(make_student())(batch, counts)
    assert not any(term.requires_grad for term in got[1:])
    loss = 0.6 * got.kl_sum / counts.kl_tokens + 0.4 * got.ce_sum / counts.ce_tokens
    loss = loss + (0.3 * got.cosine_sum + 0.2 * got.mse_sum) / counts.hidden_windows
    torch.testing.assert_close(got.loss.detach(), loss)


@pytest.mark.parametrize("tail", [tail for tail in TREATMENTS if tail])
def test_what_padding_holds_changes_nothing(tail: Tail) -> None:
    torch.manual_seed(0)
    distiller, batch = make_distiller(make_student(), make_targets(tail)), make_batch()
    counts = count_terms(batch.lengths_B, WINDOW)
    _, real_BT = shift_labels(batch.input_ids_BT, batch.lengths_B)
    assert isinstance(batch.targets, HeadTensors)
    head = replace(
        batch.targets,
        logprobs_BTK=torch.where(real_BT[:, :, None], batch.targets.logprobs_BTK, torch.nan),
        tail_log_odds_BT=torch.where(real_BT, batch.targets.tail_log_odds_BT, torch.nan),
    )
    other = replace(batch, input_ids_BT=torch.where(real_BT, batch.input_ids_BT, 0), targets=head)
    assert torch.equal(distiller(batch, counts).loss, distiller(other, counts).loss)


def test_block_of_one_token_has_no_label_and_stays_finite() -> None:
    torch.manual_seed(0)
    batch = make_batch(lengths=(1, 1, 1))
    counts = count_terms(batch.lengths_B, WINDOW)
    assert counts == TermCounts(tokens=3, kl_tokens=3, ce_tokens=0, hidden_windows=3)
    got: DistilOutput = make_distiller(make_student())(batch, counts)
    assert torch.isfinite(got.loss)
    assert float(got.ce_sum) == 0


def test_every_parameter_gets_a_gradient_when_only_a_hidden_loss_has_weight() -> None:
    torch.manual_seed(0)
    distiller, batch = (
        make_distiller(make_student("llama"), weights=LossWeights(kl=0.0, ce=0.0, cosine=1.0)),
        make_batch(),
    )
    distiller(batch, count_terms(batch.lengths_B, WINDOW)).loss.backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_bf16_autocast_is_close_to_float32_and_gives_float32_gradients() -> None:
    torch.manual_seed(0)
    distiller, batch = make_distiller(make_student("llama", tie_word_embeddings=True)).float(), make_batch()
    counts = count_terms(batch.lengths_B, WINDOW)
    exact: DistilOutput = distiller(batch, counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed: DistilOutput = distiller(batch, counts)
    torch.testing.assert_close(mixed.loss, exact.loss, rtol=1e-2, atol=0.0)
    assert mixed.loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients(distiller, mixed.loss).values())


def test_shift_pairs_each_position_with_the_next_real_token() -> None:
    input_ids_BT = torch.tensor([[10, 11, 12, 13], [20, 21, 0, 0], [30, 0, 0, 0]])
    labels_BT, kl_mask_BT = shift_labels(input_ids_BT, torch.tensor([4, 2, 1]))
    assert labels_BT.tolist() == [[11, 12, 13, -100], [21, -100, -100, -100], [-100] * 4]
    assert kl_mask_BT.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("window", [1, 4, 12])
def test_counts_agree_with_masks(window: int) -> None:
    batch = make_batch()
    labels_BT, kl_mask_BT = shift_labels(batch.input_ids_BT, batch.lengths_B)
    counts = count_terms(batch.lengths_B, window)
    assert counts.kl_tokens == int(kl_mask_BT.sum())
    assert counts.ce_tokens == int((labels_BT != -100).sum())
    assert counts.hidden_windows == int(kl_mask_BT.view(BLOCKS, -1, window).any(dim=-1).sum())


@pytest.mark.parametrize("kind", ["head", "points", "hidden"])
def test_batch_moves_with_and_without_hidden_states(kind: str) -> None:
    batch = make_batch(kind)
    moved = batch.to("meta")
    assert moved.hidden_BWD is not None
    targets = [getattr(moved.targets, name) for name in type(moved.targets).__slots__]
    tensors = [moved.input_ids_BT, moved.lengths_B, moved.hidden_BWD, *targets]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert replace(batch, hidden_BWD=None).to("cpu").hidden_BWD is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_heads_are_accepted_and_the_student_is_left_as_it_was(family: str, dtype: torch.dtype) -> None:
    student = make_student(family, tie_word_embeddings=True)
    for parameter in student.parameters():
        parameter.data = parameter.data.to(dtype)
    ids = torch.arange(5)[None]
    student.train().base_model.train(False)
    before = {name: module.training for name, module in student.named_modules()}
    logits = student(input_ids=ids).logits
    check_student_head(student)
    assert {name: module.training for name, module in student.named_modules()} == before
    assert torch.equal(student(input_ids=ids).logits, logits)


@pytest.mark.parametrize("family", TRANSFORMED)
@pytest.mark.parametrize("tail", ["bucket", "prototype", None])
@pytest.mark.parametrize("tied", [True, False])
def test_capped_and_scaled_logits_equal_naive(family: str, tail: Tail | None, tied: bool) -> None:
    torch.manual_seed(0)
    student = make_student(family, std=0.5, tie_word_embeddings=tied, **TRANSFORMED[family])
    check_student_head(student)
    distiller = make_distiller(student, make_targets(tail))
    # Norms of these families are in float32, of padded blocks and of unpadded ones.
    assert_equals_naive(distiller, make_batch("hidden" if tail is None else "head"), 1e-6)


@pytest.mark.parametrize("family", TRANSFORMED)
def test_a_transform_that_the_config_hides_or_that_is_not_wanted_is_refused(family: str) -> None:
    student = make_student(family, **TRANSFORMED[family])
    assert refusal(check_student_head, student, linear=True).kind == "unsupported-head"
    hidden = make_student(family, **TRANSFORMED[family])
    hidden.config.logit_scale = 2.0
    assert refusal(check_student_head, hidden).kind == "unsupported-head"


def test_a_transform_that_only_the_config_has_is_refused() -> None:
    student = make_student("gpt2")
    student.config.final_logit_softcapping = 5.0
    assert refusal(check_student_head, student).kind == "unsupported-head"


def test_a_transform_before_the_head_is_refused() -> None:
    assert refusal(check_student_head, make_student("bert", is_decoder=True)).kind == "unsupported-head"


def test_gemma2_without_soft_capping_is_accepted() -> None:
    check_student_head(make_student("gemma2", head_dim=8, final_logit_softcapping=None), linear=True)


def test_model_without_output_head_is_refused() -> None:
    body = GPT2Model(GPT2Config(vocab_size=PADDED, n_embd=8, n_layer=1, n_head=1, n_positions=32))
    for refusing in (check_student_head, make_distiller):
        assert refusal(refusing, body).kind == "unsupported-head"


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"targets": make_targets(vocab_size=PADDED + 1)}, "student-vocabulary"),
        ({"window": None}, "no-hidden-states"),
    ],
)
def test_student_or_weights_that_do_not_fit_the_cache_are_refused(changed: dict[str, Any], kind: str) -> None:
    assert refusal(make_distiller, make_student(), **changed).kind == kind


@pytest.mark.parametrize(
    ("hidden_BWD", "kind"),
    [(None, "no-hidden-states"), (torch.zeros(BLOCKS, TIME // WINDOW, WIDTH + 1), "bad-shape")],
)
def test_batch_whose_hidden_states_do_not_fit_is_refused(hidden_BWD: Tensor | None, kind: str) -> None:
    batch = replace(make_batch(), hidden_BWD=hidden_BWD)
    assert refusal(make_distiller(make_student()), batch, count_terms(batch.lengths_B, WINDOW)).kind == kind
