"""Learn what the tails of a teacher's distributions have in common: the tables of encoding ``prototype``.

In: last hidden states of sample blocks, and the output head. Out: C shared tail distributions at each temperature, and
the linear map from a hidden state to one of them, as they are stored.

Rows are clustered by their hidden states (k-means). The shared distribution u of a cluster is the one whose tails
m * u(v) / (1 - u(head)) outside each row's head have the teacher's mass at every token, summed over the cluster's rows.

Legend of axes: N rows, D width, V vocabulary, K kept, C prototypes, M temperatures, R rows of a chunk, S rows of a
cluster, B blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from cache_spec.encodings.prototype import Prototype, encode_prototypes
from cache_spec.errors import BadInputError
from cache_spec.targets import Array, Geometry
from pipeline.encoders.prototype import classify
from pipeline.encoders.spectrum import top_k
from pipeline.targets import default_chunk_rows
from pipeline.teacher import OutputHead

_ROUNDS_OF_LLOYD = 12
_ROUNDS_OF_FIT = 4
_PRIOR_MASS = 1.0
"""Mass of the mean tail of all rows that each prototype starts with, in probabilities of a row."""
_LEAST_OUTSIDE = 1e-3
_TINY = 1e-30


class _Tails(NamedTuple):
    """What the rows' tails sum to, and what it takes to undo the heads' exclusion; rows in the order of clusters."""

    sums_MCV: torch.Tensor
    """float32: sum of the probabilities outside the head over each cluster's rows."""
    head_ids_NK: torch.Tensor
    """int32."""
    masses_MN: torch.Tensor
    """float32: probability outside the head."""


@torch.inference_mode()
def calibrate(
    encoding: Prototype, geometry: Geometry, head: OutputHead, batches: Iterator[tuple[torch.Tensor, Array]]
) -> dict[str, Array]:
    """The tables ``prototype_classifier`` and ``prototypes``, as stored, learnt from batches of blocks.

    Each batch is last hidden states [B, T, D] and the number of real tokens of its blocks [B]; rows beyond
    ``encoding.calibration_tokens`` are left out. The same rows give the same tables on one machine.
    Raises BadInputError ``too-few-tokens`` for fewer rows than prototypes, ``non-finite-logits``.
    """
    hidden_ND = _real_rows(batches, encoding.calibration_tokens)
    if len(hidden_ND) < encoding.prototypes:
        raise BadInputError(
            "too-few-tokens",
            f"{len(hidden_ND)} tokens for calibration",
            expected=f"at least {encoding.prototypes}, one for each prototype",
            hint="ask for fewer --prototypes, more --calibration-tokens or more text",
        )
    classifier_CE = _nearest(_k_means(hidden_ND, encoding.prototypes, encoding.seed))
    cluster_N, order_N = classify(hidden_ND, classifier_CE).sort(stable=True)
    sizes = torch.bincount(cluster_N, minlength=encoding.prototypes).tolist()
    tails = _sum_tails(hidden_ND[order_N], cluster_N, head, encoding, geometry.temperatures)
    codes = np.empty((len(geometry.temperatures), encoding.prototypes, geometry.vocab_size), np.uint16)
    for at, masses_N in enumerate(tails.masses_MN):
        sums_V = tails.sums_MCV[at].sum(0)
        mean_V = sums_V / sums_V.sum().clamp_min(_TINY)
        members = zip(tails.sums_MCV[at], tails.head_ids_NK.split(sizes), masses_N.split(sizes), strict=True)
        for prototype, (sum_V, head_ids_SK, masses_S) in enumerate(members):
            codes[at, prototype] = encode_prototypes(_fit(sum_V, head_ids_SK, masses_S, mean_V).numpy())
    return {"prototype_classifier": classifier_CE.numpy(), "prototypes": codes}


def _real_rows(batches: Iterator[tuple[torch.Tensor, Array]], limit: int) -> torch.Tensor:
    """float32 [N, D] on the CPU: hidden states of real tokens, the first ``limit`` of them.

    Clusters are sought there: sums by index come in any order on a GPU, and their last bits with them.
    """
    rows: list[torch.Tensor] = []
    found = 0
    for hidden_BTD, lengths_B in batches:
        for hidden_TD, length in zip(hidden_BTD, lengths_B.tolist(), strict=True):
            rows.append(hidden_TD[: min(length, limit - found)].float().cpu())
            found += len(rows[-1])
    hidden_ND = torch.cat(rows)
    if not hidden_ND.isfinite().all():
        hint = "the teacher may need another dtype, or its weights are broken"
        raise BadInputError("non-finite-logits", "calibration", expected="finite hidden states", hint=hint)
    return hidden_ND


def _k_means(hidden_ND: torch.Tensor, num_centres: int, seed: int) -> torch.Tensor:
    """float32 [C, D]: centres after a few rounds of Lloyd's algorithm; a centre that lost its rows gets a new one."""
    order_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(hidden_ND)))
    centres_CD = hidden_ND[order_N[:num_centres]].clone()
    next_row = num_centres
    before_N = torch.full((len(hidden_ND),), -1)
    for _ in range(_ROUNDS_OF_LLOYD):
        cluster_N = classify(hidden_ND, _nearest(centres_CD))
        if torch.equal(cluster_N, before_N):
            break
        before_N = cluster_N
        counts_C = torch.bincount(cluster_N, minlength=num_centres)
        sums_CD = torch.zeros_like(centres_CD).index_add_(0, cluster_N, hidden_ND)
        centres_CD = sums_CD / counts_C.clamp_min(1)[:, None]
        for empty in (counts_C == 0).nonzero()[:, 0].tolist():
            centres_CD[empty] = hidden_ND[order_N[next_row % len(order_N)]]
            next_row += 1
    return centres_CD


def _nearest(centres_CD: torch.Tensor) -> torch.Tensor:
    """The classifier [C, D + 1] that votes for the nearest centre: -|h - c|^2 / 2 but for |h|^2."""
    return torch.cat([centres_CD, -centres_CD.square().sum(1, keepdim=True) / 2], 1)


def _sum_tails(
    hidden_ND: torch.Tensor,
    cluster_N: torch.Tensor,
    head: OutputHead,
    encoding: Prototype,
    temperatures: tuple[float, ...],
) -> _Tails:
    """One pass over the full distributions of rows in the order of their clusters."""
    num_rows, vocab_size, device = len(hidden_ND), len(head.weight_VD), head.weight_VD.device
    sums_MCV = torch.zeros(len(temperatures), encoding.prototypes, vocab_size, device=device)
    head_ids_NK = torch.empty(num_rows, encoding.k, dtype=torch.int32)
    masses_MN = torch.empty(len(temperatures), num_rows)
    size = min(default_chunk_rows(vocab_size), num_rows)
    logits_RV, probs_RV = torch.empty(2, size, vocab_size, device=device)
    for start in range(0, num_rows, size):
        here = slice(start, min(start + size, num_rows))
        hidden_RD = hidden_ND[here].to(device, head.weight_VD.dtype)
        chunk_RV = head.logits(hidden_RD, logits_RV[: len(hidden_RD)])
        _, ids_RK = top_k(chunk_RV, encoding.k)
        head_ids_NK[here] = ids_RK.int().cpu()
        clusters, counts = cluster_N[here].unique_consecutive(return_counts=True)
        for at, temperature in enumerate(temperatures):
            scaled_RV = torch.mul(chunk_RV, 1 / temperature, out=probs_RV[: len(chunk_RV)])
            tail_RV = torch.softmax(scaled_RV, 1, out=scaled_RV).scatter_(1, ids_RK, 0.0)
            masses_MN[at, here] = tail_RV.sum(1).cpu()
            for cluster, part_RV in zip(clusters.tolist(), tail_RV.split(counts.tolist()), strict=True):
                sums_MCV[at, cluster] += part_RV.sum(0)
    return _Tails(sums_MCV.cpu(), head_ids_NK, masses_MN)


def _fit(sum_V: torch.Tensor, head_ids_SK: torch.Tensor, masses_S: torch.Tensor, mean_V: torch.Tensor) -> torch.Tensor:
    """float64 [V]: u with sum_V(v) = u(v) * sum of m / (1 - u(head)) over the rows whose head lacks v, for every v.

    Solved by iteration, with a little of ``mean_V`` mixed in, so that no token is impossible that others saw.
    """
    head_ids_SK, masses_S = head_ids_SK.long(), masses_S.double()
    wanted_V = sum_V.double() + _PRIOR_MASS * mean_V.double()
    shared_V = wanted_V / wanted_V.sum().clamp_min(_TINY)
    for _ in range(_ROUNDS_OF_FIT):
        weights_S = masses_S / (1 - shared_V[head_ids_SK].sum(1)).clamp_min(_LEAST_OUTSIDE)
        inside_V = torch.zeros_like(shared_V).index_add_(
            0, head_ids_SK.flatten(), weights_S.repeat_interleave(head_ids_SK.shape[1])
        )
        shared_V = wanted_V / ((weights_S.sum() - inside_V).clamp_min(0) + _PRIOR_MASS)
        shared_V /= shared_V.sum().clamp_min(_TINY)
    return shared_V
