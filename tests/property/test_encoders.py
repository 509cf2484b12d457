"""Any distribution through any encoder, at any temperature: valid arrays, within their bounds, summing to one.

Legend of axes: B blocks, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import TopK
from cache_spec.targets import HeadTargets
from tests.encoded import encode, full, meaning, one_hot_head

SEEDS = st.integers(0, (1 << 63) - 1)
LEVELS = st.sampled_from([16, 255, 256, 65_535])
GRIDS = st.lists(st.sampled_from([0.05, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 100.0]), min_size=1, max_size=3, unique=True)


@st.composite
def logits(draw: st.DrawFn) -> torch.Tensor:
    """float32 [2, 3, V]: flat to peaked, far from zero or not, with ties or without."""
    vocab_size = draw(st.integers(2, 200))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    values = torch.randn(2, 3, vocab_size, generator=rng) * draw(st.sampled_from([0.0, 0.1, 3.0, 30.0, 300.0]))
    if draw(st.booleans()):
        values = values.round()
    return values + draw(st.sampled_from([0.0, -1000.0, 1000.0]))


@st.composite
def encodings(draw: st.DrawFn, vocab_size: int) -> Encoding:
    k, levels = draw(st.integers(1, vocab_size)), draw(LEVELS)
    common: dict[str, Any] = {"k": k, "levels": levels, "odds_step_nats": draw(st.sampled_from([1.0, 1 / 64, 1e-3]))}
    choices: list[Encoding] = [
        TopK(**common),
        Sampled(draws=draw(st.integers(1, 300)), seed=draw(SEEDS)),
        Sparsified(k=k, levels=levels, seed=draw(SEEDS)),
        Prototype(
            prototypes=draw(st.integers(1, 4)),
            calibration_tokens=1,
            residual_draws=2 * draw(st.integers(0, 4)),
            seed=draw(SEEDS),
            **common,
        ),
        Hidden(dtype=draw(st.sampled_from(["float16", "int8"]))),
    ]
    return draw(st.sampled_from(choices))


@given(data=st.data(), logits_BTV=logits(), grid=GRIDS)
@settings(deadline=None, max_examples=150)
def test_every_encoding_of_anything_is_valid_and_sums_to_one(data: Any, logits_BTV: torch.Tensor, grid: Any) -> None:
    temperatures = tuple(sorted(grid))
    encoding = data.draw(encodings(logits_BTV.shape[2]))
    head, hidden_BTD = one_hot_head(logits_BTV)
    arrays, geometry = encode(head, hidden_BTD, encoding, temperatures)
    for part in encoding.arrays(geometry):
        assert (arrays[part.name].shape, arrays[part.name].dtype) == ((2, *part.row_shape), part.dtype)
    assert list(encoding.check(arrays, geometry, "test")) == []
    for at in range(len(temperatures)):
        for tail in ("uniform", "renormalise"):
            dense_BTV = meaning(arrays, encoding, geometry, at, head=head, tail=tail)
            np.testing.assert_allclose(dense_BTV.sum(-1), 1, atol=1e-6)
            assert getattr(encoding, "residual_draws", 0) or (dense_BTV >= 0).all()


@given(logits_BTV=logits(), grid=GRIDS, levels=LEVELS, data=st.data())
@settings(deadline=None, max_examples=100)
def test_heads_are_off_by_half_a_level_and_tails_by_half_a_step(
    logits_BTV: torch.Tensor, grid: Any, levels: int, data: Any
) -> None:
    temperatures = tuple(sorted(grid))
    k = data.draw(st.integers(1, logits_BTV.shape[2]))
    encoding = TopK(k=k, levels=levels, odds_step_nats=1 / 64)
    arrays, geometry = encode(*one_hot_head(logits_BTV), encoding, temperatures)
    ids_BTK = arrays["head_ids"].astype(np.intp)
    for at, temperature in enumerate(temperatures):
        targets = encoding.decode(arrays, geometry, at, "test")
        assert isinstance(targets, HeadTargets)
        roots_BTK = np.sqrt(np.take_along_axis(full(logits_BTV, 1.0), ids_BTK, 2))
        # The first of a head keeps a level, however small it is.
        roots_BTK[..., 0] = roots_BTK[..., 0].clip(min=1 / levels)
        assert np.abs(np.exp(targets.logprobs_BTK / 2) - roots_BTK).max() <= 0.5 / levels + 1e-5
        scaled_BTV = logits_BTV.double() / temperature
        inside_BTV = torch.zeros_like(scaled_BTV, dtype=torch.bool).scatter_(2, torch.from_numpy(ids_BTK), True)
        outside_BT = scaled_BTV.masked_fill(inside_BTV, -torch.inf).logsumexp(2)
        odds_BT = (outside_BT - scaled_BTV.masked_fill(~inside_BTV, -torch.inf).logsumexp(2)).numpy()
        if k == logits_BTV.shape[2]:
            assert np.isneginf(targets.tail_log_odds_BT).all()
            continue
        odds_BT = odds_BT.clip(-32767 / 64, 32767 / 64)
        # A logit near 1,000 is itself known to 3e-5, and to so many times as much at a low temperature.
        assert np.abs(targets.tail_log_odds_BT - odds_BT).max() <= 0.5 / 64 + 2e-4 * max(1, 1 / temperature)


@given(logits_BTV=logits(), temperature=st.sampled_from([0.5, 1.0, 2.0]), seed=SEEDS)
@settings(deadline=None, max_examples=100)
def test_with_the_whole_vocabulary_kept_nothing_is_lost(
    logits_BTV: torch.Tensor, temperature: float, seed: int
) -> None:
    k, levels = logits_BTV.shape[2], 65_535
    for encoding in (
        TopK(k=k, levels=levels),
        Sparsified(k=k, levels=levels, seed=seed),
        Prototype(k=k, levels=levels, prototypes=1, calibration_tokens=1, residual_draws=2, seed=seed),
    ):
        arrays, geometry = encode(*one_hot_head(logits_BTV), encoding, (temperature,))
        dense_BTV = meaning(arrays, encoding, geometry, 0)
        # Of a head at temperature 1 a small probability is off by a part that grows with its root at others.
        bound = 1e-4 if isinstance(encoding, Sparsified) or temperature <= 1 else 2e-3
        np.testing.assert_allclose(dense_BTV, full(logits_BTV, temperature), atol=bound)
