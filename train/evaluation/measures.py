"""What one chunk of logits says: a model's logits, labels and a teacher's targets come in, figures of each row go out.

Everything is computed in the dtype of the logits, float32, and at temperature 1 where nothing else is said.

Legend: C rows of a chunk, V real vocabulary, K kept, M the head and one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_spec.errors import KdpipeError
from train.loss_targets import NO_LABEL, BucketTargets

NUM_BINS = 15
NUM_CALIBRATION_SUMS = 3 * NUM_BINS
LARGEST_EXPONENT = 700
"""Nats beyond which a perplexity is no float any more."""


class LabelMeasures(NamedTuple):
    """How well the next token of the text is predicted; rows without one count nowhere."""

    loss_C: Tensor
    """Nats of the label; 0 where there is none."""
    confidence_C: Tensor
    """Probability of the most probable token; -1 where there is no label."""
    is_right_C: Tensor
    """Whether that is the label: 1 or 0."""


class TeacherMeasures(NamedTuple):
    """How close a model is to the teacher; 0 in rows that do not count."""

    kl_C: Tensor
    """KL(teacher || model), nats, at the temperature."""
    agreement_C: Tensor
    """Whether both have the same most probable token: 1 or 0."""
    overlap_C: Tensor
    """Sum of min(p, q), at the temperature."""


def measure_labels(logits_CV: Tensor, labels_C: Tensor) -> LabelMeasures:
    """Measure the most probable token and the label; the logits stay as they are."""
    labelled_C = labels_C != NO_LABEL
    label_logit_C = logits_CV.gather(1, labels_C.clamp(min=0).unsqueeze(1)).squeeze(1)
    normaliser_C = logits_CV.logsumexp(dim=1)
    top_logit_C, top_C = logits_CV.max(dim=1)
    return LabelMeasures(
        loss_C=torch.where(labelled_C, normaliser_C - label_logit_C, 0.0),
        confidence_C=torch.where(labelled_C, (top_logit_C - normaliser_C).exp(), -1.0),
        is_right_C=(labelled_C & (top_C == labels_C)).to(logits_CV.dtype),
    )


def compare_with_bucket(
    logits_CV: Tensor, mask_C: Tensor, targets: BucketTargets, temperature: float
) -> TeacherMeasures:
    """Compare with a head, most probable token first, and a bucket; overwrites the logits.

    KL is a lower bound of the full one and overlap an upper bound; both are exact where the head is the vocabulary.
    """
    ids_CK = targets.ids_NK
    agrees_C = logits_CV.argmax(dim=1) == ids_CK[:, 0]
    scaled_CV = logits_CV.div_(temperature)
    normaliser_C1 = scaled_CV.logsumexp(dim=1, keepdim=True)
    head_CK = scaled_CV.gather(1, ids_CK)
    rest_C1 = scaled_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_q_CM = torch.cat([head_CK, rest_C1], dim=1) - normaliser_C1
    log_p_CM = torch.cat([targets.log_probs_NK, targets.log_rest_N.unsqueeze(1)], dim=1)
    p_CM = log_p_CM.exp()
    kl_C = torch.where(p_CM > 0, p_CM * (log_p_CM - log_q_CM), 0.0).sum(dim=1)
    overlap_C = torch.minimum(p_CM, log_q_CM.exp()).sum(dim=1)
    return _where(mask_C, kl_C, agrees_C, overlap_C)


def compare_with_logits(logits_CV: Tensor, mask_C: Tensor, teacher_CV: Tensor, temperature: float) -> TeacherMeasures:
    """Compare with the teacher's full distribution, from its logits at temperature 1; overwrites both."""
    agrees_C = logits_CV.argmax(dim=1) == teacher_CV.argmax(dim=1)
    log_q_CV = torch.log_softmax(logits_CV.div_(temperature), dim=1, out=logits_CV)
    log_p_CV = torch.log_softmax(teacher_CV.div_(temperature), dim=1, out=teacher_CV)
    p_CV = log_p_CV.exp()
    kl_C = (log_p_CV.sub_(log_q_CV)).mul_(p_CV).sum(dim=1)
    overlap_C = torch.minimum(p_CV, log_q_CV.exp_()).sum(dim=1)
    return _where(mask_C, kl_C, agrees_C, overlap_C)


def _where(mask_C: Tensor, kl_C: Tensor, agrees_C: Tensor, overlap_C: Tensor) -> TeacherMeasures:
    measures = (kl_C, agrees_C.to(kl_C.dtype), overlap_C)
    return TeacherMeasures(*(torch.where(mask_C, measure_C, 0.0) for measure_C in measures))


class Calibration:
    """Expected calibration error of the most probable token, over ``NUM_BINS`` bins of equal width.

    The mean over bins, weighted by the labels in each, of |share that is right - mean confidence|
    ("On Calibration of Modern Neural Networks", 2017).
    """

    def __init__(self) -> None:
        self._sums = np.zeros(NUM_CALIBRATION_SUMS)

    def add(self, measures: LabelMeasures) -> None:
        """Count rows that have a label; a confidence on the edge of two bins is in the lower one, as in the paper."""
        self._sums += calibration_sums(measures, 1)[0]

    @property
    def error(self) -> float:
        """Between 0 and 1."""
        return float(calibration_error(self._sums))


def calibration_sums(measures: LabelMeasures, num_blocks: int) -> NDArray[np.float64]:
    """What ``calibration_error`` needs of each of as many blocks of equally many rows, [blocks, sums]; they add up."""
    confidence, is_right = (x.cpu().double().numpy() for x in (measures.confidence_C, measures.is_right_C))
    block = np.arange(len(confidence)) * num_blocks // max(1, len(confidence))
    counted = confidence >= 0
    confidence, is_right, block = confidence[counted], is_right[counted], block[counted]
    bins = np.ceil(confidence * NUM_BINS).astype(np.int64).clip(1, NUM_BINS) - 1
    columns = [
        np.bincount(block * NUM_BINS + bins, values, minlength=num_blocks * NUM_BINS)
        for values in (np.ones_like(confidence), confidence, is_right)
    ]
    return np.stack(columns, axis=1).reshape(num_blocks, NUM_CALIBRATION_SUMS).astype(np.float64)


def calibration_error(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error, [...], from sums [..., sums] of everything measured."""
    counts, confidence, is_right = np.moveaxis(sums.reshape(*sums.shape[:-1], NUM_BINS, 3), -1, 0)
    error: NDArray[np.float64] = np.abs(is_right - confidence).sum(axis=-1) / counts.sum(axis=-1)
    return error


def loss_figures(name: str, sum_nats: float, count: int) -> dict[str, float | None]:
    """``loss_nats``, the mean, and ``perplexity``, None beyond a float; KdpipeError ``non-finite-loss``."""
    loss_nats = sum_nats / count
    if not math.isfinite(loss_nats):
        raise non_finite(name, loss_nats)
    return {"loss_nats": loss_nats, "perplexity": math.exp(loss_nats) if loss_nats < LARGEST_EXPONENT else None}


def non_finite(name: str, found: object) -> KdpipeError:
    """The error of a model that computes no numbers."""
    return KdpipeError("non-finite-loss", name, expected="finite losses", found=found)


def joined(chunks: Iterable[LabelMeasures]) -> LabelMeasures:
    """The measures of all rows from those of their chunks."""
    return LabelMeasures(*(torch.cat(measures) for measures in zip(*chunks, strict=True)))
