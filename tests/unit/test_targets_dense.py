"""What stored targets stand for, spelt out over the whole vocabulary: every form and every treatment of the tail.

In: targets made by hand. Out: the distribution that ``cache_spec.targets.dense`` says they are, against its formula.

Legend of axes: B blocks, T tokens, K kept, V vocabulary, C prototypes, S residual draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cache_spec.targets import Array, HeadTargets, HiddenTargets, PointTargets, dense
from tests.refusals import refused

V = 11
K = 4


def softmax(values: Array) -> Array:
    powers: Array = np.exp(values - values.max(-1, keepdims=True))
    result: Array = powers / powers.sum(-1, keepdims=True)
    return result


def full(temperature: float, seed: int = 0) -> Array:
    """A full distribution [2, 3, V] at a temperature."""
    return softmax(np.random.default_rng(seed).normal(size=(2, 3, V)) * 2 / temperature)


def head_of(temperature: float, **others: Any) -> HeadTargets:
    """The exact head and tail of ``full``, as float32."""
    cold_BTV, probs_BTV = full(1.0), full(temperature)
    ids_BTK = np.argsort(-cold_BTV, axis=-1)[..., :K]
    kept_BT = np.take_along_axis(probs_BTV, ids_BTK, -1).sum(-1)
    return HeadTargets(
        ids_BTK=ids_BTK.astype(np.uint16),
        logprobs_BTK=np.log(np.take_along_axis(cold_BTV, ids_BTK, -1)).astype(np.float32),
        tail_log_odds_BT=np.log((1 - kept_BT) / kept_BT).astype(np.float32),
        **others,
    )


def is_head(targets: HeadTargets) -> Array:
    mask_BTV = np.zeros((2, 3, V), bool)
    np.put_along_axis(mask_BTV, targets.ids_BTK.astype(np.intp), True, axis=-1)
    return mask_BTV


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_head_tokens_have_their_probabilities_and_a_uniform_tail_shares_the_rest(temperature: float) -> None:
    targets, exact_BTV = head_of(temperature), full(temperature)
    probs_BTV = dense(targets, temperature=temperature, vocab_size=V, tail="uniform")
    assert probs_BTV.dtype == np.float64
    head = is_head(targets)
    np.testing.assert_allclose(probs_BTV[head], exact_BTV[head], rtol=1e-5)
    share_BT1 = np.where(head, 0, exact_BTV).sum(-1, keepdims=True) / (V - K)
    np.testing.assert_allclose(probs_BTV, np.where(head, exact_BTV, share_BT1), rtol=1e-5)


def test_a_renormalised_head_is_rescaled_and_has_no_tail() -> None:
    targets, exact_BTV = head_of(2.0), full(2.0)
    probs_BTV = dense(targets, temperature=2.0, vocab_size=V, tail="renormalise")
    kept_BTV = np.where(is_head(targets), exact_BTV, 0)
    np.testing.assert_allclose(probs_BTV, kept_BTV / kept_BTV.sum(-1, keepdims=True), rtol=1e-5)


def test_the_gold_token_gets_the_tail_whether_in_the_head_or_not() -> None:
    targets, exact_BTV = head_of(1.0), full(1.0)
    order_BTV = np.argsort(-exact_BTV, axis=-1)
    kept_BTV = np.where(is_head(targets), exact_BTV, 0)
    for rank in (0, K - 1, K, V - 1):
        gold_BT = order_BTV[..., rank]
        expected_BTV = kept_BTV.copy()
        np.add.at(expected_BTV, (*np.ix_(range(2), range(3)), gold_BT), 1 - kept_BTV.sum(-1))
        probs_BTV = dense(targets, temperature=1.0, vocab_size=V, tail="gold", gold_BT=gold_BT)
        np.testing.assert_allclose(probs_BTV, expected_BTV, rtol=1e-5, atol=1e-9)


def test_a_bucket_says_nothing_of_single_tokens() -> None:
    message = refused("no-dense-meaning", dense, head_of(1.0), temperature=1.0, vocab_size=V, tail="bucket")
    assert "tail bucket" in message


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_tail_that_is_its_prototype_comes_back_exactly(temperature: float) -> None:
    """The prototype is the full distribution: outside the head, scaled, it is the tail."""
    exact_BTV = full(temperature)
    targets = head_of(temperature, prototype_BT=np.arange(6).reshape(2, 3))
    prototypes_CV = exact_BTV.reshape(6, V)
    probs_BTV = dense(targets, temperature=temperature, vocab_size=V, tail="prototype", prototypes_CV=prototypes_CV)
    np.testing.assert_allclose(probs_BTV, exact_BTV, rtol=1e-5)


def test_a_token_outside_the_head_follows_its_own_prototype() -> None:
    prototypes_CV = softmax(np.random.default_rng(3).normal(size=(2, V)))
    rows_BT = np.array([[0, 1, 1], [1, 0, 0]])
    targets = head_of(1.0, prototype_BT=rows_BT)
    probs_BTV = dense(targets, temperature=1.0, vocab_size=V, tail="prototype", prototypes_CV=prototypes_CV)
    mass_BT = 1 / (1 + np.exp(-targets.tail_log_odds_BT.astype(np.float64)))
    for block, token in np.ndindex(2, 3):
        tail_V = np.where(is_head(targets)[block, token], 0, prototypes_CV[rows_BT[block, token]])
        outside = tail_V > 0
        expected = mass_BT[block, token] * tail_V / tail_V.sum()
        np.testing.assert_allclose(probs_BTV[block, token][outside], expected[outside], rtol=1e-9)


def test_residual_draws_are_added_as_often_as_they_repeat() -> None:
    prototypes_CV = np.full((1, V), 1 / V)
    draws = np.array([[[5, 5, 0]] * 3] * 2, np.uint16)
    weights = np.array([[[0.25, 0.25, -0.5]] * 3] * 2, np.float32)
    plain = head_of(1.0, prototype_BT=np.zeros((2, 3), np.intp))
    drawn = head_of(1.0, prototype_BT=np.zeros((2, 3), np.intp), residual_ids_BTS=draws, residual_weights_BTS=weights)
    before, after = (
        dense(targets, temperature=1.0, vocab_size=V, tail="prototype", prototypes_CV=prototypes_CV)
        for targets in (plain, drawn)
    )
    difference = after - before
    np.testing.assert_allclose(difference[..., 5], 0.5, rtol=1e-12)
    np.testing.assert_allclose(difference[..., 0], -0.5, rtol=1e-12)
    assert np.count_nonzero(difference) == 2 * 6
    np.testing.assert_array_equal(
        dense(drawn, temperature=1.0, vocab_size=V, tail="uniform"),
        dense(plain, temperature=1.0, vocab_size=V, tail="uniform"),
    )


@pytest.mark.parametrize("log_odds", [-80.0, 80.0])
def test_both_a_tiny_tail_and_a_tiny_head_keep_their_digits(log_odds: float) -> None:
    targets = HeadTargets(
        ids_BTK=np.array([[[3]]], np.uint16),
        logprobs_BTK=np.array([[[-1.5]]], np.float32),
        tail_log_odds_BT=np.array([[log_odds]], np.float32),
    )
    probs_V = dense(targets, temperature=1.0, vocab_size=V, tail="uniform")[0, 0]
    tail = np.delete(probs_V, 3).sum()
    small = tail if log_odds < 0 else probs_V[3]
    assert small == pytest.approx(np.exp(-80), rel=1e-12)
    assert probs_V.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("tail", ["renormalise", "uniform", "gold", "prototype"])
def test_an_empty_tail_and_impossible_head_tokens_leave_the_head_alone(tail: Any) -> None:
    targets = HeadTargets(
        ids_BTK=np.array([[[3, 7]]], np.uint16),
        logprobs_BTK=np.array([[[0.0, -np.inf]]], np.float32),
        tail_log_odds_BT=np.array([[-np.inf]], np.float32),
        prototype_BT=np.zeros((1, 1), np.intp),
    )
    probs_V = dense(
        targets,
        temperature=2.0,
        vocab_size=V,
        tail=tail,
        prototypes_CV=np.full((1, V), 1 / V, np.float32),
        gold_BT=np.array([[5]]),
    )[0, 0]
    np.testing.assert_array_equal(probs_V, np.eye(V)[3])


@pytest.mark.parametrize("tail", ["uniform", "prototype"])
def test_with_the_whole_vocabulary_in_the_head_a_rounded_tail_is_no_tail(tail: Any) -> None:
    exact_BTV = full(1.0)
    ids_BTV = np.argsort(-exact_BTV, axis=-1)
    targets = HeadTargets(
        ids_BTK=ids_BTV,
        logprobs_BTK=np.log(np.take_along_axis(exact_BTV, ids_BTV, -1)).astype(np.float32),
        tail_log_odds_BT=np.full((2, 3), -40, np.float32),
        prototype_BT=np.zeros((2, 3), np.intp),
    )
    prototypes_CV = np.full((1, V), 1 / V)
    probs_BTV = dense(targets, temperature=1.0, vocab_size=V, tail=tail, prototypes_CV=prototypes_CV)
    np.testing.assert_allclose(probs_BTV, exact_BTV, rtol=1e-5)


def test_points_are_where_they_are_said_to_be_and_padding_is_nowhere() -> None:
    targets = PointTargets(
        ids_BTJ=np.array([[[4, 0, 0], [0, 10, 2]]], np.uint16),
        probs_BTJ=np.array([[[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]], np.float32),
    )
    probs_BTV = dense(targets, temperature=3.0, vocab_size=V)
    expected = np.zeros((1, 2, V))
    expected[0, 0, 4], expected[0, 1, [0, 10, 2]] = 1, (0.5, 0.25, 0.25)
    np.testing.assert_array_equal(probs_BTV, expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("has_bias", [True, False])
def test_hidden_states_and_a_head_are_a_softmax_of_logits(temperature: float, has_bias: bool) -> None:
    rng = np.random.default_rng(2)
    hidden_BTD = rng.normal(size=(2, 3, 5)).astype(np.float16)
    weight_VD = rng.normal(size=(V, 5)).astype(np.float32)
    bias_V = rng.normal(size=V).astype(np.float32) if has_bias else None
    probs_BTV = dense(
        HiddenTargets(hidden_BTD=hidden_BTD), temperature=temperature, vocab_size=V, head=(weight_VD, bias_V)
    )
    logits_BTV = np.einsum("btd,vd->btv", hidden_BTD.astype(np.float64), weight_VD.astype(np.float64))
    logits_BTV = logits_BTV if bias_V is None else logits_BTV + bias_V
    np.testing.assert_allclose(probs_BTV, softmax(logits_BTV / temperature), rtol=1e-9)
