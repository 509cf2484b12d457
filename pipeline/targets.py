"""A batch of blocks to the arrays a cache stores: the one place where torch becomes numpy.

In: a teacher, token ids and lengths of B blocks. Out: the cache's arrays for these blocks, in their stored dtypes and
layouts. Logits exist for a chunk of rows at a time, in float32; [B, T, V] is never held.

Legend of axes: B blocks, T tokens, V real vocabulary, K kept, N = B*T rows, R rows of a chunk, D width, W windows,
M temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cache_spec.errors import BadInputError
from cache_spec.topk import encode_gaps
from pipeline.teacher import Teacher

Array = np.ndarray[Any, Any]

CHUNK_BYTES = 64 << 20
"""Most bytes of one float32 [R, V] array; large enough that the output head's matrix product runs at full speed."""
MIN_CHUNK_ROWS = 16
_CPU_PART_BYTES = 2 << 20
"""On a CPU the passes over the logits run on parts of a chunk, this large a thread, that stay in its cache."""
_GROUPS_OF = 64
_FLOAT16_LOWEST = -65504.0
_TINY_TAIL = 1e-30
"""Below this a sum of float32 exponentials has lost digits to underflow, and the tail is summed again, rescaled."""


class _Rows(NamedTuple):
    """What is kept of R rows of logits; all float32 but the ids."""

    head_ids_RK: torch.Tensor
    head_logprobs_RK: torch.Tensor
    log_normaliser_RM: torch.Tensor
    log_tail_mass_RM: torch.Tensor
    entropy_R: torch.Tensor
    gold_loss_R: torch.Tensor


@torch.inference_mode()
def encode_batch(
    teacher: Teacher,
    input_ids_BT: Array,
    lengths_B: Array,
    *,
    first_block: int,
    k: int,
    step_nats: float,
    temperatures: Sequence[float],
    window: int | None = None,
    chunk_rows: int | None = None,
) -> dict[str, Array]:
    """Run the teacher over B blocks and return every stored array of them by name.

    ``lengths_B`` counts the real tokens of each block, at least 1; ``first_block`` is the index of the first block, for
    messages; ``window`` is the pooling window of hidden states, None to keep none; ``chunk_rows`` the rows whose logits
    are held at once. Head log-probabilities are off by at most step_nats / 2 (more only where they lie below
    -65535 * step_nats, where they saturate); log tail masses are float16 of a float32 value from the full distribution.
    Raises BadInputError: ``k-above-vocabulary``, ``bad-window``, ``non-finite-logits``,
    ``non-finite-normaliser``, ``hidden-overflow``.
    """
    num_blocks, num_tokens = input_ids_BT.shape
    vocab_size = teacher.info.vocab_size
    if k > vocab_size:
        raise BadInputError("k-above-vocabulary", f"k {k}", expected=f"at most {vocab_size}, the teacher's vocabulary")
    if window is not None and num_tokens % window:
        raise BadInputError("bad-window", f"hidden window {window}", expected=f"a divisor of {num_tokens} tokens")
    assert lengths_B.min() >= 1
    assert lengths_B.max() <= num_tokens

    hidden_BTD = teacher.hidden(input_ids_BT)
    rows = _encode_rows(teacher, hidden_BTD.flatten(0, 1), _next_ids(input_ids_BT), k, temperatures, chunk_rows)
    # Any NaN or inf among a row's logits makes its entropy NaN: a term p * log p has it as a factor.
    _refuse_non_finite("non-finite-logits", rows.entropy_R, num_blocks, first_block)
    _refuse_non_finite("non-finite-normaliser", rows.log_normaliser_RM, num_blocks, first_block)
    id_dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    blocks = (num_blocks, num_tokens)

    def per_token(values_N: torch.Tensor) -> Array:
        array: Array = values_N.cpu().numpy()
        return array.reshape(*blocks, *array.shape[1:])

    def token_last(values_NM: torch.Tensor, dtype: Any) -> Array:
        return np.ascontiguousarray(per_token(values_NM).swapaxes(1, 2).astype(dtype))

    lengths_B1 = lengths_B.astype(np.int64)[:, None]
    position_T = np.arange(num_tokens)
    arrays = {
        "input_ids": input_ids_BT.astype(id_dtype),
        "block_lengths": lengths_B.astype(np.uint32),
        "head_ids": per_token(rows.head_ids_RK).astype(id_dtype),
        "head_gaps": encode_gaps(per_token(rows.head_logprobs_RK), step_nats),
        "log_normaliser": token_last(rows.log_normaliser_RM, np.float32),
        "log_tail_mass": token_last(rows.log_tail_mass_RM, np.float16),
        "block_loss": _mean(per_token(rows.gold_loss_R), position_T < lengths_B1 - 1),
        "block_entropy": _mean(per_token(rows.entropy_R), position_T < lengths_B1),
    }
    if window is not None:
        pooled_BWD = pool_hidden(hidden_BTD, torch.from_numpy(lengths_B.astype(np.int64)), window)
        _refuse_non_finite("hidden-overflow", pooled_BWD, num_blocks, first_block)
        arrays["hidden"] = pooled_BWD.cpu().numpy()
    return arrays


def default_chunk_rows(vocab_size: int) -> int:
    """Rows whose float32 logits fill at most ``CHUNK_BYTES``, but at least 16."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * vocab_size))


def pool_hidden(hidden_BTD: torch.Tensor, lengths_B: torch.Tensor, window: int) -> torch.Tensor:
    """float16 [B, W, D]: mean in float32 over each window's real tokens, zeros for a window with none."""
    num_tokens = hidden_BTD.shape[1]
    position_T = torch.arange(num_tokens, device=hidden_BTD.device)
    real_BT1 = (position_T < lengths_B.to(hidden_BTD.device)[:, None]).unsqueeze(2)
    real_BTD = hidden_BTD.float().masked_fill(~real_BT1, 0.0)
    windows = (len(hidden_BTD), num_tokens // window, window, -1)
    counts_BW1 = real_BT1.view(windows).sum(2).clamp_min(1)
    return (real_BTD.view(windows).sum(2) / counts_BW1).half()


def _encode_rows(
    teacher: Teacher,
    hidden_ND: torch.Tensor,
    gold_ids_N: torch.Tensor,
    k: int,
    temperatures: Sequence[float],
    chunk_rows: int | None,
) -> _Rows:
    vocab_size = teacher.info.vocab_size
    num_rows = min(chunk_rows or default_chunk_rows(vocab_size), len(hidden_ND))
    part_rows = num_rows
    if hidden_ND.device.type == "cpu":
        part_rows = min(num_rows, max(1, _CPU_PART_BYTES * torch.get_num_threads() // (4 * vocab_size)))
    gold_ids_N = gold_ids_N.to(hidden_ND.device)
    # Both buffers are made once: fresh ones of this size cost a page fault every 4 KiB.
    logits_RV = torch.empty(num_rows, vocab_size, device=hidden_ND.device)
    scratch_RV = torch.empty(part_rows, vocab_size, device=hidden_ND.device)
    kept: list[_Rows] = []
    for chunk in range(0, len(hidden_ND), num_rows):
        hidden_RD = hidden_ND[chunk : chunk + num_rows]
        gold_ids_R = gold_ids_N[chunk : chunk + num_rows]
        chunk_RV = teacher.head.logits(hidden_RD, logits_RV[: len(hidden_RD)])
        for part in range(0, len(hidden_RD), part_rows):
            part_RV = chunk_RV[part : part + part_rows]
            gold_R = gold_ids_R[part : part + part_rows]
            kept.append(_encode_logits(part_RV, gold_R, k, temperatures, scratch_RV[: len(part_RV)]))
    return _Rows(*(torch.cat(column) for column in zip(*kept, strict=True)))


def _encode_logits(
    logits_RV: torch.Tensor, gold_ids_R: torch.Tensor, k: int, temperatures: Sequence[float], scratch_RV: torch.Tensor
) -> _Rows:
    """Everything kept of R rows of float32 logits, which are overwritten.

    With d = logits - max: log Z_T = log sum exp(d / T), logprob = d - log Z_1, and so
    log_normaliser_T = logsumexp(logprob / T) = log Z_T - log Z_1 / T.
    """
    head_logits_RK, head_ids_RK = top_k(logits_RV, k)
    max_R1 = head_logits_RK[:, :1]
    head_RK = head_logits_RK - max_R1
    d_RV = logits_RV.sub_(max_R1)
    log_z, log_tail = {}, {}
    for temperature in {1.0, *temperatures}:
        # exp as a power of two is 3 times faster here, and as exact as float32 logits are (about 1e-6).
        mass_RV = torch.mul(d_RV, math.log2(math.e) / temperature, out=scratch_RV).exp2_()
        head_mass_RK = mass_RV.gather(1, head_ids_RK)
        mass_RV.scatter_(1, head_ids_RK, 0.0)
        tail_R = mass_RV.sum(1)
        total_R = head_mass_RK.sum(1) + tail_R
        log_z[temperature] = total_R.log()
        log_tail[temperature] = _log_tail(tail_R, d_RV, head_ids_RK, temperature)
        if temperature == 1.0:
            weighted_R = (head_mass_RK * head_RK).sum(1) + mass_RV.mul_(d_RV).sum(1)
            entropy_R = log_z[1.0] - weighted_R / total_R
    gold_loss_R = log_z[1.0] - d_RV.gather(1, gold_ids_R[:, None])[:, 0]
    tails = [log_tail[t] - log_z[t] for t in temperatures]
    return _Rows(
        head_ids_RK=head_ids_RK,
        head_logprobs_RK=head_RK - log_z[1.0][:, None],
        log_normaliser_RM=torch.stack([log_z[t] - log_z[1.0] / t for t in temperatures], 1),
        # -inf means an empty tail and nothing else, so a tail too thin for float16 stays finite.
        log_tail_mass_RM=torch.stack(tails, 1)
        if k == d_RV.shape[1]
        else torch.stack(tails, 1).clamp_min(_FLOAT16_LOWEST),
        entropy_R=entropy_R,
        gold_loss_R=gold_loss_R,
    )


def _log_tail(tail_R: torch.Tensor, d_RV: torch.Tensor, head_ids_RK: torch.Tensor, temperature: float) -> torch.Tensor:
    """log of the tail's sum of exp(d / T); rows whose sum underflows are summed again around their own maximum."""
    log_tail_R = tail_R.log()
    if head_ids_RK.shape[1] == d_RV.shape[1]:
        return log_tail_R
    thin = (tail_R < _TINY_TAIL).nonzero()[:, 0]
    if len(thin):
        tail_d_RV = d_RV[thin].scatter_(1, head_ids_RK[thin], -math.inf).div_(temperature)
        log_tail_R[thin] = tail_d_RV.logsumexp(1)
    return log_tail_R


def top_k(logits_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest values of each row and their columns, descending, equal values by ascending column.

    The K largest lie in the K groups of columns with the largest maxima, so that most columns are read once, for
    their maximum. ``torch.topk`` does not say which of equal values it takes nor in which order; the order is made
    definite here among the K it took, and which it takes depends on the row alone.
    """
    num_columns = logits_RV.shape[1]
    num_groups = num_columns // _GROUPS_OF
    if num_groups <= k:
        values_RK, ids_RK = logits_RV.topk(k, sorted=False)
    else:
        # Group g holds the columns g, g + num_groups, g + 2 * num_groups, ...
        size = num_columns // num_groups
        grouped = num_groups * size
        largest_RG = logits_RV[:, :grouped].view(-1, size, num_groups).amax(1)
        rest = num_columns - grouped
        if rest:
            torch.maximum(largest_RG[:, :rest], logits_RV[:, grouped:], out=largest_RG[:, :rest])
        groups_RK = largest_RG.topk(k, sorted=False).indices
        steps = torch.arange(size + bool(rest), device=logits_RV.device) * num_groups
        candidates_RC = (groups_RK.unsqueeze(2) + steps).flatten(1)
        if rest:
            outside_RC = candidates_RC >= num_columns
            values_RC = logits_RV.gather(1, candidates_RC.clamp_max(num_columns - 1)).masked_fill_(
                outside_RC, -math.inf
            )
        else:
            values_RC = logits_RV.gather(1, candidates_RC)
        values_RK, picked_RK = values_RC.topk(k, sorted=False)
        ids_RK = candidates_RC.gather(1, picked_RK)
    ids_RK, by_id = ids_RK.sort(1)
    values_RK, by_value = values_RK.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values_RK, ids_RK.gather(1, by_value)


def _next_ids(input_ids_BT: Array) -> torch.Tensor:
    """The token after each position, [N]; a block's last position has none and gets its first token, never read."""
    return torch.from_numpy(np.roll(input_ids_BT, -1, axis=1).astype(np.int64).reshape(-1))


def _mean(values_BT: Array, real_BT: Array) -> Array:
    """float32 [B]: mean over the real positions, summed in float64; 0 where there is none."""
    sums_B = np.where(real_BT, values_BT, 0).sum(1, dtype=np.float64)
    means_B: Array = sums_B / np.maximum(real_BT.sum(1), 1)
    return means_B.astype(np.float32)


def _refuse_non_finite(kind: str, values: torch.Tensor, num_blocks: int, first_block: int) -> None:
    finite_B = values.isfinite().reshape(num_blocks, -1).all(1).cpu().numpy()
    if not finite_B.all():
        expected = {
            "non-finite-logits": "finite teacher logits",
            "non-finite-normaliser": "a finite normaliser at every temperature",
            "hidden-overflow": f"hidden states within {-_FLOAT16_LOWEST:g}, the range of float16",
        }
        block = first_block + int(finite_B.argmin())
        hint = "the teacher may need another dtype, or its weights are broken"
        raise BadInputError(kind, f"block {block}", expected=expected[kind], found="NaN, inf or too large", hint=hint)
