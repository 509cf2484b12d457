"""One module that holds the student and its loss, so that DDP and FSDP wrap both.

In: a batch of blocks with the teacher's cached targets, and the global counts of the accumulation window. Out: the
loss to call ``backward`` on, and the detached sum of each term.

Legend: B batch, T time, N rows (B x T), V vocabulary, D width, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cache_spec.errors import BadInputError
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from cache_spec.targets import Tail
from train.distil_batch import DistilBatch, TermCounts, count_terms
from train.hidden_losses import centred, cosine_sum, mse_sum, pool_windows
from train.lm_kind import own_logits, refuse_other_kind, student_states
from train.loss_divergences import FORWARD_KL, Divergence
from train.loss_targets import NO_LABEL
from train.losses import head_loss
from train.teacher_targets import TeacherTargets

CHUNK_BYTES = 1 << 26
CPU_CHUNK_BYTES = 1 << 24
"""Of float32 logits. A processor is as fast with small chunks; others spend their time on the head's gradient then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """The weight of each term in the loss; each term is a mean over its own count."""

    kl: float
    """Of the squared temperature times the divergence from the teacher, per real token that has a target."""
    ce: float
    """Of the cross-entropy at temperature 1, per real token that has a next one, or per selected one of masked text."""
    cosine: float = 0.0
    """Of 1 - cosine between pooled hidden states, per window."""
    mse: float = 0.0
    """Of the mean squared difference of pooled hidden states, per window."""

    @property
    def uses_hidden(self) -> bool:
        """Whether any hidden loss has weight."""
        return self.cosine > 0 or self.mse > 0


class LogitTransform(NamedTuple):
    """What a model does to the logits of its output head: first a factor, then a soft cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class DistilOutput(NamedTuple):
    """The loss and its terms, 0-dim tensors; a term's mean is its sum over micro-batches and ranks by its count."""

    loss: Tensor
    """Differentiable: the weighted terms, each divided by its global count."""
    kl_sum: Tensor
    """Detached, nats, squared temperature included."""
    ce_sum: Tensor
    """Detached, nats."""
    cosine_sum: Tensor
    """Detached."""
    mse_sum: Tensor
    """Detached."""


class Distiller(nn.Module):
    """A student, its projection where the teacher's width differs, and the loss against cached targets.

    Args:
        student: any causal or masked language model that passes :func:`check_student_head`.
        targets: makes targets of the loss from cached ones; its vocabulary is what teacher and student share, and
            further rows of the student's head are padding.
        teacher_width: D of the teacher's hidden states.
        weights: of the loss.
        window: tokens a pooled hidden state stands for; needed when a hidden loss has weight.
        centre_hidden: whether pooled states, the student's and the teacher's, lose their mean over each block. A block
            of one window is then left out of hidden losses.
        chunk_rows: rows of logits that exist at a time; by default about 16 MiB of float32 on a CPU, else 64 MiB.

    Raises:
        BadInputError: the student has no output head or too small a vocabulary, or a hidden loss has no window.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        targets: TeacherTargets,
        teacher_width: int,
        weights: LossWeights,
        window: int | None = None,
        centre_hidden: bool = False,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        weight_VD, _ = output_head(student)
        vocab_size = targets.vocab_size
        if weight_VD.shape[0] < vocab_size:
            found = f"{weight_VD.shape[0]} rows"
            raise BadInputError("student-vocabulary", "student", expected=f"at least {vocab_size} rows", found=found)
        if weights.uses_hidden and window is None:
            raise BadInputError(
                "no-hidden-states",
                "loss weights",
                expected="a cache with hidden states",
                found=f"cosine {weights.cosine}, mse {weights.mse} and no window",
                hint="set both weights to 0 or cache hidden states",
            )
        self.student = student
        self.targets, self.window, self.centre_hidden = targets, window, centre_hidden
        self.peak_weights = weights
        """What a schedule starts from; a hidden loss without weight here is never computed."""
        self.weights = weights
        """Of the next step."""
        self.chunk_rows = chunk_rows
        self._transform = logit_transform(student)
        student_width = weight_VD.shape[1]
        self.projection: nn.Linear | None = None
        if weights.uses_hidden and student_width != teacher_width:
            self.projection = nn.Linear(student_width, teacher_width, bias=False, device=weight_VD.device)

    @classmethod
    def of_cache(
        cls,
        reader: CacheReader,
        student: PreTrainedModel,
        *,
        weights: LossWeights,
        temperature: float = 1.0,
        tail: Tail | None = None,
        divergence: Divergence = FORWARD_KL,
        centre_hidden: bool = False,
        chunk_rows: int | None = None,
    ) -> Distiller:
        """A student and its loss against one cache, checked to fit it; BadInputError where they do not."""
        manifest = reader.manifest
        refuse_other_kind(student.config, manifest, _name(student))
        check_student_head(student)
        check_centring(manifest, centre_hidden)
        return cls(
            student,
            targets=TeacherTargets.of_cache(reader, temperature=temperature, tail=tail, divergence=divergence),
            teacher_width=manifest.teacher.width,
            weights=weights,
            window=manifest.hidden.window if manifest.hidden else None,
            centre_hidden=centre_hidden,
            chunk_rows=chunk_rows,
        )

    def forward(self, batch: DistilBatch, counts: TermCounts) -> DistilOutput:
        """The loss of one micro-batch; losses of all micro-batches and ranks of a window add up to the window's loss.

        DDP and FSDP average gradients over ranks: multiply the loss by the number of ranks before ``backward``.
        """
        read_ids_BT = batch.input_ids_BT if batch.masked is None else batch.masked.read_ids_BT
        hidden_BTD, head_hidden_BTD = student_states(self.student, read_ids_BT.long(), batch.lengths_B)
        labels_BT, kl_mask_BT = labels_of(batch)
        labels_N, kl_mask_N = labels_BT.flatten(), kl_mask_BT.flatten()
        if self.targets.tail == "gold":
            # A tail that goes to the text's own token means nothing where there is none.
            kl_mask_N = kl_mask_N & (labels_N != NO_LABEL)
        weight_VD, bias_V = output_head(self.student)
        if self._transform.scale != 1.0:
            # A factor on logits is one on what they are made of.
            head_hidden_BTD = head_hidden_BTD * self._transform.scale
            bias_V = None if bias_V is None else bias_V * self._transform.scale
        # Called even when both scales are 0: every parameter then gets a gradient, which DDP insists on.
        head = head_loss(
            head_hidden_BTD.flatten(0, 1),
            weight_VD,
            bias_V,
            targets=self.targets(batch.targets, labels_N),
            labels_N=labels_N,
            kl_mask_N=kl_mask_N,
            temperature=self.targets.temperature,
            kl_scale=_scale(self.weights.kl, self.kl_count(counts)),
            ce_scale=_scale(self.weights.ce, counts.ce_tokens),
            chunk_rows=self.chunk_rows or default_chunk_rows(self.targets.vocab_size, hidden_BTD.device),
            vocab_size=self.targets.vocab_size,
            divergence=self.targets.divergence,
            softcap=self._transform.cap,
        )
        loss, cosine, mse = head.total, torch.zeros_like(head.kl_sum), torch.zeros_like(head.kl_sum)
        if self.weights.uses_hidden:
            student_BWD, teacher_BWD, mask_BW = self._pooled(hidden_BTD, batch)
            if self.weights.cosine > 0:
                cosine = cosine_sum(student_BWD, teacher_BWD, mask_BW)
                loss = loss + _scale(self.weights.cosine, counts.hidden_windows) * cosine
            if self.weights.mse > 0:
                mse = mse_sum(student_BWD, teacher_BWD, mask_BW)
                loss = loss + _scale(self.weights.mse, counts.hidden_windows) * mse
        elif self.projection is not None:
            # While a schedule leaves it out, DDP still waits for its gradient.
            loss = loss + 0.0 * self.projection.weight.sum()
        return DistilOutput(loss, head.kl_sum, head.ce_sum, cosine.detach(), mse.detach())

    def counts(self, batches: Sequence[DistilBatch]) -> TermCounts:
        """The counts of micro-batches, by which their losses add up to the loss of all; ranks add theirs first."""
        first, *others = (count_terms(batch.lengths_B, self.window, batch.masked) for batch in batches)
        return sum(others, first)

    def kl_count(self, counts: TermCounts) -> float:
        """What the divergence is divided by: positions that have a target."""
        return counts.ce_tokens if self.targets.tail == "gold" else counts.kl_tokens

    def _pooled(self, hidden_BTD: Tensor, batch: DistilBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(student's, in the teacher's width; teacher's; which windows count)."""
        assert self.window is not None
        if batch.hidden_BWD is None:
            raise BadInputError("no-hidden-states", "batch", expected="pooled hidden states", found="none")
        student_BWD, mask_BW = pool_windows(hidden_BTD, batch.lengths_B, self.window)
        if self.projection is not None:
            # A linear map without bias commutes with the mean: pooling first makes it `window` times cheaper.
            student_BWD = self.projection(student_BWD)
        if student_BWD.shape != batch.hidden_BWD.shape:
            expected, found = tuple(student_BWD.shape), tuple(batch.hidden_BWD.shape)
            raise BadInputError("bad-shape", "hidden", expected=expected, found=found)
        # Under autocast the projection's output is low precision; sums over windows are not.
        student_BWD, teacher_BWD = (
            each_BWD.to(torch.promote_types(each_BWD.dtype, torch.float32))
            for each_BWD in (student_BWD, batch.hidden_BWD)
        )
        if self.centre_hidden:
            student_BWD, teacher_BWD = centred(student_BWD, mask_BW), centred(teacher_BWD, mask_BW)
            mask_BW = mask_BW & (mask_BW.sum(dim=1, keepdim=True) > 1)
        return student_BWD, teacher_BWD, mask_BW


def default_chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits of a chunk where none are asked for."""
    return max(1, (CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES) // (4 * vocab_size))


def _scale(weight: float, count: float) -> float:
    """The factor of a term's sum; a term without anything to count is left out."""
    return weight / count if count > 0 else 0.0


def check_centring(manifest: Manifest, centre_hidden: bool) -> None:
    """Refuse, with BadInputError ``bad-window``, centring where a block has one window: nothing would be left of it."""
    if centre_hidden and manifest.hidden is not None and manifest.blocks.block_tokens < 2 * manifest.hidden.window:
        raise BadInputError(
            "bad-window",
            "centring of hidden states",
            expected=f"two windows or more in a block of {manifest.blocks.block_tokens} tokens",
            found=f"windows of {manifest.hidden.window}",
            hint="leave hidden_centre out",
        )


def shift_labels(input_ids_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Labels int64 [B, T] and KL mask bool [B, T] for blocks of ``lengths_B`` real tokens: the one place that shifts.

    The label at t is token t + 1, and -100 at the last real position and in padding. Cached targets are stored
    unshifted (position t holds what the teacher predicts after token t), so the mask holds wherever t is real.
    """
    time = input_ids_BT.shape[1]
    position_1T = torch.arange(time, device=input_ids_BT.device).unsqueeze(0)
    lengths_B1 = lengths_B.unsqueeze(1)
    next_BT = torch.roll(input_ids_BT, shifts=-1, dims=1)
    return torch.where(position_1T + 1 < lengths_B1, next_BT, NO_LABEL), position_1T < lengths_B1


def labels_of(batch: DistilBatch) -> tuple[Tensor, Tensor]:
    """Labels int64 [B, T] and KL mask bool [B, T] of a batch: next tokens, or, of masked text, what was selected."""
    ids_BT, masked = batch.input_ids_BT.long(), batch.masked
    if masked is None:
        return shift_labels(ids_BT, batch.lengths_B)
    real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < batch.lengths_B.unsqueeze(1)
    return torch.where(masked.selected_BT & real_BT, ids_BT, NO_LABEL), masked.kept_BT & real_BT


def output_head(student: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] or None of the student's output head; raises BadInputError when it has none."""
    head: Any = student.get_output_embeddings()
    weight_VD = getattr(head, "weight", None)
    if not isinstance(weight_VD, Tensor) or weight_VD.ndim != 2:
        found = "none" if head is None else type(head).__name__
        raise BadInputError("unsupported-head", _name(student), expected="a linear output head", found=found)
    return weight_VD, getattr(head, "bias", None)


def logit_transform(student: PreTrainedModel) -> LogitTransform:
    """What the model's config says of its logits; ``check_student_head`` finds out whether that is so."""
    config: Any = student.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = (1.0 if factor is None else float(factor)) / (1.0 if divisor is None else float(divisor))
    cap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale, None if cap is None else float(cap))


@torch.no_grad()
def check_student_head(student: PreTrainedModel, *, linear: bool = False) -> None:
    """Refuse a student whose logits are not those that the loss computes from its base model's last hidden state.

    That is a linear map, which may be scaled and soft-capped as the config says, or not where ``linear`` is asked for.
    A transform before the head would be left out of the loss. On a few random tokens, the head's output is replaced by
    a large one, so that even soft-capping of a new model's small logits shows.

    Raises:
        BadInputError: ``unsupported-head``.
    """
    name = _name(student)
    weight_VD, bias_V = output_head(student)
    if student.base_model is student:
        raise BadInputError("unsupported-head", name, expected="a base model below the head", found="none")
    generator = torch.Generator().manual_seed(0)
    embeddings: Any = student.get_input_embeddings()
    ids_BT = torch.randint(embeddings.weight.shape[0], (1, 8), generator=generator).to(weight_VD.device)
    lengths_B = torch.full((1,), ids_BT.shape[1], device=weight_VD.device)
    head: Any = student.get_output_embeddings()
    raw: list[Tensor] = []
    replaced: list[Tensor] = []

    def replace(_module: nn.Module, _inputs: object, logits: Tensor) -> Tensor:
        raw.append(logits)
        replaced.append(logits * (100.0 / logits.abs().amax().clamp(min=1e-6)))
        return replaced[-1]

    with _evaluating(student):
        expected_BTV = F.linear(student_states(student, ids_BT, lengths_B).read_BTD, weight_VD, bias_V)
        hook = head.register_forward_hook(replace)
        try:
            logits_BTV = own_logits(student, ids_BT)
        finally:
            hook.remove()
    # A head that is not called as a module is compared by its result alone.
    transform = LogitTransform() if linear else logit_transform(student)
    if raw:
        pairs = [(expected_BTV, raw[0]), (transform(replaced[0].float()), logits_BTV)]
    else:
        pairs = [(transform(expected_BTV.float()), logits_BTV)]
    for wanted, found in pairs:
        _compare(name, wanted.float(), found.float(), tolerance=max(1e-4, 4 * torch.finfo(weight_VD.dtype).eps))


def _compare(name: str, wanted: Tensor, found: Tensor, *, tolerance: float) -> None:
    same_shape = wanted.shape == found.shape
    scale = float(wanted.abs().amax().clamp(min=1e-6))
    error = float((wanted - found).abs().amax()) / scale if same_shape else float("inf")
    if not error <= tolerance:  # NaN is refused too
        raise BadInputError(
            "unsupported-head",
            name,
            expected="logits that are a linear map of the last hidden state, scaled and capped as configured",
            found=f"a relative difference of {error:.1e}",
            hint="students that do more to their states before the head, or to their logits, cannot be trained",
        )


def _name(student: PreTrainedModel) -> str:
    return f"student {type(student).__name__}"


@contextmanager
def _evaluating(student: PreTrainedModel) -> Iterator[None]:
    was_training = {module: module.training for module in student.modules()}
    student.train(False)
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training
