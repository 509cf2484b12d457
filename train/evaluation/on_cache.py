"""How close a model is to the teacher of a cache: a loaded model and a held-out cache come in, figures go out.

Sums over tokens are in float64. Intervals resample blocks.

Legend: B batch, T time, N rows (B x T), C rows of a chunk, V real vocabulary, U blocks of the cache, S sums of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cache_spec.errors import BadInputError
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from cache_spec.targets import Tail
from train.distil_batch import to_tensors
from train.distiller import labels_of
from train.evaluation.bootstrap import Bootstrap, Sums
from train.evaluation.measures import (
    LabelMeasures,
    TeacherMeasures,
    calibration_error,
    calibration_sums,
    compare_with_bucket,
    compare_with_logits,
    joined,
    loss_figures,
    measure_labels,
    non_finite,
)
from train.evaluation.scorer import Scorer
from train.loss_targets import NO_LABEL, BucketTargets, DenseTargets, HeadLossTargets
from train.teacher_targets import TeacherTargets, pick_tail

_NATS, _TEACHER_NATS, _TARGETS, _KL, _AGREEMENT, _OVERLAP, _POSITIONS, _CALIBRATION = range(8)
"""Columns of the sums; those of the calibration go on from the last."""


@torch.inference_mode()
def cache_figures(
    scorer: Scorer,
    reader: CacheReader,
    temperature: float,
    batch_blocks: int,
    seen: Callable[[int], object],
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """Measure a model on a cache, as ``evaluate_models`` tells; without ``bootstrap`` there are no intervals.

    Raises BadInputError ``too-little-text``, and KdpipeError ``non-finite-loss``.
    """
    manifest = reader.manifest
    # A head is compared with one bucket for the rest, whatever else is known of the tail: that bounds the full figures.
    teacher = TeacherTargets.of_cache(
        reader, temperature=temperature, tail=pick_tail(None, manifest) and _comparable_tail(manifest)
    ).to(scorer.device)
    kind: str | None = None
    of_blocks: list[Sums] = []
    knows_loss = "block_loss" in reader.specs
    names = [*reader.batch_arrays(with_hidden=False), *(["block_loss"] if knows_loss else [])]
    for blocks in reader.sequence(batch_blocks, names):
        batch = to_tensors(reader.batch(blocks, temperature, with_hidden=False)).to(scorer.device)
        read_ids_BT = (batch.input_ids_BT if batch.masked is None else batch.masked.read_ids_BT).long()
        labels_BT, mask_BT = labels_of(batch)
        labels_N, mask_N = labels_BT.flatten(), mask_BT.flatten()
        num_blocks = len(read_ids_BT)
        targets = teacher(batch.targets, labels_N)
        kind = _kl_kind(targets, manifest)
        of_labels: list[LabelMeasures] = []
        of_teacher: list[Tensor] = []
        for rows, logits_CV in scorer.logits(read_ids_BT, batch.lengths_B):
            of_labels.append(measure_labels(logits_CV, labels_N[rows]))
            measures = None if kind is None else _compare(logits_CV, targets, rows, mask_N, temperature)
            if measures is not None:
                of_teacher.append(torch.stack(measures))
        labels = joined(of_labels)
        nats_B = _by_block(labels.loss_C, num_blocks)
        targets_B = (labels_BT != NO_LABEL).sum(dim=1).cpu().numpy()
        stored_B = reader.read("block_loss", blocks).astype(np.float64) if knows_loss else np.zeros(num_blocks)
        loss_B = np.where(targets_B > 0, stored_B, 0.0)
        compared_XB = (
            _by_block(torch.cat(of_teacher, dim=1), num_blocks)
            if of_teacher
            else np.zeros((len(TeacherMeasures._fields), num_blocks))
        )
        columns = [nats_B, loss_B * targets_B, targets_B, *compared_XB, mask_BT.sum(dim=1).cpu().numpy()]
        of_blocks.append(np.column_stack([*columns, calibration_sums(labels, num_blocks)]))
        seen(int(batch.lengths_B.sum()))
    sums_US = np.concatenate(of_blocks)
    total_S = sums_US.sum(axis=0)
    num_targets = int(total_S[_TARGETS])
    if not num_targets:
        raise BadInputError("too-little-text", reader.place, expected="a block of at least 2 tokens")
    if not np.isfinite(total_S).all():
        raise non_finite(scorer.name, total_S[[_NATS, _KL, _AGREEMENT, _OVERLAP]].tolist())
    point = {name: float(value) for name, value in _figures(total_S, kind, knows_loss).items()}
    unknown: dict[str, float | None] = {"loss_nats": None, "perplexity": None}
    teacher_nats = float(total_S[_TEACHER_NATS])
    teacher_loss = loss_figures("the cache's teacher", teacher_nats, num_targets) if knows_loss else unknown
    return {
        "cache": reader.place,
        "temperature": temperature,
        "num_tokens": num_targets,
        "num_positions": int(total_S[_POSITIONS]),
        **loss_figures(scorer.name, float(total_S[_NATS]), num_targets),
        "ece": point["ece"],
        "kl_is": kind,
        "kl_to_teacher": point.get("kl_to_teacher"),
        "agreement": point.get("agreement"),
        "overlap": point.get("overlap"),
        "teacher_loss": teacher_loss["loss_nats"],
        "teacher_perplexity": teacher_loss["perplexity"],
        "intervals": {}
        if bootstrap is None
        else bootstrap.intervals(bootstrap.replicates(sums_US, lambda sums: _figures(sums, kind, knows_loss))),
        "interval_unit": "block",
    }


def _figures(sums: Sums, kind: str | None, knows_loss: bool) -> dict[str, NDArray[np.float64]]:
    """Figures of sums [..., S]: a resample of blocks without a token has none."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        loss, teacher_loss = (sums[..., column] / sums[..., _TARGETS] for column in (_NATS, _TEACHER_NATS))
        found = {"loss_nats": loss, "perplexity": np.exp(loss), "ece": calibration_error(sums[..., _CALIBRATION:])}
        if knows_loss:
            found |= {"teacher_loss": teacher_loss, "teacher_perplexity": np.exp(teacher_loss)}
        if kind is not None:
            for name, column in (("kl_to_teacher", _KL), ("agreement", _AGREEMENT), ("overlap", _OVERLAP)):
                found[name] = sums[..., column] / sums[..., _POSITIONS]
    return found


def _by_block(rows: Tensor, num_blocks: int) -> NDArray[np.float64]:
    """Sums over the rows of each block, [..., N] to [..., B]."""
    sums: NDArray[np.float64] = rows.cpu().double().reshape(*rows.shape[:-1], num_blocks, -1).sum(dim=-1).numpy()
    return sums


def _comparable_tail(manifest: Manifest) -> Tail:
    return "bucket" if manifest.imported is None else manifest.imported.tails[0]


def _kl_kind(targets: HeadLossTargets, manifest: Manifest) -> str | None:
    """What the divergence from these targets says of that from the teacher's full distribution; None: nothing."""
    if manifest.imported is not None:
        return None  # The mass outside the head is known as well as the values were rounded, or not at all.
    if isinstance(targets, BucketTargets):
        return "exact" if targets.ids_NK.shape[1] == manifest.teacher.vocab_size else "lower-bound"
    # Of drawn tokens no divergence can be told, only its mean over draws but for a constant.
    return "exact" if isinstance(targets, DenseTargets) else None


def _compare(
    logits_CV: Tensor, targets: HeadLossTargets, rows: slice, mask_N: Tensor, temperature: float
) -> TeacherMeasures | None:
    rows_C = torch.arange(rows.start, rows.stop, device=mask_N.device)
    chunk, mask_C = targets.rows(rows_C, logits_CV.dtype), mask_N[rows_C]
    if isinstance(chunk, BucketTargets):
        return compare_with_bucket(logits_CV, mask_C, chunk, temperature)
    if isinstance(chunk, DenseTargets):
        teacher_CV = F.linear(chunk.hidden_ND, chunk.weight_VD, chunk.bias_V)
        return compare_with_logits(logits_CV, mask_C, teacher_CV, temperature)
    return None
