"""How far a target is from the teacher's distribution, and where the gradient of a student points with it.

In: hidden states of the teacher and of a student at some positions, and targets as the product's loss takes them. Out:
sums over positions, and angles between batch gradients. Dense rows exist for one chunk at a time, in float32, and the
teacher's are made once for all targets.

Legend of axes: N positions, C rows of a chunk, V vocabulary, D width, J tokens that a target names.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.distiller import CHUNK_BYTES
from train.loss_targets import NO_LABEL, BucketTargets, DenseTargets, HeadLossTargets, LinearTargets
from train.losses import head_loss

_ROUNDING_MASS = 1e-6
"""More of the teacher's mass than this where a target is not positive makes the divergence infinite."""
_MOSTLY_COVERED = 0.01
_ENOUGH_POSITIONS = 256
"""Where more than a hundredth is lost, over so many positions, the divergence over the rest is not worth its time."""
_PART_BYTES = 1 << 20
"""Passes over distributions run on so many at a time that they stay in a processor's cache."""


class Head(NamedTuple):
    """An output head."""

    weight_VD: Tensor
    bias_V: Tensor | None


class Positions(NamedTuple):
    """What is compared at N positions."""

    teacher_ND: Tensor
    student_ND: Tensor
    labels_N: Tensor
    """int64, the next token; -100 where the block ends: such positions count for nothing here."""

    @property
    def counted_N(self) -> Tensor:
        return self.labels_N != NO_LABEL


class Named(NamedTuple):
    """The tokens that a target names."""

    ids_NJ: Tensor
    """int64, distinct within a row where ``is_named_NJ``."""
    is_named_NJ: Tensor


@dataclass(slots=True)
class Distance:
    """Sums over positions; bucket targets give no token of the rest a mass, and so have none but the coverage."""

    num_positions: int = 0
    variation: float = 0.0
    divergence: float = 0.0
    lost_mass: float = 0.0
    squared: float = 0.0
    coverage: float = 0.0
    num_named: int = 0
    has_meaning: bool = True
    is_covered: bool = True

    def add(self, p_CV: Tensor, target_CV: Tensor | None, named: Named | None) -> None:
        """Count some rows."""
        self.num_positions += len(p_CV)
        if named is not None:
            here_CJ = p_CV.gather(1, named.ids_NJ).masked_fill_(~named.is_named_NJ, 0.0)
            self.coverage += float(here_CJ.sum())
            self.num_named += int(named.is_named_NJ.sum())
        if target_CV is None:
            self.has_meaning = False
            return
        lost_CV = target_CV <= 0
        if lost_CV.any():
            self.lost_mass += float((p_CV * lost_CV).sum())
        if self.num_positions >= _ENOUGH_POSITIONS and not self._loses_at_most(_MOSTLY_COVERED):
            self.is_covered = False
        if self.is_covered:
            ratio_CV = (p_CV / target_CV.masked_fill(lost_CV, 1.0)).log_()
            self.divergence += float(torch.where(p_CV > 0, p_CV * ratio_CV, 0.0).masked_fill_(lost_CV, 0.0).sum())
        error = (p_CV - target_CV).flatten()
        self.squared += float(error @ error)
        self.variation += float(error.abs_().sum()) / 2

    def _loses_at_most(self, mass: float) -> bool:
        return self.has_meaning and self.is_covered and self.lost_mass <= mass * self.num_positions

    def figures(self) -> dict[str, float | None]:
        """Means over positions."""
        count, has = self.num_positions, self.has_meaning
        return {
            "total_variation": self.variation / count if has else None,
            "kl_nats": self.divergence / count if self._loses_at_most(_ROUNDING_MASS) else None,
            "kl_of_covered_nats": self.divergence / count if self._loses_at_most(_MOSTLY_COVERED) else None,
            "mse": self.squared / count if has else None,
            "uncovered_mass": self.lost_mass / count if has else None,
            "mass_coverage": self.coverage / count if self.num_named else None,
            "tokens_named": self.num_named / count if self.num_named else None,
        }


def chunks(num_rows: int, vocab_size: int, num_bytes: int = CHUNK_BYTES) -> Iterator[slice]:
    """Rows whose float32 distributions fill at most so many bytes; the default is the product's chunk."""
    step = max(1, num_bytes // (4 * vocab_size))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def teacher_rows(hidden_CD: Tensor, head: Head, temperature: float) -> Tensor:
    """The teacher's full distributions, float32 [C, V]."""
    return F.linear(hidden_CD.float(), head.weight_VD, head.bias_V).div_(temperature).softmax(dim=1)


def dense_rows(targets: HeadLossTargets, rows_C: Tensor, vocab_size: int, temperature: float) -> Tensor | None:
    """The full distributions that targets stand for at some rows, float32 [C, V]; None for a bucket, which has none."""
    some = targets.rows(rows_C, torch.float32)
    if isinstance(some, BucketTargets):
        return None
    if isinstance(some, DenseTargets):
        return teacher_rows(some.hidden_ND, Head(some.weight_VD, some.bias_V), temperature)
    assert isinstance(some, LinearTargets)
    if some.shared is None:
        out_CV = torch.zeros(len(some.ids_NJ), vocab_size)
    else:
        out_CV = some.shared.tails.probs_CV[some.shared.tail_N] * some.shared.weight_N.unsqueeze(1)
    return out_CV.scatter_add_(1, some.ids_NJ, some.weights_NJ)


def add_distances(
    distances: Mapping[str, Distance],
    targets: Mapping[str, HeadLossTargets],
    named: Mapping[str, Named],
    positions: Positions,
    head: Head,
    temperature: float,
) -> None:
    """Count positions for every target, the teacher's distributions being made once."""
    vocab_size = len(head.weight_VD)
    counted = positions.counted_N.nonzero().squeeze(1)
    for piece in chunks(len(counted), vocab_size):
        rows_C = counted[piece]
        p_CV = teacher_rows(positions.teacher_ND[rows_C], head, temperature)
        for part in chunks(len(rows_C), vocab_size, _PART_BYTES):
            here = rows_C[part]
            for name, distance in distances.items():
                tokens = named.get(name)
                some = None if tokens is None else Named(tokens.ids_NJ[here], tokens.is_named_NJ[here])
                distance.add(p_CV[part], dense_rows(targets[name], here, vocab_size, temperature), some)


class Gradient(NamedTuple):
    """Of a mean loss over positions."""

    on_logits_V: Tensor
    on_head_VD: Tensor


def gradient(targets: HeadLossTargets, positions: Positions, student: Head, temperature: float) -> Gradient:
    """The gradient of the product's own loss, averaged over the counted positions.

    On the logits, summed over positions: that of a bias. On the student's output head: that of its weight.
    """
    vocab_size = len(student.weight_VD)
    weight_VD = student.weight_VD.detach().requires_grad_()
    bias_V = torch.zeros(vocab_size) if student.bias_V is None else student.bias_V.detach().clone()
    bias_V.requires_grad_()
    counted_N = positions.counted_N
    loss = head_loss(
        positions.student_ND,
        weight_VD,
        bias_V,
        targets=targets,
        labels_N=positions.labels_N,
        kl_mask_N=counted_N,
        temperature=temperature,
        kl_scale=1 / int(counted_N.sum()),
        ce_scale=0.0,
        chunk_rows=max(1, CHUNK_BYTES // (4 * vocab_size)),
        vocab_size=vocab_size,
    )
    on_head_VD, on_logits_V = torch.autograd.grad(loss.total, [weight_VD, bias_V])
    return Gradient(on_logits_V=on_logits_V, on_head_VD=on_head_VD)


@dataclass(slots=True)
class Angles:
    """Angles to full distillation's gradient, and ratios of norms, one a batch."""

    degrees: dict[str, list[float]] = field(default_factory=lambda: {"logits": [], "head": []})
    ratios: dict[str, list[float]] = field(default_factory=lambda: {"logits": [], "head": []})

    def add(self, mine: Gradient, full: Gradient) -> None:
        """Count one batch."""
        for where, one, other in zip(self.degrees, mine, full, strict=True):
            self.degrees[where].append(degrees_between(one, other))
            self.ratios[where].append(float(one.norm() / other.norm()))

    def figures(self) -> dict[str, dict[str, float | int]]:
        """Means over batches and their standard deviations."""
        return {
            where: {
                "degrees": statistics.fmean(self.degrees[where]),
                "degrees_std": _spread(self.degrees[where]),
                "norm_ratio": statistics.fmean(self.ratios[where]),
                "norm_ratio_std": _spread(self.ratios[where]),
                "batches": len(self.degrees[where]),
            }
            for where in self.degrees
        }


def degrees_between(left: Tensor, right: Tensor) -> float:
    """Angle between two tensors, taken as vectors; exact for small ones too, where an arc cosine would not be."""
    a, b = left.flatten().double(), right.flatten().double()
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
