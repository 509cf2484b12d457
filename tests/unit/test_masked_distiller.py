"""Students of masked language models: loss and gradients are those of plain, dense code, block by block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import MASKED_FAMILIES, make_model
from tests.refusals import refusal
from train.distil_batch import DistilBatch, HiddenTensors, MaskedTensors, PointTensors, TermCounts
from train.distiller import Distiller, LossWeights, check_student_head, labels_of
from train.teacher_targets import TeacherTargets

BLOCKS, TIME, VOCAB, ROWS, WIDTH, TEACHER_WIDTH, WINDOW = 3, 12, 100, 120, 32, 20, 4
WEIGHTS = LossWeights(kl=0.6, ce=0.4, cosine=0.3, mse=0.2)
TEMPERATURE = 2.0


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_student(family: str) -> Any:
    return make_model(family, std=0.2).double().eval()


def make_batch(kind: str = "hidden", lengths: tuple[int, ...] = (12, 7, 3), *, every: bool = False) -> DistilBatch:
    """Random blocks; of every third token something else is read, and its target, or every real one, is kept."""
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(5, VOCAB, (BLOCKS, TIME), generator=generator).int()
    real_BT = torch.arange(TIME) < torch.tensor(lengths)[:, None]
    selected_BT = (torch.arange(TIME) % 3 == 1).expand(BLOCKS, TIME) & real_BT
    read_ids_BT = torch.where(selected_BT, 4, ids_BT).int()
    teacher_BTV = normal(5, BLOCKS, TIME, VOCAB).softmax(dim=-1)
    probs_BTJ, chosen_BTJ = teacher_BTV.topk(6, dim=-1)
    points = PointTensors(ids_BTJ=chosen_BTJ.int(), probs_BTJ=probs_BTJ / probs_BTJ.sum(-1, keepdim=True))
    return DistilBatch(
        input_ids_BT=ids_BT,
        lengths_B=torch.tensor(lengths),
        targets=HiddenTensors(hidden_BTD=normal(4, BLOCKS, TIME, TEACHER_WIDTH)) if kind == "hidden" else points,
        hidden_BWD=normal(7, BLOCKS, TIME // WINDOW, TEACHER_WIDTH),
        masked=MaskedTensors(
            read_ids_BT=read_ids_BT, selected_BT=selected_BT, kept_BT=real_BT.clone() if every else selected_BT
        ),
    )


def make_distiller(student: Any, **changes: Any) -> Distiller:
    targets = TeacherTargets(
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
        tail=None,
        output_head=(normal(9, VOCAB, TEACHER_WIDTH), normal(10, VOCAB)),
    )
    torch.manual_seed(1)
    settings: dict[str, Any] = {"weights": WEIGHTS, "window": WINDOW, "chunk_rows": 3} | changes
    return Distiller(student, targets=targets, teacher_width=TEACHER_WIDTH, **settings).double().eval()


def teacher_probs(distiller: Distiller, batch: DistilBatch, block: int, length: int) -> Tensor:
    if isinstance(batch.targets, HiddenTensors):
        weight, bias = distiller.targets.head_weight_VD, distiller.targets.head_bias_V
        assert weight is not None
        return (F.linear(batch.targets.hidden_BTD[block, :length], weight, bias) / TEMPERATURE).softmax(dim=-1)
    assert isinstance(batch.targets, PointTensors)
    zeros = torch.zeros(length, VOCAB, dtype=torch.float64)
    return zeros.scatter(-1, batch.targets.ids_BTJ[block, :length].long(), batch.targets.probs_BTJ[block, :length])


def naive(distiller: Distiller, batch: DistilBatch, counts: TermCounts) -> Tensor:
    """Each block alone and without its padding, by the student's own logits; nothing is shifted."""
    masked, total = batch.masked, torch.zeros((), dtype=torch.float64)
    assert masked is not None
    assert batch.hidden_BWD is not None
    for block, length in enumerate(batch.lengths_B.tolist()):
        ids = masked.read_ids_BT[block : block + 1, :length].long()
        output: Any = distiller.student(input_ids=ids, output_hidden_states=True)
        logits_TV, hidden_TD = output.logits[0, :, :VOCAB], output.hidden_states[-1][0]
        p_TV, log_q_TV = teacher_probs(distiller, batch, block, length), (logits_TV / TEMPERATURE).log_softmax(dim=-1)
        kl_T = torch.special.xlogy(p_TV, p_TV).sum(-1) - (p_TV * log_q_TV).sum(-1)
        kept, selected = masked.kept_BT[block, :length], masked.selected_BT[block, :length]
        total = total + WEIGHTS.kl * TEMPERATURE**2 * kl_T[kept].sum() / counts.kl_tokens
        labels = batch.input_ids_BT[block, :length].long()[selected]
        total = total + WEIGHTS.ce * F.cross_entropy(logits_TV[selected], labels, reduction="sum") / counts.ce_tokens
        for window, states in enumerate(torch.split(hidden_TD, WINDOW)):
            assert distiller.projection is not None
            mine, theirs = distiller.projection.weight @ states.mean(dim=0), batch.hidden_BWD[block, window]
            cosine = 1 - mine @ theirs / (mine.norm() * theirs.norm())
            total = (
                total + (WEIGHTS.cosine * cosine + WEIGHTS.mse * ((mine - theirs) ** 2).mean()) / counts.hidden_windows
            )
    return total


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("kind", ["hidden", "points"])
@pytest.mark.parametrize("family", MASKED_FAMILIES)
def test_loss_and_gradients_equal_a_naive_dense_implementation(family: str, kind: str, every: bool) -> None:
    distiller, batch = make_distiller(make_student(family)), make_batch(kind, every=every)
    counts = distiller.counts([batch])
    got, want = distiller(batch, counts).loss, naive(distiller, batch, counts)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    named = dict(distiller.named_parameters())
    assert any(name.endswith("bias") and tensor.shape == (ROWS,) for name, tensor in named.items())
    found, wanted = (
        torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        for loss in (got, want)
    )
    for name, mine, theirs in zip(named, found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, msg=name)


def test_counts_are_of_selected_and_kept_positions_and_add_up() -> None:
    distiller, batch = make_distiller(make_student("bert")), make_batch(every=True)
    counts = distiller.counts([batch])
    assert counts == TermCounts(tokens=22, kl_tokens=22, ce_tokens=4 + 2 + 1, hidden_windows=3 + 2 + 1)
    only = distiller.counts([make_batch()])
    assert (only.tokens, only.kl_tokens, only.ce_tokens) == (22, 7, 7)
    assert distiller.counts([batch, make_batch()]) == counts + only
    parts = []
    for block in range(BLOCKS):
        here = slice(block, block + 1)
        assert batch.hidden_BWD is not None
        assert isinstance(batch.targets, HiddenTensors)
        assert batch.masked is not None
        part = replace(
            batch,
            input_ids_BT=batch.input_ids_BT[here],
            lengths_B=batch.lengths_B[here],
            targets=HiddenTensors(hidden_BTD=batch.targets.hidden_BTD[here]),
            hidden_BWD=batch.hidden_BWD[here],
            masked=MaskedTensors(
                read_ids_BT=batch.masked.read_ids_BT[here],
                selected_BT=batch.masked.selected_BT[here],
                kept_BT=batch.masked.kept_BT[here],
            ),
        )
        parts.append(part)
    torch.testing.assert_close(sum(distiller(part, counts).loss for part in parts), distiller(batch, counts).loss)
    joined = parts[0].joined(parts[1:])
    torch.testing.assert_close(distiller(joined, counts).loss, distiller(batch, counts).loss)


def test_a_block_that_counts_nothing_has_a_loss_and_gradients_of_zero() -> None:
    distiller, batch = make_distiller(make_student("bert")), make_batch(every=True)
    counts = distiller.counts([batch])
    idle = replace(batch, lengths_B=torch.zeros_like(batch.lengths_B))
    assert distiller.counts([idle]) == TermCounts(tokens=0, kl_tokens=0, ce_tokens=0, hidden_windows=0)
    loss = distiller(idle, counts).loss
    loss.backward()
    assert loss.detach() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in distiller.parameters())
    labels_BT, kept_BT = labels_of(idle)
    assert (labels_BT == -100).all()
    assert not kept_BT.any()


@pytest.mark.parametrize("family", MASKED_FAMILIES)
def test_what_lies_behind_a_block_and_under_the_mask_changes_nothing(family: str) -> None:
    distiller, batch = make_distiller(make_student(family)), make_batch(every=True)
    counts, masked = distiller.counts([batch]), batch.masked
    assert masked is not None
    want = distiller(batch, counts).loss
    padding_BT = torch.arange(TIME) >= batch.lengths_B[:, None]
    padded = replace(masked, read_ids_BT=torch.where(padding_BT, 50, masked.read_ids_BT))
    torch.testing.assert_close(distiller(replace(batch, masked=padded), counts).loss, want, rtol=0, atol=0)
    hidden = torch.where(masked.selected_BT, batch.input_ids_BT, 50).int()
    same_ce = distiller(replace(batch, input_ids_BT=hidden), counts)
    torch.testing.assert_close(same_ce.loss, want, rtol=0, atol=0)


@pytest.mark.parametrize("family", MASKED_FAMILIES)
def test_a_head_that_does_more_than_transform_and_multiply_is_refused(family: str) -> None:
    student = make_student(family)
    check_student_head(student)
    student.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0] + 1,))
    assert refusal(check_student_head, student).kind == "unsupported-head"


def test_a_head_of_another_make_is_refused() -> None:
    student = make_student("bert")
    student.cls, student.own = torch.nn.Identity(), student.cls
    del student.cls
    student.get_output_embeddings = lambda: student.own.predictions.decoder
    assert "RoBERTa" in str(refusal(check_student_head, student))
