"""Every encoding of any distribution decodes within its bounds, and means a distribution.

In: random distributions, with ties, with one token, with none. Out: declared error bounds, sums of one, no mass below
zero.

Legend of axes: B blocks, T tokens, K kept, V vocabulary, M temperatures, C prototypes, D teacher width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden, encode_int8
from cache_spec.encodings.prototype import (
    TABLE_STEP_NATS,
    Prototype,
    decode_prototypes,
    encode_prototypes,
    encode_ranks,
    token_order,
)
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import (
    EMPTY_TAIL,
    TopK,
    decode_gaps,
    decode_odds,
    encode_gaps,
    encode_odds,
    gap_dtype,
)
from cache_spec.errors import CacheError
from cache_spec.targets import Array, Geometry, Tail, Targets, dense
from tests.conformance.examples import encode, log_softmax

TEMPERATURES = (0.01, 1.0, 2.0)
WIDTH = 3
MAX_EXAMPLES = 60

levels = st.sampled_from([2, 16, 128, 255, 256, 4096, 65535])
odds_steps = st.sampled_from([1 / 64, 1 / 32, 0.01, 1.0])


def float_arrays(shape: tuple[int, ...], low: float, high: float) -> st.SearchStrategy[Array]:
    count = int(np.prod(shape))
    values = st.lists(st.floats(low, high, width=32), min_size=count, max_size=count)
    return values.map(lambda numbers: np.array(numbers, np.float32).reshape(shape))


@st.composite
def heads(draw: st.DrawFn) -> Array:
    """Descending log-probabilities [1, T, K], of any size, tokens without probability among them."""
    num_tokens, k = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    values = draw(float_arrays((1, num_tokens, k), -40, 0))
    values[values < -30] = -np.inf
    return -np.sort(-values, axis=-1)


@st.composite
def logits(draw: st.DrawFn, vocab_size: int, num_tokens: int = 3) -> Array:
    """float64 [1, T, V]: smooth, peaked, tied or single tokens; -inf for tokens that cannot be."""
    values = draw(float_arrays((1, num_tokens, vocab_size), -8, 8)).astype(np.float64)
    kind = draw(st.sampled_from(["smooth", "peaked", "tied", "single", "masked"]))
    if kind == "peaked":
        values *= 20
    elif kind == "tied":
        values = np.rint(values / 8)
    elif kind == "single":
        values[..., 1:] = -np.inf
    elif kind == "masked":
        values[..., vocab_size // 2 :] = -np.inf
    return values


@given(heads(), levels)
@settings(max_examples=MAX_EXAMPLES, deadline=None)
def test_a_root_of_a_probability_is_off_by_at_most_half_a_level(logprobs_BTK: Array, num_levels: int) -> None:
    gaps_BKT = encode_gaps(logprobs_BTK, num_levels)
    assert gaps_BKT.dtype == gap_dtype(num_levels)
    decoded_BTK = decode_gaps(gaps_BKT, num_levels)
    assert decoded_BTK.dtype == np.float32
    assert (decoded_BTK[..., 1:] <= decoded_BTK[..., :-1]).all()
    assert np.isfinite(decoded_BTK[..., 0]).all()
    error_BTK = np.abs(np.exp(decoded_BTK.astype(np.float64) / 2) - np.exp(logprobs_BTK.astype(np.float64) / 2))
    bound = 0.5 / num_levels + 1e-6
    assert error_BTK[..., 1:].max(initial=0) <= bound
    # The first keeps a level, however small it is.
    assert (error_BTK[..., 0] <= np.where(logprobs_BTK[..., 0] > 2 * np.log(0.5 / num_levels), bound, 2 * bound)).all()


@given(heads(), levels)
@settings(max_examples=MAX_EXAMPLES, deadline=None)
def test_decoded_logprobs_encode_to_the_same_gaps(logprobs_BTK: Array, num_levels: int) -> None:
    gaps_BKT = encode_gaps(logprobs_BTK, num_levels)
    np.testing.assert_array_equal(encode_gaps(decode_gaps(gaps_BKT, num_levels), num_levels), gaps_BKT)


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=5), levels)
@settings(max_examples=MAX_EXAMPLES, deadline=None)
def test_gaps_decode_if_and_only_if_their_sum_is_a_level(gaps: list[int], num_levels: int) -> None:
    """Sums that wrap around in the stored dtype among them."""
    dtype = gap_dtype(num_levels)
    gaps_BKT = np.array(gaps, np.uint16).astype(dtype)[None, :, None]
    exact = np.cumsum(gaps_BKT[0, :, 0].astype(int))
    if exact[-1] <= num_levels and exact[0] < num_levels:
        with np.errstate(divide="ignore"):
            expected = 2 * np.log((num_levels - exact) / num_levels)
        np.testing.assert_allclose(decode_gaps(gaps_BKT, num_levels)[0, 0], expected, rtol=1e-5, atol=1e-6)
    else:
        with pytest.raises(CacheError, match="gap-overflow"):
            decode_gaps(gaps_BKT, num_levels)


@given(float_arrays((20,), -700, 700), odds_steps)
@settings(max_examples=MAX_EXAMPLES, deadline=None)
def test_log_odds_are_off_by_at_most_half_a_step_and_saturate(odds: Array, step: float) -> None:
    odds[::5] = -np.inf
    codes = encode_odds(odds, step)
    assert codes.dtype == np.int16
    np.testing.assert_array_equal(codes == EMPTY_TAIL, np.isneginf(odds))
    decoded = decode_odds(codes, step)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(decoded), np.isneginf(odds))
    finite = np.isfinite(odds)
    limit = 32767 * step
    np.testing.assert_allclose(decoded[finite], odds[finite].clip(-limit, limit), rtol=1e-6, atol=step / 2 + 1e-5)


@given(logits(7), st.integers(0, 2**16))
@settings(max_examples=MAX_EXAMPLES, deadline=None)
def test_prototypes_sum_to_one_and_keep_their_logs(logits_MCV: Array, seed: int) -> None:
    probs_MCV = np.exp(log_softmax(logits_MCV))
    codes_MCV = encode_prototypes(probs_MCV)
    decoded_MCV = decode_prototypes(codes_MCV)
    assert (decoded_MCV > 0).all(), "no token is impossible in a shared tail"
    np.testing.assert_allclose(decoded_MCV.sum(-1, dtype=np.float64), 1, atol=1e-6)
    known = probs_MCV > np.exp(-60)
    errors = np.abs(np.log(decoded_MCV.astype(np.float64))[known] - np.log(probs_MCV[known]))
    assert errors.max() <= TABLE_STEP_NATS + 1e-5
    order_CV = token_order(codes_MCV)
    ids_BTK = np.argsort(np.random.default_rng(seed).random((2, 5, 7)))[..., :4].astype(order_CV.dtype)
    rows_BT = np.random.default_rng(seed).integers(0, len(order_CV), (2, 5))
    ranks_BTK = encode_ranks(ids_BTK, rows_BT, order_CV)
    np.testing.assert_array_equal(order_CV[rows_BT[..., None], ranks_BTK], ids_BTK)


@given(st.integers(1, 5).flatmap(lambda width: float_arrays((2, 3, width), -30000, 30000)))
@settings(max_examples=MAX_EXAMPLES, deadline=None)
def test_int8_vectors_are_off_by_at_most_half_their_scale(values_BTD: Array) -> None:
    codes_BTD, scale_BT = encode_int8(values_BTD)
    assert codes_BTD.dtype == np.int8
    assert scale_BT.dtype == np.float32
    assert (np.abs(codes_BTD.astype(int)) <= 127).all()
    error_BTD = np.abs(codes_BTD * scale_BT[..., None].astype(np.float64) - values_BTD)
    # A scale below the smallest float32 is 0.
    assert (error_BTD <= scale_BT[..., None] / 2 * (1 + 1e-5) + 1e-37).all()


def made(encoding: Encoding, logits_BTV: Array, seed: int = 0) -> tuple[dict[str, Array], Geometry, dict[str, Array]]:
    """Stored arrays, geometry and tables."""
    num_blocks, num_tokens, vocab_size = logits_BTV.shape
    rng = np.random.default_rng(seed)
    geometry = Geometry(num_tokens, TEMPERATURES, vocab_size, WIDTH)
    hidden_BTD = rng.normal(size=(num_blocks, num_tokens, WIDTH)).astype(np.float16).astype(np.float64)
    tables: dict[str, Array] = {}
    if isinstance(encoding, Prototype):
        shared_MCV = np.stack(
            [log_softmax(rng.normal(size=(encoding.prototypes, vocab_size)) / x) for x in TEMPERATURES]
        )
        tables["prototypes"] = encode_prototypes(np.exp(shared_MCV))
        tables["prototype_classifier"] = rng.normal(size=(encoding.prototypes, WIDTH + 1)).astype(np.float32)
    return encode(encoding, geometry, log_softmax(logits_BTV), hidden_BTD, tables), geometry, tables


def decoded(
    encoding: Encoding, stored: dict[str, Array], geometry: Geometry, tables: dict[str, Any], at: int
) -> Targets:
    assert list(encoding.check(stored, geometry, "made up")) == []
    return encoding.decode(stored, geometry, at, "made up", encoding.prepare(lambda name: tables[name]))


def meanings(encoding: Encoding, logits_BTV: Array, at: int, tails: tuple[Tail, ...]) -> list[Array]:
    """The dense distributions that an encoding of logits stands for, one for each treatment of the tail."""
    stored, geometry, tables = made(encoding, logits_BTV)
    shared_CV = decode_prototypes(tables["prototypes"][at]) if "prototypes" in tables else None
    targets = decoded(encoding, stored, geometry, tables, at)
    return [
        dense(
            targets,
            temperature=TEMPERATURES[at],
            vocab_size=geometry.vocab_size,
            tail=tail,
            prototypes_CV=shared_CV,
            gold_BT=np.zeros(logits_BTV.shape[:2], np.intp),
        )
        for tail in tails
    ]


VOCAB_SIZE = 9
CASES: list[tuple[Encoding, tuple[Tail, ...]]] = [
    (TopK(k=2, levels=16, odds_step_nats=1e-5), ("uniform",)),
    (TopK(k=2, odds_step_nats=1.0), ("uniform",)),
    (TopK(k=3), ("renormalise", "uniform", "gold")),
    (TopK(k=VOCAB_SIZE, levels=4096), ("renormalise", "uniform", "gold")),
    (TopK(k=1, levels=2), ("renormalise", "uniform", "gold")),
    (Prototype(k=3, prototypes=4, calibration_tokens=1), ("prototype", "renormalise", "uniform", "gold")),
    (Prototype(k=VOCAB_SIZE, prototypes=1, calibration_tokens=1), ("prototype",)),
    (Sampled(draws=7), ("renormalise",)),
    (Sampled(draws=300), ("renormalise",)),
    (Sparsified(k=4), ("renormalise",)),
    (Sparsified(k=VOCAB_SIZE), ("renormalise",)),
    (Sparsified(k=1, levels=2), ("renormalise",)),
]


@pytest.mark.parametrize(("encoding", "tails"), CASES, ids=lambda case: getattr(case, "name", ""))
@given(logits(VOCAB_SIZE), st.sampled_from([0, 1, 2]))
@settings(max_examples=25, deadline=None)
def test_every_encoding_means_a_distribution(
    encoding: Encoding, tails: tuple[Tail, ...], logits_BTV: Array, at: int
) -> None:
    for probs_BTV in meanings(encoding, logits_BTV, at, tails):
        np.testing.assert_allclose(probs_BTV.sum(-1), 1, atol=1e-6)
        assert (probs_BTV >= 0).all()


@example(np.array([[[0.0] * 9, [0.0] * 9, [0, 7.75, 0.5, 0, 0, 0, 0, 0, 1]]]), 0)
@given(logits(VOCAB_SIZE), st.sampled_from([0, 1, 2]))
@settings(max_examples=25, deadline=None)
def test_a_prototype_with_residual_draws_still_sums_to_one(logits_BTV: Array, at: int) -> None:
    encoding = Prototype(k=2, prototypes=3, residual_draws=6, calibration_tokens=1)
    (probs_BTV,) = meanings(encoding, logits_BTV, at, ("prototype",))
    np.testing.assert_allclose(probs_BTV.sum(-1), 1, atol=1e-6)


@given(logits(VOCAB_SIZE), st.sampled_from([0, 1, 2]))
@settings(max_examples=25, deadline=None)
def test_the_whole_vocabulary_kept_is_the_full_softmax(logits_BTV: Array, at: int) -> None:
    """Up to half a level of each root at temperature 1, or to a level at the temperature itself where it is drawn."""
    levels, temperature = 65535, TEMPERATURES[at]
    head = root_bounds(np.exp(log_softmax(logits_BTV) / 2), 0.5 / levels, 2 / temperature)
    drawn = root_bounds(np.exp(log_softmax(logits_BTV / temperature) / 2), 1 / levels, 2)
    kept: list[tuple[Encoding, Tail, tuple[Array, Array]]] = [
        (TopK(k=VOCAB_SIZE, levels=levels), "renormalise", head),
        (TopK(k=VOCAB_SIZE, levels=levels), "uniform", head),
        (Prototype(k=VOCAB_SIZE, levels=levels, prototypes=2, calibration_tokens=1), "prototype", head),
        (Sparsified(k=VOCAB_SIZE, levels=levels), "renormalise", drawn),
    ]
    for encoding, tail, (least_BTV, most_BTV) in kept:
        (probs_BTV,) = meanings(encoding, logits_BTV, at, (tail,))
        assert (probs_BTV >= least_BTV - 1e-6).all(), encoding
        assert (probs_BTV <= most_BTV + 1e-6).all(), encoding


def root_bounds(roots_BTV: Array, error: float, power: float) -> tuple[Array, Array]:
    """What roots ** power, scaled to sum to one, can be where no root is off by more than ``error``."""
    low_BTV, high_BTV = np.maximum(roots_BTV - error, 0) ** power, (roots_BTV + error) ** power
    others_low_BTV = low_BTV.sum(-1, keepdims=True) - low_BTV
    others_high_BTV = high_BTV.sum(-1, keepdims=True) - high_BTV
    return low_BTV / (low_BTV + others_high_BTV), high_BTV / (high_BTV + others_low_BTV)


@given(st.integers(0, 2**32), st.sampled_from(["float16", "int8"]), st.floats(0.1, 10))
@settings(max_examples=25, deadline=None)
def test_hidden_states_mean_a_distribution_at_any_temperature(seed: int, dtype: Any, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    encoding = Hidden(dtype=dtype)
    hidden_BTD = rng.normal(size=(2, 3, WIDTH)).astype(np.float16).astype(np.float64)
    geometry = Geometry(3, (1.0,), VOCAB_SIZE, WIDTH)
    stored = encode(encoding, geometry, np.zeros((2, 3, VOCAB_SIZE)), hidden_BTD, {})
    weight_VD, bias_V = rng.normal(size=(VOCAB_SIZE, WIDTH)).astype(np.float32), rng.normal(size=VOCAB_SIZE)
    targets = decoded(encoding, stored, geometry, {}, 0)
    probs_BTV = dense(targets, temperature=temperature, vocab_size=VOCAB_SIZE, head=(weight_VD, bias_V))
    np.testing.assert_allclose(probs_BTV.sum(-1), 1, atol=1e-6)
    assert (probs_BTV >= 0).all()
    if dtype == "float16":
        full_BTV = np.exp(log_softmax((hidden_BTD @ weight_VD.T.astype(np.float64) + bias_V) / temperature))
        np.testing.assert_allclose(probs_BTV, full_BTV, atol=1e-6)


@pytest.mark.parametrize(
    "encoding",
    [
        TopK(k=3),
        Prototype(k=3, prototypes=2, residual_draws=2, calibration_tokens=1),
        Sampled(draws=5),
        Sparsified(k=3),
    ],
    ids=lambda encoding: str(encoding.name),
)
def test_ids_beyond_16_bits_come_back_whole(encoding: Encoding) -> None:
    vocab_size, token = 70_000, 69_999
    logits_BTV = np.zeros((1, 2, vocab_size))
    logits_BTV[..., token] = 30
    stored, geometry, tables = made(encoding, logits_BTV)
    assert {values.dtype for name, values in stored.items() if name.endswith(("_ids", "_ranks"))} == {np.dtype("u4")}
    targets: Any = decoded(encoding, stored, geometry, tables, 0)
    ids = targets.ids_BTK if hasattr(targets, "ids_BTK") else targets.ids_BTJ
    assert (ids[..., 0] == token).all()
    tail: Tail = "prototype" if "prototypes" in tables else "renormalise"
    probs_BTV = meanings(encoding, logits_BTV, 0, (tail,))[0]
    assert (probs_BTV[..., token] > 0.99).all()


def test_tokens_of_equal_probability_come_by_ascending_id() -> None:
    stored, _, _ = made(TopK(k=4), np.zeros((1, 2, VOCAB_SIZE)))
    assert stored["head_ids"].tolist() == [[[0, 1, 2, 3]] * 2]
    stored, _, _ = made(Sparsified(k=4), np.zeros((1, 2, VOCAB_SIZE)))
    assert (np.diff(stored["kept_ids"][0].astype(int), axis=1) > 0).all(), "none is exact, all are sampled, ascending"
