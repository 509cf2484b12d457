"""What encoders store means what they say: against dense float64 accounts, at the edges of what can happen.

Legend of axes: B blocks, T tokens, V vocabulary, K kept, R rows, N draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import TopK
from cache_spec.targets import PointTargets
from pipeline.encoders.draws import pick, uniforms
from pipeline.encoders.hidden import head_dtype, head_tables
from pipeline.encoders.sampled import count_equal
from pipeline.encoders.sparsified import sparsify
from pipeline.encoders.spectrum import top_k
from pipeline.teacher import OutputHead
from tests.encoded import encode, full, meaning, one_hot_head, same_rows, some_tables

TEMPERATURES = (0.7, 1.0, 2.0)
LEVELS = 4096


def encodings(k: int = 8, prototypes: int = 3) -> dict[str, Encoding]:
    shared: dict[str, Any] = {"k": k, "levels": LEVELS, "prototypes": prototypes, "calibration_tokens": 1}
    return {
        "topk": TopK(k=k, levels=LEVELS),
        "sampled": Sampled(draws=40),
        "sparsified": Sparsified(k=k, levels=LEVELS),
        "prototype": Prototype(**shared),
        "residual": Prototype(residual_draws=6, **shared),
        "float16": Hidden(),
        "int8": Hidden(dtype="int8"),
    }


def checked(encoding: Encoding, logits_BTV: torch.Tensor, **changes: Any) -> list[np.ndarray[Any, Any]]:
    """Dense meanings at every temperature, of arrays of the declared shapes and dtypes that break no rule."""
    head, hidden_BTD = one_hot_head(logits_BTV)
    arrays, geometry = encode(head, hidden_BTD, encoding, TEMPERATURES, **changes)
    for part in encoding.arrays(geometry):
        assert arrays[part.name].shape == (len(logits_BTV), *part.row_shape)
        assert arrays[part.name].dtype == part.dtype
        assert arrays[part.name].flags.c_contiguous
    assert list(encoding.check(arrays, geometry, "test")) == []
    return [meaning(arrays, encoding, geometry, at, head=head) for at in range(len(TEMPERATURES))]


@pytest.mark.parametrize("name", encodings())
@pytest.mark.parametrize("vocab_size", [9, 300, 1000])
def test_every_meaning_is_a_distribution(name: str, vocab_size: int) -> None:
    torch.manual_seed(0)
    for dense_BTV in checked(encodings()[name], torch.randn(2, 6, vocab_size) * 3):
        np.testing.assert_allclose(dense_BTV.sum(-1), 1, atol=1e-6)
        # Draws are added to a shared tail, and may take more from a token than it has.
        assert name == "residual" or (dense_BTV >= 0).all()


@pytest.mark.parametrize("name", ["topk", "sparsified", "prototype", "residual", "float16", "int8"])
def test_with_the_whole_vocabulary_kept_nothing_is_lost(name: str) -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(2, 5, 40) * 2
    # Half a level of each root, or a whole one where rounding is at random; int8 is the coarsest.
    bound = 5e-3 if name == "int8" else 5e-4
    for temperature, dense_BTV in zip(TEMPERATURES, checked(encodings(k=40)[name], logits_BTV), strict=True):
        np.testing.assert_allclose(dense_BTV, full(logits_BTV, temperature), atol=bound)


@pytest.mark.parametrize("name", encodings())
@pytest.mark.parametrize("gap", [60.0, 1000.0, 1e5])
def test_a_single_possible_token_is_all_there_is(name: str, gap: float) -> None:
    logits_BTV = torch.randn(1, 4, 200) - gap
    logits_BTV[:, :, 77] = 0.0
    for dense_BTV in checked(encodings()[name], logits_BTV):
        np.testing.assert_allclose(dense_BTV[..., 77], 1, atol=1e-6)
        np.testing.assert_allclose(np.delete(dense_BTV, 77, axis=-1), 0, atol=1e-6)


@pytest.mark.parametrize("name", encodings())
@pytest.mark.parametrize("vocab_size", [8, 64, 500])
def test_equal_logits_are_a_distribution_too(name: str, vocab_size: int) -> None:
    for dense_BTV in checked(encodings()[name], torch.zeros(1, 4, vocab_size)):
        np.testing.assert_allclose(dense_BTV.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("name", encodings())
def test_ids_beyond_16_bits_are_kept(name: str) -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(1, 2, 70_000) - 5
    logits_BTV[..., 66_000:66_003] = torch.tensor([20.0, 19.0, 18.0])
    for temperature, dense_BTV in zip(TEMPERATURES[:2], checked(encodings()[name], logits_BTV), strict=False):
        expected = full(logits_BTV, temperature)[..., 66_000:66_003]
        np.testing.assert_allclose(dense_BTV[..., 66_000:66_003], expected, atol=0.35 if name == "sampled" else 2e-3)


@pytest.mark.parametrize("name", encodings())
def test_chunks_and_batches_of_any_shape_give_the_same_bytes(name: str) -> None:
    torch.manual_seed(0)
    head, hidden_BTD = OutputHead(weight_VD=torch.randn(300, 8), bias_V=None), torch.randint(-2, 3, (3, 10, 8)).float()
    # Products of small whole numbers are exact, so that only what comes after them could differ.
    head.weight_VD.round_()
    encoding = encodings()[name]
    tables = None
    expected, geometry = encode(head, hidden_BTD, encoding, TEMPERATURES, first_block=5)
    tables = some_tables(encoding, geometry)
    for chunk_rows in (1, 7, 30):
        found, _ = encode(head, hidden_BTD, encoding, TEMPERATURES, first_block=5, chunk_rows=chunk_rows, tables=tables)
        for key, array in expected.items():
            assert array.tobytes() == found[key].tobytes(), key
    for block in range(3):
        one, _ = encode(
            head, hidden_BTD[block : block + 1], encoding, TEMPERATURES, first_block=5 + block, tables=tables
        )
        for key, array in expected.items():
            assert array[block].tobytes() == one[key].tobytes(), key


@pytest.mark.parametrize("name", ["sampled", "sparsified", "residual"])
def test_draws_differ_by_seed_block_position_and_temperature(name: str) -> None:
    torch.manual_seed(0)
    head, hidden_BTD = same_rows(torch.randn(500), 2, 3)
    encoding = encodings()[name]
    ids_key = {"sampled": "draw_ids", "sparsified": "kept_ids", "residual": "residual_ranks"}[name]
    arrays, _ = encode(head, hidden_BTD, encoding, (1.0, 1.0000001))
    again, _ = encode(head, hidden_BTD, encoding, (1.0, 1.0000001))
    np.testing.assert_array_equal(arrays[ids_key], again[ids_key])
    other, _ = encode(head, hidden_BTD, encoding.model_copy(update={"seed": 1}), (1.0, 1.0000001))
    every = np.concatenate([arrays[ids_key], other[ids_key]]).swapaxes(2, 3)
    rows = every.reshape(-1, every.shape[-1])
    # Systematic samples of nearly equal uniforms may well be the same.
    assert len(rows) == 24
    assert len(np.unique(rows, axis=0)) >= 22


def test_uniforms_are_splitmix_hashes() -> None:
    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % (1 << 64)
        return value ^ (value >> 31)

    golden = 0x9E3779B97F4A7C15
    block_R, position_R = torch.tensor([0, 3, 1 << 40]), torch.tensor([0, 1023, 7])
    found = uniforms((1 << 63) - 1, block_R, position_R, num_streams=6, num_draws=4)[:, 5]
    for row, (block, position) in enumerate(zip(block_R.tolist(), position_R.tolist(), strict=True)):
        key = mix((mix(((1 << 63) - 1 + golden) % (1 << 64)) + block * golden) % (1 << 64))
        key = mix((key + (position + 1) * golden) % (1 << 64))
        for draw in range(4):
            bits = mix((key + ((5 << 32) + 1 + draw) * golden) % (1 << 64))
            assert found[row, draw].item() == (bits >> 11) / (1 << 53)


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    """Chi-square over 1,000 cells, in one and in two dimensions: a false alarm in 10,000 each (z of 3.7)."""
    num_rows = 20_000
    blocks_R, positions_R = torch.arange(num_rows) // 100, torch.arange(num_rows) % 100
    values_RN = uniforms(0, blocks_R, positions_R, num_streams=1, num_draws=50)[:, 0]
    cells = (values_RN.flatten() * 1000).long()
    # The same draw of the row's next position, and the next draw of the same position.
    across = (values_RN[:-1] * 32).long() * 32 + (values_RN[1:] * 32).long()
    along = (values_RN[:, :-1] * 32).long() * 32 + (values_RN[:, 1:] * 32).long()
    for found, num_cells in ((cells, 1000), (across, 1024), (along, 1024)):
        expected = found.numel() / num_cells
        chi_square = ((torch.bincount(found.flatten(), minlength=num_cells) - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - (num_cells - 1)) < 3.7 * (2 * (num_cells - 1)) ** 0.5


@pytest.mark.parametrize("vocab_size", [5, 64, 1000, 50_257])
def test_picks_are_where_a_float64_sum_over_all_ids_says(vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    mass_RV = torch.rand(4, vocab_size) ** 20
    mass_RV[0, ::2] = 0.0
    mass_RV[1, vocab_size // 2] = 1e4
    mass_RV[2] = 0.0
    mass_RV[2, 3] = 1e-30
    fractions_RN = torch.rand(4, 300, dtype=torch.float64)
    fractions_RN[:, 0], fractions_RN[:, 1] = 0.0, 1 - 2**-53
    found_RN = pick(mass_RV, fractions_RN).ids_RN.numpy()
    for mass_V, fractions_N, found_N in zip(mass_RV.numpy(), fractions_RN.numpy(), found_RN, strict=True):
        assert (mass_V[found_N] > 0).all()
        ends_V = mass_V.astype(np.float64).cumsum()
        expected_N = np.searchsorted(ends_V, fractions_N * ends_V[-1], side="right")
        # A draw closer to a boundary than float64 sums are to each other may fall on either side.
        clear_N = np.abs(ends_V[expected_N.clip(max=vocab_size - 1)] - fractions_N * ends_V[-1]) > 1e-11 * ends_V[-1]
        clear_N &= np.abs(ends_V[(expected_N - 1).clip(0)] - fractions_N * ends_V[-1]) > 1e-11 * ends_V[-1]
        assert clear_N.mean() > 0.9
        np.testing.assert_array_equal(found_N[clear_N], expected_N[clear_N])


def test_counts_are_those_of_distinct_ids_most_frequent_first() -> None:
    ids, counts = count_equal(torch.tensor([[5, 2, 5, 9, 2, 5], [7, 7, 7, 7, 7, 7], [6, 5, 4, 3, 2, 1]]))
    assert ids.tolist() == [[5, 2, 9, 0, 0, 0], [7, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert counts.tolist() == [[3, 2, 1, 0, 0, 0], [6, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]


def sparsified_row(probs_V: Any, k: int, uniform: float) -> tuple[list[int], list[float]]:
    mass_1V = torch.tensor(probs_V, dtype=torch.float32)[None]
    head_1K, ids_1K = top_k(mass_1V, k)
    tail_1V = mass_1V.scatter(1, ids_1K, 0.0)
    ids, probs = sparsify(head_1K, ids_1K, tail_1V, torch.tensor([[uniform]], dtype=torch.float64))
    return ids[0].tolist(), probs[0].tolist()


def test_large_probabilities_are_exact_and_small_ones_share_what_is_left() -> None:
    probs_V = [0.05, 0.5, 0.05, 0.1, 0.05, 0.25]
    for uniform in (0.0, 0.3, 0.7, 0.99):  # none at an edge
        ids, probs = sparsified_row(probs_V, 4, uniform)
        assert ids[:2] == [1, 5]
        np.testing.assert_allclose(probs, [0.5, 0.25, 0.125, 0.125], rtol=1e-6)
        assert ids[2] < ids[3]
        # The rest is 0, 2, 3, 4 with 0.05, 0.05, 0.1, 0.05; two places, 0.125 each.
        places = np.searchsorted([0.4, 0.8, 1.6, 2.0], [uniform, uniform + 1], side="right")
        assert ids[2:] == [[0, 2, 3, 4][place] for place in places]


@pytest.mark.parametrize(
    ("probs_V", "k"),
    [
        ([1.0, 0.0, 0.0, 0.0, 0.0], 3),
        ([0.5, 0.5, 0.0, 0.0, 0.0], 2),
        ([0.6, 0.4, 0.0, 0.0, 0.0], 4),
        ([0.2] * 5, 5),
        ([0.2] * 5, 3),
        ([0.125] * 8, 4),
        ([0.4, 0.3, 0.2, 0.1], 4),
        ([0.4, 0.2, 0.2, 0.2], 1),
    ],
)
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_exactly_k_distinct_tokens_sum_to_one(probs_V: list[float], k: int, uniform: float) -> None:
    ids, probs = sparsified_row(probs_V, k, uniform)
    assert len(set(ids)) == k
    assert sum(probs) == pytest.approx(1)
    assert probs == sorted(probs, reverse=True)
    if k >= sum(p > 0 for p in probs_V):
        np.testing.assert_allclose(probs, np.array(probs_V)[ids], atol=1e-7)


def test_sparsified_keeps_exactly_k_points_at_every_temperature() -> None:
    torch.manual_seed(0)
    encoding = Sparsified(k=12, levels=65_535)
    arrays, geometry = encode(*one_hot_head(torch.randn(2, 8, 400) * 2), encoding, TEMPERATURES)
    for at in range(3):
        targets = encoding.decode(arrays, geometry, at, "test")
        assert isinstance(targets, PointTargets)
        assert (targets.probs_BTJ > 0).all()
        assert all(len(set(row.tolist())) == 12 for row in targets.ids_BTJ.reshape(-1, 12))


@pytest.mark.parametrize("vocab_size", [40, 700])
def test_equal_values_come_by_ascending_id(vocab_size: int) -> None:
    torch.manual_seed(0)
    values_RV = torch.randint(0, 3, (50, vocab_size)).float()
    for k in (1, 5, vocab_size):
        values_RK, ids_RK = top_k(values_RV.clone(), k)
        torch.testing.assert_close(values_RK, values_RV.topk(k).values)
        torch.testing.assert_close(values_RV.gather(1, ids_RK), values_RK)
        same = values_RK[:, 1:] == values_RK[:, :-1]
        assert (ids_RK[:, 1:] > ids_RK[:, :-1])[same].all()
    assert (ids_RK == values_RV.sort(dim=1, descending=True, stable=True).indices).all()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_hidden_states_come_back_within_their_bound(dtype: Any) -> None:
    torch.manual_seed(0)
    hidden_BTD = torch.randn(2, 5, 16) * torch.logspace(-3, 3, 16)
    hidden_BTD[1, 2] = 0.0
    encoding = Hidden(dtype=dtype)
    head = OutputHead(weight_VD=torch.randn(30, 16) * 1e-3, bias_V=None)
    arrays, geometry = encode(head, hidden_BTD, encoding, ())
    found_BTD = encoding.decode(arrays, geometry, 0, "test").hidden_BTD.astype(np.float64)
    size_BT1 = hidden_BTD.abs().amax(2, keepdim=True).numpy()
    bound = np.abs(hidden_BTD.numpy()) * 2**-11 + 1e-7 if dtype == "float16" else size_BT1 / 254 * (1 + 1e-5)
    assert (np.abs(found_BTD - hidden_BTD.numpy()) <= bound).all()


def test_the_output_head_is_stored_as_narrow_as_it_is_exact() -> None:
    weight_VD = torch.randn(20, 4)
    narrow = OutputHead(weight_VD=weight_VD.half().float(), bias_V=torch.randn(20))
    wide = OutputHead(weight_VD=weight_VD, bias_V=None)
    huge = OutputHead(weight_VD=torch.full((20, 4), 1e6), bias_V=None)
    assert [head_dtype(head) for head in (narrow, wide, huge)] == ["float16", "float32", "float32"]
    for head in (narrow, wide, huge):
        tables = head_tables(head)
        np.testing.assert_array_equal(tables["output_head"].astype(np.float32), head.weight_VD.numpy())
        assert ("output_bias" in tables) == (head.bias_V is not None)
    np.testing.assert_array_equal(head_tables(narrow)["output_bias"], narrow.bias_V)


def test_a_prototype_follows_from_the_hidden_state_alone() -> None:
    torch.manual_seed(0)
    encoding = encodings(prototypes=5)["prototype"]
    head, hidden_BTD = OutputHead(weight_VD=torch.randn(60, 7), bias_V=None), torch.randn(2, 9, 7)
    arrays, geometry = encode(head, hidden_BTD, encoding, TEMPERATURES)
    classifier_CE = some_tables(encoding, geometry)["prototype_classifier"].astype(np.float64)
    votes_BTC = np.concatenate([hidden_BTD.numpy(), np.ones((2, 9, 1))], 2) @ classifier_CE.T
    np.testing.assert_array_equal(arrays["tail_prototype"], votes_BTC.argmax(2))
    assert len(np.unique(arrays["tail_prototype"])) > 1
