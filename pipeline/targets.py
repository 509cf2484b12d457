"""A batch of blocks to the arrays a cache stores: the one place where torch becomes numpy.

In: a teacher's last hidden states of B blocks, its output head, token ids and lengths. Out: the cache's arrays for
these blocks, in their stored dtypes and layouts. Logits exist for a chunk of rows at a time, in float32; [B, T, V] is
never held.

Legend of axes: B blocks, T tokens, V real vocabulary, N rows that are looked at (B*T, or the kept ones of masked text),
R rows of a chunk, D width, W windows, M temperatures.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cache_spec.errors import BadInputError
from cache_spec.masking import MaskedText, places, real_positions
from cache_spec.targets import Array, id_dtype
from pipeline.encoders.draws import uniforms
from pipeline.encoders.spectrum import Encoded, Encoder, encode_logits
from pipeline.teacher import OutputHead

CHUNK_BYTES = 64 << 20
"""Most bytes of one float32 [R, V] array; large enough that the output head's matrix product runs at full speed."""
MIN_CHUNK_ROWS = 16
_CPU_PART_BYTES = 2 << 20
"""On a CPU the passes over the logits run on parts of a chunk, this large a thread, that stay in its cache."""
_FLOAT16_LARGEST = 65504.0


class _Rows(NamedTuple):
    """The rows that targets are made of, int64 [N] each."""

    row_N: torch.Tensor
    """Place among all B*T positions, ascending."""
    gold_N: torch.Tensor
    """The token that the row's distribution is about."""


@torch.inference_mode()
def encode_batch(
    head: OutputHead,
    hidden_BTD: torch.Tensor,
    input_ids_BT: Array,
    lengths_B: Array,
    *,
    encoder: Encoder,
    first_block: int,
    window: int | None = None,
    chunk_rows: int | None = None,
    masked: MaskedText | None = None,
    last_BTD: torch.Tensor | None = None,
) -> dict[str, Array]:
    """Every stored array of B blocks by name, from the teacher's last hidden states of them.

    ``lengths_B`` counts the real tokens of each block, at least 1; ``first_block`` is the index of the first block in
    the cache: draws depend on it; ``window`` is the pooling window of hidden states, None to keep none;
    ``chunk_rows`` is how many rows' logits are held at once. Of ``masked`` blocks, kept positions alone are encoded,
    and come first. ``last_BTD`` is what is pooled, where the output head reads something else.
    Raises BadInputError: ``k-above-vocabulary``, ``bad-window``, ``non-finite-logits``,
    ``non-finite-normaliser``, ``hidden-overflow``.
    """
    num_blocks, num_tokens = input_ids_BT.shape
    vocab_size = len(head.weight_VD)
    if encoder.num_head > vocab_size:
        expected = f"at most {vocab_size}, the teacher's vocabulary"
        raise BadInputError("k-above-vocabulary", f"k {encoder.num_head}", expected=expected)
    if window is not None and num_tokens % window:
        raise BadInputError("bad-window", f"hidden window {window}", expected=f"a divisor of {num_tokens} tokens")
    assert lengths_B.min() >= 1
    assert lengths_B.max() <= num_tokens

    entries_N: Array | slice = slice(None)
    places_N: Array | slice = slice(None)
    if masked is None:
        chosen = _Rows(torch.arange(input_ids_BT.size), _next_ids(input_ids_BT))
        predicted_BT = real_positions(lengths_B.astype(np.int64) - 1, num_tokens)
        kept_BT = real_positions(lengths_B, num_tokens)
    else:
        chosen, entries_N, places_N = _kept_rows(masked.kept_BT, input_ids_BT)
        predicted_BT, kept_BT = masked.selected_BT, masked.kept_BT
    rows = _encode_rows(encoder, head, hidden_BTD.flatten(0, 1), chosen, num_tokens, first_block, chunk_rows)

    def of_blocks(values_N: torch.Tensor, order_N: Array | slice) -> Array:
        array: Array = values_N.cpu().numpy()[order_N]
        return array.reshape(num_blocks, num_tokens, *array.shape[1:])

    # Any NaN or inf among a row's logits makes its entropy NaN: a term p * log p has it as a factor.
    entropy_BT = of_blocks(rows.entropy_R, places_N)
    _refuse_non_finite("non-finite-logits", entropy_BT, first_block)
    _refuse_non_finite("non-finite-normaliser", of_blocks(rows.log_z_RM, places_N), first_block)
    arrays = {
        "input_ids": input_ids_BT.astype(id_dtype(vocab_size)),
        "block_lengths": lengths_B.astype(np.uint32),
        "block_loss": _mean(of_blocks(rows.loss_R, places_N), predicted_BT),
        "block_entropy": _mean(entropy_BT, kept_BT),
    }
    arrays |= encoder.stored({name: of_blocks(values_N, entries_N) for name, values_N in rows.columns.items()})
    if window is not None:
        pooled_BWD = pool_hidden(
            hidden_BTD if last_BTD is None else last_BTD, torch.from_numpy(lengths_B.astype(np.int64)), window
        )
        arrays["hidden"] = pooled_BWD.cpu().numpy()
    for array in arrays.values():
        if array.dtype.kind == "f":
            _refuse_non_finite("hidden-overflow", array, first_block)
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
    encoder: Encoder,
    head: OutputHead,
    hidden_ND: torch.Tensor,
    chosen: _Rows,
    num_tokens: int,
    first_block: int,
    chunk_rows: int | None,
) -> Encoded:
    vocab_size, device = len(head.weight_VD), hidden_ND.device
    if len(chosen.row_N) < len(hidden_ND):
        hidden_ND = hidden_ND[chosen.row_N.to(device)]
    num_rows = min(chunk_rows or default_chunk_rows(vocab_size), len(hidden_ND))
    # Buffers are made once: fresh ones of this size cost a page fault every 4 KiB.
    logits_RV = torch.empty(num_rows, vocab_size, device=device)
    # Without float64 the logits are made where the teacher is, and everything else on the CPU.
    device = torch.device("cpu") if device.type == "mps" and encoder.float64 else device
    part_rows = num_rows
    if device.type == "cpu":
        part_rows = min(num_rows, max(1, _CPU_PART_BYTES * torch.get_num_threads() // (4 * vocab_size)))
    scaled_RV, mass_RV = (torch.empty(part_rows, vocab_size, device=device) for _ in range(2))
    gold_N, row_N = chosen.gold_N.to(device), chosen.row_N.to(device)
    block_N = first_block + row_N.div(num_tokens, rounding_mode="floor")
    position_N = row_N.remainder(num_tokens)
    kept: list[Encoded] = []
    for chunk in range(0, len(hidden_ND), num_rows):
        hidden_RD = hidden_ND[chunk : chunk + num_rows]
        chunk_RV = head.logits(hidden_RD, logits_RV[: len(hidden_RD)]).to(device)
        hidden_RD = hidden_RD.to(device)
        there = slice(chunk, chunk + num_rows)
        uniforms_RMN = _uniforms(encoder, block_N[there], position_N[there])
        for part in range(0, len(hidden_RD), part_rows):
            here = slice(part, min(part + part_rows, len(hidden_RD)))
            kept.append(
                encode_logits(
                    encoder,
                    hidden_RD[here],
                    uniforms_RMN[here],
                    chunk_RV[here],
                    gold_N[there][here],
                    (scaled_RV[: here.stop - here.start], mass_RV[: here.stop - here.start]),
                )
            )
    columns, *statistics = zip(*kept, strict=True)
    merged = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    return Encoded(merged, *(torch.cat(part) for part in statistics))


def _uniforms(encoder: Encoder, block_R: torch.Tensor, position_R: torch.Tensor) -> torch.Tensor:
    """float64 [R, M, N]: the random numbers of an encoder; devices without float64 are not asked for none of them."""
    num_temperatures, num_uniforms = len(encoder.temperatures), encoder.num_uniforms
    if not num_uniforms:
        return torch.empty(len(block_R), num_temperatures, 0)
    return uniforms(encoder.seed, block_R, position_R, num_streams=num_temperatures, num_draws=num_uniforms)


def _next_ids(input_ids_BT: Array) -> torch.Tensor:
    """The token after each position, [N]; a block's last position has none and gets its first token, never read."""
    return torch.from_numpy(np.roll(input_ids_BT, -1, axis=1).astype(np.int64).reshape(-1))


def _kept_rows(kept_BT: Array, input_ids_BT: Array) -> tuple[_Rows, Array, Array]:
    """The kept positions of masked blocks, position 0 of a block without any; and which of them stands where, [B*T].

    First for what is stored: a block's own in their order, and then the last one again. Then for each position its own,
    or that of the last kept one before it.
    """
    kept_BT = kept_BT.copy()
    kept_BT[:, 0] |= ~kept_BT.any(1)
    row_N = torch.from_numpy(kept_BT.reshape(-1).nonzero()[0])
    gold_N = torch.from_numpy(input_ids_BT.astype(np.int64).reshape(-1))[row_N]
    number_B = kept_BT.sum(1)
    first_B1 = (number_B.cumsum() - number_B)[:, None]
    entry_BT = np.minimum(np.arange(kept_BT.shape[1]), number_B[:, None] - 1)
    return _Rows(row_N, gold_N), (first_B1 + entry_BT).reshape(-1), (first_B1 + places(kept_BT)).reshape(-1)


def _mean(values_BT: Array, real_BT: Array) -> Array:
    """float32 [B]: mean over the real positions, summed in float64; 0 where there is none."""
    sums_B = np.where(real_BT, values_BT, 0).sum(1, dtype=np.float64)
    means_B: Array = sums_B / np.maximum(real_BT.sum(1), 1)
    return means_B.astype(np.float32)


def _refuse_non_finite(kind: str, values: Array, first_block: int) -> None:
    finite_B = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite_B.all():
        expected = {
            "non-finite-logits": "finite teacher logits",
            "non-finite-normaliser": "a finite normaliser at every temperature",
            "hidden-overflow": f"hidden states within {_FLOAT16_LARGEST:g}, the range of float16",
        }
        block = first_block + int(finite_B.argmin())
        hint = "the teacher may need another dtype, or its weights are broken"
        raise BadInputError(kind, f"block {block}", expected=expected[kind], found="NaN, inf or too large", hint=hint)
