"""Prototypes are learnt: from real tokens only, the same every time, and right on average over the tokens of each.

Legend of axes: B blocks, T tokens, D width, V vocabulary, C prototypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cache_spec.encodings.prototype import Prototype, decode_prototypes
from cache_spec.errors import BadInputError
from cache_spec.targets import Geometry
from pipeline.calibrate import calibrate
from pipeline.teacher import OutputHead
from tests.encoded import encode, full, meaning

TEMPERATURES = (1.0, 2.0)
NUM_CLUSTERS = 4


def sample(seed: int = 0) -> tuple[OutputHead, torch.Tensor, np.ndarray[Any, Any]]:
    """A head, and hidden states [B, T, D] that lie around a few centres, with the centre of each."""
    rng = torch.Generator().manual_seed(seed)
    centres_CD = torch.randn(NUM_CLUSTERS, 8, generator=rng) * 2
    nearest_BT = torch.randint(0, NUM_CLUSTERS, (8, 64), generator=rng)
    hidden_BTD = centres_CD[nearest_BT] + 0.2 * torch.randn(8, 64, 8, generator=rng)
    head = OutputHead(weight_VD=torch.randn(200, 8, generator=rng) * 0.7, bias_V=torch.randn(200, generator=rng))
    return head, hidden_BTD, nearest_BT.numpy()


def learn(
    head: OutputHead, hidden_BTD: torch.Tensor, lengths_B: Any = None, *, batch: int = 4, **changes: Any
) -> tuple[Prototype, dict[str, Any]]:
    num_blocks, num_tokens, width = hidden_BTD.shape
    settings = {"k": 6, "levels": 4096, "odds_step_nats": 1e-3, "prototypes": NUM_CLUSTERS, "calibration_tokens": 10**6}
    encoding = Prototype(**{**settings, **changes})
    lengths_B = np.full(num_blocks, num_tokens) if lengths_B is None else np.asarray(lengths_B)
    batches = ((hidden_BTD[i : i + batch], lengths_B[i : i + batch]) for i in range(0, num_blocks, batch))
    geometry = Geometry(num_tokens, TEMPERATURES, len(head.weight_VD), width)
    return encoding, calibrate(encoding, geometry, head, batches)


def errors(head: OutputHead, hidden_BTD: torch.Tensor, encoding: Prototype, tables: Any, at: int) -> Any:
    """Meaning minus teacher [B, T, V]."""
    arrays, geometry = encode(head, hidden_BTD, encoding, TEMPERATURES, tables=tables)
    logits_BTV = hidden_BTD.double() @ head.weight_VD.double().T + (0 if head.bias_V is None else head.bias_V.double())
    dense_BTV = meaning(arrays, encoding, geometry, at, tables=tables)
    return dense_BTV - full(logits_BTV, TEMPERATURES[at]), arrays["tail_prototype"]


def test_tables_are_as_declared() -> None:
    head, hidden_BTD, _ = sample()
    encoding, tables = learn(head, hidden_BTD)
    geometry = Geometry(64, TEMPERATURES, 200, 8)
    assert [part.name for part in encoding.tables(geometry)] == list(tables)
    for part in encoding.tables(geometry):
        assert (tables[part.name].shape, tables[part.name].dtype) == (part.shape, part.dtype)
    np.testing.assert_allclose(decode_prototypes(tables["prototypes"]).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("at", range(len(TEMPERATURES)))
def test_each_prototype_is_right_on_average_over_its_tokens(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The prior is a row's mass beside a hundred here; without it the fit is exact but for the rounding of the table.
    monkeypatch.setattr("pipeline.calibrate._PRIOR_MASS", 0.01)
    head, hidden_BTD, nearest_BT = sample()
    encoding, tables = learn(head, hidden_BTD)
    error_BTV, prototype_BT = errors(head, hidden_BTD, encoding, tables, at)
    # Rows of one centre have one prototype, and those of another have another.
    pairs = {(a, b) for a, b in zip(nearest_BT.ravel(), prototype_BT.ravel(), strict=True)}
    assert len(pairs) == NUM_CLUSTERS
    for prototype in range(NUM_CLUSTERS):
        mine_NV = error_BTV[prototype_BT == prototype]
        assert np.abs(mine_NV.mean(0)).sum() < 0.03 * np.abs(mine_NV).sum(1).mean()


def test_more_prototypes_come_closer() -> None:
    head, hidden_BTD, _ = sample()
    sizes = []
    for prototypes in (1, NUM_CLUSTERS, 32):
        error_BTV, _ = errors(head, hidden_BTD, *learn(head, hidden_BTD, prototypes=prototypes), 1)
        sizes.append(np.abs(error_BTV).sum(-1).mean())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.6 * sizes[0]


def test_padding_and_batches_change_nothing() -> None:
    head, hidden_BTD, _ = sample()
    lengths_B = np.array([64] * 7 + [10])
    _, expected = learn(head, hidden_BTD, lengths_B)
    changed_BTD = hidden_BTD.clone()
    changed_BTD[7, 10:] = 1e3
    for batch in (1, 3, 8):
        _, found = learn(head, changed_BTD, lengths_B, batch=batch)
        for name, table in expected.items():
            assert table.tobytes() == found[name].tobytes()


def test_the_seed_decides_and_rows_beyond_the_limit_do_not() -> None:
    head, hidden_BTD, _ = sample()
    _, expected = learn(head, hidden_BTD[:4])
    _, limited = learn(head, hidden_BTD, calibration_tokens=4 * 64)
    _, other = learn(head, hidden_BTD[:4], seed=1, prototypes=16)
    _, first = learn(head, hidden_BTD[:4], seed=0, prototypes=16)
    assert all(expected[name].tobytes() == limited[name].tobytes() for name in expected)
    assert other["prototypes"].tobytes() != first["prototypes"].tobytes()


def test_equal_hidden_states_leave_prototypes_without_rows_that_still_mean_something() -> None:
    head, hidden_BTD, _ = sample()
    hidden_BTD[:] = hidden_BTD[0, 0]
    encoding, tables = learn(head, hidden_BTD)
    assert np.isfinite(tables["prototype_classifier"]).all()
    np.testing.assert_allclose(decode_prototypes(tables["prototypes"]).sum(-1), 1, rtol=1e-5)
    error_BTV, _ = errors(head, hidden_BTD, encoding, tables, 0)
    assert np.abs(error_BTV).sum(-1).max() < 2e-2


def test_a_head_that_is_the_whole_vocabulary_leaves_no_tail_to_learn() -> None:
    head, hidden_BTD, _ = sample()
    encoding, tables = learn(head, hidden_BTD, k=200)
    error_BTV, _ = errors(head, hidden_BTD, encoding, tables, 0)
    assert np.abs(error_BTV).max() < 1e-3


def test_fewer_tokens_than_prototypes_are_refused() -> None:
    head, hidden_BTD, _ = sample()
    with pytest.raises(BadInputError, match="too-few-tokens"):
        learn(head, hidden_BTD[:1, :3])
    hidden_BTD[3, 5, 2] = float("nan")
    with pytest.raises(BadInputError, match="non-finite-logits"):
        learn(head, hidden_BTD)
