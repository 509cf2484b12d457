"""Arrays and tables of every encoding, made in float64 from random text by the words of ``SPEC.md``, without torch.

In: a manifest and a seed. Out: the rows of every array and the values of every table. The reference that encoders can
be compared with: slow, plain, one row after the other where that is clearer.

Legend of axes: N blocks, T tokens, V vocabulary, D teacher width, K kept, M temperatures, C prototypes, S draws,
W windows, R rows (N times T).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden, encode_int8
from cache_spec.encodings.prototype import (
    MASS_STEP_NATS,
    Prototype,
    decode_prototypes,
    encode_prototypes,
    encode_ranks,
    encode_residual,
    token_order,
)
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import EMPTY_TAIL, TopK, encode_gaps, encode_odds
from cache_spec.manifest import Manifest
from cache_spec.masking import MaskingInfo
from cache_spec.targets import Array, Geometry

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_LOGIT_SPREAD = 3.0
_UNKNOWN_WIDTH = 6
# Functions like exp differ in their last bits between processors; on this grid they agree.
_FLOAT_GRID = 2.0**20


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a teacher read and thought, before anything is stored."""

    input_ids_NT: Array
    lengths_N: Array
    hidden_NTD: Array
    """float64 values that float16 holds exactly."""
    weight_VD: Array
    bias_V: Array
    """Zeros for a teacher without a bias."""

    @property
    def logprobs_NTV(self) -> Array:
        """float64, nats, at temperature 1."""
        return log_softmax(self.hidden_NTD @ self.weight_VD.T + self.bias_V)


def make_text(manifest: Manifest, seed: int) -> Text:
    """Random tokens, hidden states and an output head; every block full but a kept last one, or all but full ones."""
    blocks, teacher = manifest.blocks, manifest.teacher
    rng = np.random.default_rng(seed)
    width = teacher.hidden_size or _UNKNOWN_WIDTH
    shape = (blocks.num_blocks, blocks.block_tokens)
    lengths_N = np.full(blocks.num_blocks, blocks.block_tokens, np.uint32)
    num_missing = blocks.num_blocks * blocks.block_tokens - manifest.corpus.num_tokens
    if blocks.last_block == "each":
        shares = np.array_split(np.arange(num_missing), blocks.num_blocks)
        lengths_N -= np.array([len(share) for share in shares], np.uint32)
    else:
        lengths_N[-1] -= num_missing
    input_ids_NT = rng.integers(0, teacher.vocab_size, size=shape)
    input_ids_NT[np.arange(blocks.block_tokens) >= lengths_N[:, None]] = manifest.tokenizer.eos_token_id
    if manifest.masking is not None:
        input_ids_NT[:, 0] = manifest.masking.cls_token_id
        input_ids_NT[np.arange(len(lengths_N)), lengths_N.astype(int) - 1] = manifest.masking.sep_token_id
    hidden_NTD = rng.normal(size=(*shape, width)).astype(np.float16).astype(np.float64)
    weight_VD = rng.normal(size=(teacher.vocab_size, width)) * _LOGIT_SPREAD / width**0.5
    weight_VD = weight_VD.astype(np.float16).astype(np.float64)
    has_bias = isinstance(manifest.encoding, Hidden) and manifest.encoding.bias
    bias_V = rng.normal(size=teacher.vocab_size).astype(np.float32) * has_bias
    return Text(
        input_ids_NT=input_ids_NT,
        lengths_N=lengths_N,
        hidden_NTD=hidden_NTD,
        weight_VD=weight_VD,
        bias_V=bias_V.astype(np.float64),
    )


def make_tables(manifest: Manifest, text: Text, seed: int) -> dict[str, Array]:
    """The values of every table of the manifest's encoding."""
    encoding, geometry = manifest.encoding, manifest.geometry
    rng = np.random.default_rng(seed)
    if isinstance(encoding, Prototype):
        logits_CV = rng.normal(size=(encoding.prototypes, geometry.vocab_size)) * _LOGIT_SPREAD
        probs_MCV = np.stack([np.exp(log_softmax(logits_CV / temperature)) for temperature in geometry.temperatures])
        classifier_CE = rng.normal(size=(encoding.prototypes, geometry.hidden_size + 1)).astype(np.float32)
        return {"prototype_classifier": classifier_CE, "prototypes": encode_prototypes(probs_MCV)}
    if isinstance(encoding, Hidden):
        tables = {"output_head": text.weight_VD.astype(encoding.head_dtype)}
        return tables | ({"output_bias": text.bias_V.astype(np.float32)} if encoding.bias else {})
    return {}


def make_rows(manifest: Manifest, text: Text, tables: dict[str, Array]) -> dict[str, Array]:
    """Every array for all blocks of ``manifest``, not yet cut into shards."""
    geometry, length = manifest.geometry, manifest.blocks.block_tokens
    is_real_NT = np.arange(length) < text.lengths_N[:, None]
    logprobs_NTV = text.logprobs_NTV
    entropy_NT = -(np.exp(logprobs_NTV) * logprobs_NTV).sum(-1)
    loss_NT = -np.take_along_axis(logprobs_NTV[:, :-1], text.input_ids_NT[:, 1:, None], axis=-1)[..., 0]
    rows = {"input_ids": text.input_ids_NT.astype(geometry.id_dtype), "block_lengths": text.lengths_N}
    if manifest.imported is None:
        rows |= {"block_loss": _mean(loss_NT, is_real_NT[:, 1:]), "block_entropy": _mean(entropy_NT, is_real_NT)}
    elif manifest.imported.logprobs == "renormalised":
        assert isinstance(manifest.encoding, TopK)
        rank_NTV = np.argsort(np.argsort(-logprobs_NTV, axis=-1, kind="stable"), axis=-1)
        logprobs_NTV = log_softmax(np.where(rank_NTV < manifest.encoding.k, logprobs_NTV, -np.inf))
    targets = encode(manifest.encoding, geometry, logprobs_NTV, text.hidden_NTD, tables)
    if manifest.masking is not None:
        selected_NT, read_NT = masked(manifest.masking, text.input_ids_NT, text.lengths_N, geometry.vocab_size)
        kept_NT = selected_NT if manifest.masking.positions == "masked" else is_real_NT
        own_loss_NT = -np.take_along_axis(logprobs_NTV, text.input_ids_NT[..., None], axis=-1)[..., 0]
        rows |= {"selected": selected_NT.astype(np.uint8), "replacement_ids": read_NT.astype(geometry.id_dtype)}
        rows |= {"block_loss": _mean(own_loss_NT, selected_NT), "block_entropy": _mean(entropy_NT, kept_NT)}
        axes = {part.name: 1 + part.dims.index("token") for part in manifest.encoding.arrays(geometry)}
        targets = {name: _kept_first(values, axes[name], kept_NT) for name, values in targets.items()}
    rows |= targets
    if manifest.hidden:
        window, width = manifest.hidden.window, geometry.hidden_size
        real_NWw = is_real_NT.reshape(-1, length // window, window)
        states_NWwD = text.hidden_NTD.reshape(*real_NWw.shape, width) * real_NWw[..., None]
        pooled_NWD = states_NWwD.sum(2) / np.maximum(real_NWw.sum(2), 1)[..., None]
        if manifest.hidden.dtype == "float16":
            rows["hidden"] = pooled_NWD.astype(np.float16)
        else:
            codes_NDW, rows["hidden_scale"] = encode_int8(pooled_NWD.swapaxes(1, 2))
            rows["hidden"] = np.ascontiguousarray(codes_NDW.swapaxes(1, 2))
    return rows


def encode(
    encoding: Encoding, g: Geometry, logprobs_NTV: Array, hidden_NTD: Array, tables: dict[str, Array]
) -> dict[str, Array]:
    """The arrays of one encoding from log-probabilities at temperature 1 and last hidden states."""
    probs_MNTV = [np.exp(log_softmax(logprobs_NTV / temperature)) for temperature in g.temperatures]
    if isinstance(encoding, Hidden):
        if encoding.dtype == "float16":
            return {"last_hidden": hidden_NTD.astype(np.float16)}
        codes_NTD, scale_NT = encode_int8(hidden_NTD)
        return {"last_hidden": codes_NTD, "last_hidden_scale": scale_NT}
    if isinstance(encoding, TopK):
        return _head(encoding, g, logprobs_NTV)
    if isinstance(encoding, Prototype):
        rows = _head(encoding, g, logprobs_NTV)
        ones_NT1 = np.ones((*hidden_NTD.shape[:2], 1))
        votes_NTC = np.concatenate([hidden_NTD, ones_NT1], -1) @ tables["prototype_classifier"].astype(np.float64).T
        row_NT = votes_NTC.argmax(-1)
        rows["tail_prototype"] = row_NT.astype(np.uint8 if encoding.prototypes <= 256 else np.uint16)
        if encoding.residual_draws:
            rows |= _residual(encoding, g, probs_MNTV, rows, tables)
        rows["head_ranks"] = encode_ranks(rows.pop("head_ids"), row_NT, token_order(tables["prototypes"]))
        return rows
    # What is left is made row by row: [N, T] rows of [M, J] each, stored as [N, M, J, T].
    shape = (*logprobs_NTV.shape[:2], len(g.temperatures))
    if isinstance(encoding, Sampled):
        ids = np.zeros((*shape, encoding.num_points(g)), g.id_dtype)
        counts = np.zeros(ids.shape, np.uint8 if encoding.draws < 256 else np.uint16)
        for block, position, at in np.ndindex(*shape):
            fractions = uniforms(encoding.seed, block, position, stream=at, num_draws=encoding.draws)
            drawn, times = np.unique(pick(probs_MNTV[at][block, position], fractions), return_counts=True)
            order = np.argsort(-times, kind="stable")
            ids[block, position, at, : len(drawn)] = drawn[order]
            counts[block, position, at, : len(drawn)] = times[order]
        return {"draw_ids": _tokens_last(ids), "draw_counts": _tokens_last(counts)}
    assert isinstance(encoding, Sparsified)
    ids = np.zeros((*shape, encoding.k), g.id_dtype)
    values = np.zeros(ids.shape)
    for block, position, at in np.ndindex(*shape):
        fraction, rounding = uniforms(encoding.seed, block, position, stream=at, num_draws=2)
        ids[block, position, at], values_K = sparsify(probs_MNTV[at][block, position], encoding.k, fraction)
        low_K = np.floor(np.sqrt(values_K) * encoding.levels)
        high = rounding * (2 * low_K + 1) < values_K * encoding.levels**2 - low_K**2
        values[block, position, at] = ((low_K + high) / encoding.levels) ** 2
    with np.errstate(divide="ignore"):
        gaps_NTKM = encode_gaps(np.log(values), encoding.levels)
    return {"kept_ids": _tokens_last(ids), "kept_gaps": _tokens_last(gaps_NTKM.swapaxes(2, 3))}


def masked(info: MaskingInfo, input_ids_NT: Array, lengths_N: Array, vocab_size: int) -> tuple[Array, Array]:
    """What is selected, bool [N, T], and what is read there, int64 [N, T]: rule W-13."""
    real = [ids_T[:length] for ids_T, length in zip(input_ids_NT, lengths_N, strict=True)]
    times_V = np.bincount(np.concatenate(real).astype(np.int64), minlength=vocab_size).astype(np.float64)
    selected_NT, read_NT = np.zeros(input_ids_NT.shape, bool), np.zeros(input_ids_NT.shape, np.int64)
    for block, ids in enumerate(real):
        drawn = [uniforms(info.seed, block, position, stream=1 << 20, num_draws=3) for position in range(len(ids))]
        ordinary = [position for position, token in enumerate(ids) if token not in info.special_ids]
        number = min(len(ordinary), max(1, int(np.floor(info.probability * len(ordinary) + 0.5))))
        ends = {at: -np.log(1 - drawn[at][0]) * times_V[ids[at]] ** info.smoothing for at in ordinary}
        for at in sorted(ordinary, key=lambda at: (ends[at], at))[:number]:
            fate, other = drawn[at][1:]
            token = ids[at] if fate < info.mask_share + info.keep_share else int(other * vocab_size)
            selected_NT[block, at] = True
            read_NT[block, at] = info.mask_token_id if fate < info.mask_share else token
    return selected_NT, read_NT


def _kept_first(values: Array, axis: int, kept_NT: Array) -> Array:
    """The same with kept positions' values in front, in their order, and the last one's up to the end: rule Q-4."""
    out = values.copy()
    for rows, kept_T in zip(np.moveaxis(out, axis, 1), kept_NT, strict=True):
        kept, before = [*kept_T.nonzero()[0]] or [0], rows.copy()
        for entry in range(len(kept_T)):
            rows[entry] = before[kept[min(entry, len(kept) - 1)]]
    return out


def sparsify(probs_V: Array, k: int, fraction: float) -> tuple[Array, Array]:
    """Ids [K] and probabilities [K], summing to one, of fixed-size unbiased sparsification."""
    order = np.argsort(-probs_V, kind="stable")
    num_exact = 0
    while (
        num_exact < k and probs_V[order[num_exact]] * (k - num_exact) >= (1 - 1e-9) * probs_V[order[num_exact:]].sum()
    ):
        num_exact += 1
    rest_V, places = probs_V.copy(), k - num_exact
    rest_V[order[:num_exact]] = 0
    sampled = pick(rest_V, (np.arange(places) + fraction) / max(places, 1))
    values = np.concatenate([probs_V[order[:num_exact]], np.full(places, rest_V.sum() / max(places, 1))])
    return np.concatenate([order[:num_exact], sampled]), values / values.sum()


def uniforms(seed: int, block: int, position: int, *, stream: int, num_draws: int) -> Array:
    """float64 [num_draws] in [0, 1): rule W-8."""
    key = _mix((_mix((seed + _GOLDEN) & _MASK) + block * _GOLDEN) & _MASK)
    key = _mix((key + (position + 1) * _GOLDEN) & _MASK)
    bits = [_mix((key + ((stream << 32) + draw + 1) * _GOLDEN) & _MASK) for draw in range(num_draws)]
    return np.array([bit >> 11 for bit in bits]) * 2.0**-53


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def pick(mass_V: Array, fractions: Array) -> Array:
    """For each fraction the smallest id at which the running sum of masses exceeds that part of the whole."""
    ends_V = np.cumsum(mass_V)
    picked: Array = np.searchsorted(
        ends_V, np.minimum(fractions * ends_V[-1], np.nextafter(ends_V[-1], 0)), side="right"
    )
    return picked


def log_softmax(values: Array) -> Array:
    shifted = values - values.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _head(encoding: TopK | Prototype, g: Geometry, logprobs_NTV: Array) -> dict[str, Array]:
    """Ids, gaps and tail odds; tokens of equal probability come by ascending id."""
    ids_NTK = np.argsort(-logprobs_NTV, axis=-1, kind="stable")[..., : encoding.k]
    odds = []
    for temperature in g.temperatures:
        scaled_NTV = logprobs_NTV / temperature
        tail_NTV = scaled_NTV.copy()
        np.put_along_axis(tail_NTV, ids_NTK, -np.inf, axis=-1)
        head_NT = np.logaddexp.reduce(np.take_along_axis(scaled_NTV, ids_NTK, axis=-1), axis=-1)
        odds.append(np.logaddexp.reduce(tail_NTV, axis=-1) - head_NT)
    return {
        "head_ids": ids_NTK.astype(g.id_dtype),
        "head_gaps": encode_gaps(np.take_along_axis(logprobs_NTV, ids_NTK, axis=-1), encoding.levels),
        "tail_log_odds": encode_odds(np.stack(odds, axis=1), encoding.odds_step_nats),
    }


def _residual(
    encoding: Prototype, g: Geometry, probs_MNTV: list[Array], rows: dict[str, Array], tables: dict[str, Array]
) -> dict[str, Array]:
    """Draws from what the prototype leaves over, and tail odds rounded at random in place of those in ``rows``."""
    num_blocks, num_tokens = rows["tail_prototype"].shape
    half, step = encoding.residual_draws // 2, encoding.odds_step_nats
    shape = (num_blocks, num_tokens, len(g.temperatures))
    ids = np.zeros((*shape, encoding.residual_draws), g.id_dtype)
    order_CV = token_order(tables["prototypes"])
    odds, masses = np.full(shape, EMPTY_TAIL, np.int16), np.full(shape, EMPTY_TAIL, np.int16)
    shared_MCV = decode_prototypes(tables["prototypes"]).astype(np.float64)
    for block, position, at in np.ndindex(*shape):
        head = rows["head_ids"][block, position]
        tail_V, shared_V = (
            probs_MNTV[at][block, position].copy(),
            shared_MCV[at, rows["tail_prototype"][block, position]],
        )
        tail_V[head], shared_V = 0, np.where(np.isin(np.arange(g.vocab_size), head), 0, shared_V)
        if not tail_V.any():
            continue
        fractions = uniforms(encoding.seed, block, position, stream=at, num_draws=4)
        mass = tail_V.sum()
        odds[block, position, at] = _round_at_random(np.log(mass) - np.log1p(-mass), step, _sigmoid, fractions[0])
        difference_V = tail_V / mass - shared_V / shared_V.sum()
        parts = np.maximum(difference_V, 0), np.maximum(-difference_V, 0)
        if not all(part.any() for part in parts):
            continue
        size = _sigmoid(float(odds[block, position, at]) * step) * np.abs(difference_V).sum()
        if size == 0:
            continue  # a tail this thin has no mass in float64
        masses[block, position, at] = _round_at_random(np.log(size), MASS_STEP_NATS, np.exp, fractions[1])
        ids[block, position, at] = np.concatenate(
            [pick(part, (np.arange(half) + start) / half) for part, start in zip(parts, fractions[2:], strict=True)]
        )
    return {
        "tail_log_odds": _tokens_last(odds),
        "residual_ranks": encode_residual(
            encode_ranks(ids.reshape(num_blocks, num_tokens, -1), rows["tail_prototype"], order_CV).reshape(ids.shape),
            masses != EMPTY_TAIL,
        ),
        "residual_log_mass": _tokens_last(masses),
    }


def _round_at_random(value: float, step: float, of: object, fraction: float) -> int:
    """A code below or above value / step, so that ``of`` of what is decoded is right on average."""
    assert callable(of)
    code = int(np.floor(np.clip(value / step, -32767, 32766)))
    low, exact, high = (of(x) for x in (code * step, value, (code + 1) * step))
    # Where a code moves nothing that 64 bits hold, the one below is as good.
    return code + int(high > low and fraction < (exact - low) / (high - low))


def _sigmoid(value: float) -> float:
    return float(np.exp(-np.logaddexp(0, -value)))


def _tokens_last(values: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(values, 1, -1))


def _mean(values_NT: Array, is_counted_NT: Array) -> Array:
    """float32 [N]: mean over the counted positions."""
    means_N = (values_NT * is_counted_NT).sum(1) / np.maximum(is_counted_NT.sum(1), 1)
    rounded_N: Array = np.rint(means_N * _FLOAT_GRID) / _FLOAT_GRID
    return rounded_N.astype(np.float32)
