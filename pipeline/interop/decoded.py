"""A cache's targets as plain numbers: the most probable tokens, their log-probabilities, the mass of all others.

In: a reader and blocks. Out: numpy arrays at one temperature, of every encoding that tells them; without torch.

Legend of axes: B blocks, T tokens, K kept, J points, D teacher width, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.topk import Head
from cache_spec.errors import BadInputError
from cache_spec.reader import CacheReader, TargetBatch
from cache_spec.targets import Array, HeadTargets, HiddenTargets

DEFAULT_K = 16
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """The k most probable tokens of each position, at one temperature."""

    ids_BTK: Array
    """int32, most probable first."""
    logprobs_BTK: Array
    """float32, nats, of the full distribution."""
    log_tail_mass_BT: Array
    """float32, nats: log of the mass of all other tokens; -inf where there is none."""

    @property
    def renormalised_BTK(self) -> Array:
        """Log-probabilities over the k tokens alone."""
        result: Array = self.logprobs_BTK - np.logaddexp.reduce(self.logprobs_BTK, axis=-1, keepdims=True)
        return result


def kept_tokens(reader: CacheReader, k: int | None) -> int:
    """How many tokens of each position are told, of ``k`` asked for; BadInputError ``no-top-k``."""
    encoding, vocab_size = reader.manifest.encoding, reader.manifest.teacher.vocab_size
    if isinstance(encoding, Hidden):
        most, kept = vocab_size, k or min(DEFAULT_K, vocab_size)
    elif isinstance(encoding, Head):
        most, kept = encoding.k, k or encoding.k
    else:
        raise BadInputError("no-top-k", reader.place, expected="heads or hidden states", found=encoding.name)
    if kept > most:
        raise BadInputError("no-top-k", reader.place, expected=f"k of at most {most}", found=kept)
    return kept


def top_of(reader: CacheReader, batch: TargetBatch, temperature: float, k: int) -> Top:
    """The k most probable tokens of a batch that was read at this temperature."""
    targets = batch.targets
    if isinstance(targets, HiddenTargets):
        weight_VD, bias_V = reader.output_head()
        return _top_of_states(targets.hidden_BTD, weight_VD, bias_V, temperature, k)
    assert isinstance(targets, HeadTargets)
    odds_BT = targets.tail_log_odds_BT.astype(np.float64)
    scaled_BTK = targets.logprobs_BTK.astype(np.float64) / temperature
    scaled_BTK -= np.logaddexp.reduce(scaled_BTK, axis=-1, keepdims=True)
    logprobs_BTK = scaled_BTK - np.logaddexp(0, odds_BT)[..., None]
    log_tail_BT = -np.logaddexp(0, -odds_BT)
    if k < logprobs_BTK.shape[-1]:
        log_tail_BT = np.logaddexp(log_tail_BT, np.logaddexp.reduce(logprobs_BTK[..., k:], axis=-1))
    return Top(
        ids_BTK=targets.ids_BTK[..., :k].astype(np.int32),
        logprobs_BTK=logprobs_BTK[..., :k].astype(np.float32),
        log_tail_mass_BT=log_tail_BT.astype(np.float32),
    )


def tail_masses(
    reader: CacheReader, blocks: Sequence[int] | Array, temperatures: Sequence[float], k: int
) -> list[Array]:
    """float32 [B, T] for each temperature: log of the mass outside the k most probable tokens."""
    read = (reader.batch(blocks, temperature, with_hidden=False) for temperature in temperatures)
    return [
        top_of(reader, batch, temperature, k).log_tail_mass_BT
        for batch, temperature in zip(read, temperatures, strict=True)
    ]


def _top_of_states(hidden_BTD: Array, weight_VD: Array, bias_V: Array | None, temperature: float, k: int) -> Top:
    num_blocks, num_tokens, width = hidden_BTD.shape
    states_ND = hidden_BTD.reshape(-1, width)
    ids_NK = np.empty((len(states_ND), k), np.int32)
    logprobs_NK = np.empty((len(states_ND), k), np.float32)
    log_tail_N = np.empty(len(states_ND), np.float32)
    step = max(1, _LOGITS_AT_ONCE // len(weight_VD))
    for start in range(0, len(states_ND), step):
        rows = slice(start, start + step)
        logits_RV = states_ND[rows].astype(np.float32) @ weight_VD.T
        if bias_V is not None:
            logits_RV += bias_V
        logits_RV /= np.float32(temperature)
        ids_RK = _largest(logits_RV, k)
        kept_RK = np.take_along_axis(logits_RV, ids_RK, axis=1).astype(np.float64)
        top_R1 = kept_RK[:, :1]
        # The tail is summed on its own: as a difference to one it would lose its digits.
        np.put_along_axis(logits_RV, ids_RK, -np.inf, axis=1)
        np.exp(logits_RV - top_R1.astype(np.float32), out=logits_RV)
        with np.errstate(divide="ignore"):
            log_outside_R = np.log(logits_RV.sum(1, dtype=np.float64))
        log_all_R = np.logaddexp(log_outside_R, np.log(np.exp(kept_RK - top_R1).sum(1)))
        ids_NK[rows] = ids_RK
        logprobs_NK[rows] = kept_RK - top_R1 - log_all_R[:, None]
        log_tail_N[rows] = log_outside_R - log_all_R
    shape = num_blocks, num_tokens
    return Top(
        ids_BTK=ids_NK.reshape(*shape, k),
        logprobs_BTK=logprobs_NK.reshape(*shape, k),
        log_tail_mass_BT=log_tail_N.reshape(shape),
    )


def _largest(logits_RV: Array, k: int) -> Array:
    """Places of the k largest of each row, largest first, equal ones by ascending place."""
    if k == logits_RV.shape[1]:
        ids_RK = np.broadcast_to(np.arange(k), logits_RV.shape)
    else:
        ids_RK = np.sort(np.argpartition(logits_RV, -k, axis=1)[:, -k:], axis=1)
    order = np.argsort(-np.take_along_axis(logits_RV, ids_RK, axis=1), axis=1, kind="stable")
    result: Array = np.take_along_axis(ids_RK, order, axis=1)
    return result
