"""Blocks become a cache's arrays: equal to a dense float64 account of the teacher, for any chunk and thread count."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import EMPTY_TAIL, TopK, decode_gaps, decode_odds
from cache_spec.errors import EXIT_BAD_INPUT, BadInputError
from cache_spec.targets import Geometry
from pipeline.encoders import ENCODERS, make_encoder
from pipeline.targets import default_chunk_rows, encode_batch, pool_hidden
from pipeline.teacher import OutputHead, load_teacher
from pipeline.teacher_files import resolve_teacher
from tests.encoded import one_hot_head, some_tables
from tests.models import make_folder

LEVELS = 4096
ODDS_STEP = 1 / 256
TEMPERATURES = (0.5, 1.0, 2.0)
ENCODINGS: dict[str, Encoding] = {
    "topk": TopK(k=8),
    "sampled": Sampled(draws=20),
    "sparsified": Sparsified(k=8),
    "prototype": Prototype(k=8, prototypes=3, calibration_tokens=1, residual_draws=4),
    "hidden": Hidden(),
}


def encode(
    head: Any,
    hidden_BTD: torch.Tensor,
    ids_BT: Any,
    lengths_B: Any = None,
    *,
    encoding: Encoding | None = None,
    temperatures: tuple[float, ...] = TEMPERATURES,
    **changes: Any,
) -> dict[str, Any]:
    ids_BT = np.asarray(ids_BT)
    lengths_B = np.full(len(ids_BT), ids_BT.shape[1]) if lengths_B is None else np.asarray(lengths_B)
    encoding = encoding or TopK(k=8, levels=LEVELS, odds_step_nats=ODDS_STEP)
    geometry = Geometry(ids_BT.shape[1], temperatures, len(head.weight_VD), hidden_BTD.shape[2])
    encoder = make_encoder(encoding, geometry, tables=some_tables(encoding, geometry))
    settings: dict[str, Any] = {"first_block": 0} | changes
    return encode_batch(head, hidden_BTD, ids_BT, lengths_B, encoder=encoder, **settings)


def top(k: int) -> TopK:
    return TopK(k=k, levels=LEVELS, odds_step_nats=ODDS_STEP)


def check_against_dense(arrays: dict[str, Any], logits_BTV: torch.Tensor, ids_BT: Any, lengths_B: Any) -> None:
    """Every array but hidden, against float64 logits of the real vocabulary."""
    z_BTV = logits_BTV.double()
    lp_BTV = z_BTV.log_softmax(-1)
    num_blocks, num_tokens, vocab_size = z_BTV.shape
    head_BTK = torch.from_numpy(arrays["head_ids"].astype(np.int64))
    k = head_BTK.shape[2]
    head_lp_BTK = lp_BTV.gather(2, head_BTK)
    assert arrays["head_ids"].dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
    assert all(len(set(row.tolist())) == k for row in head_BTK.flatten(0, 1))
    torch.testing.assert_close(head_lp_BTK, lp_BTV.topk(k).values, rtol=1e-5, atol=2e-5)
    assert arrays["head_gaps"].shape == (num_blocks, k, num_tokens)
    roots_BTK = np.exp(decode_gaps(arrays["head_gaps"], LEVELS) / 2)
    assert np.abs(roots_BTK - (head_lp_BTK / 2).exp().numpy()).max() <= 0.5 / LEVELS + 1e-5
    inside_BTV = torch.zeros_like(z_BTV, dtype=torch.bool).scatter_(2, head_BTK, True)
    for index, temperature in enumerate(TEMPERATURES):
        scaled_BTV = lp_BTV / temperature
        odds_BT = scaled_BTV.masked_fill(inside_BTV, -torch.inf).logsumexp(-1)
        odds_BT -= scaled_BTV.masked_fill(~inside_BTV, -torch.inf).logsumexp(-1)
        found_BT = decode_odds(arrays["tail_log_odds"][:, index], ODDS_STEP)
        if k == vocab_size:
            assert np.isneginf(found_BT).all()
            continue
        expected_BT = odds_BT.clamp_min(-32767 * ODDS_STEP).numpy()
        assert np.abs(found_BT - expected_BT).max() <= ODDS_STEP / 2 + 2e-5
    entropy_BT = -torch.where(lp_BTV > -700, lp_BTV.exp() * lp_BTV, 0).sum(-1)
    for block, length in enumerate(lengths_B):
        gold_T = torch.from_numpy(np.asarray(ids_BT)[block, 1:length].astype(np.int64))
        losses_T = -lp_BTV[block, : length - 1].gather(1, gold_T[:, None])
        loss = losses_T.mean().item() if length > 1 else 0.0
        assert arrays["block_loss"][block] == pytest.approx(loss, rel=2e-5, abs=1e-5)
        assert arrays["block_entropy"][block] == pytest.approx(
            entropy_BT[block, :length].mean().item(), rel=2e-5, abs=1e-5
        )
    assert arrays["block_loss"].dtype == arrays["block_entropy"].dtype == np.float32
    np.testing.assert_array_equal(arrays["input_ids"], ids_BT)
    assert arrays["input_ids"].dtype == arrays["head_ids"].dtype
    np.testing.assert_array_equal(arrays["block_lengths"], lengths_B)
    assert arrays["block_lengths"].dtype == np.uint32


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("llama", {}),
        ("gpt_neox", {}),
        ("qwen2", {}),
    ],
)
@pytest.mark.parametrize("k", [5, 100])
def test_every_array_equals_the_dense_oracle(tmp_path: Path, family: str, changes: dict[str, Any], k: int) -> None:
    folder = make_folder(tmp_path, family, spread=3.0, **changes)
    teacher = load_teacher(resolve_teacher(str(folder)), device="cpu")
    assert (teacher.info.vocab_size, teacher.info.padded_vocab_size) == (100, 120)
    ids_BT = np.random.default_rng(0).integers(0, 100, (3, 24)).astype(np.uint16)
    lengths_B = np.array([24, 24, 9], dtype=np.uint32)
    arrays = encode(teacher.head, teacher.hidden(ids_BT), ids_BT, lengths_B, encoding=top(k), window=8)
    oracle = copy.deepcopy(teacher.model).double()
    ids = torch.from_numpy(ids_BT.astype(np.int64))
    check_against_dense(arrays, oracle(ids).logits[..., :100], ids_BT, lengths_B)
    hidden_BTD = oracle.base_model(ids).last_hidden_state
    expected_BWD = torch.stack([hidden_BTD[:, i : i + 8].mean(1) for i in (0, 8, 16)], 1)
    expected_BWD[2, 1:] = 0.0
    expected_BWD[2, 1] = hidden_BTD[2, 8]
    assert arrays["hidden"].dtype == np.float16
    np.testing.assert_allclose(arrays["hidden"], expected_BWD.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [7, 64, 65, 1000, 1024, 70_000])
def test_any_vocabulary_size_equals_the_dense_oracle(vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    logits_BTV = torch.randn(2, 5, vocab_size) * 4
    logits_BTV[0, 0, -1] = 30.0
    ids_BT = np.random.default_rng(0).integers(0, vocab_size, (2, 5))
    arrays = encode(*one_hot_head(logits_BTV), ids_BT, encoding=top(6))
    check_against_dense(arrays, logits_BTV, ids_BT, [5, 5])
    assert arrays["head_ids"][0, 0, 0] == vocab_size - 1


@pytest.mark.parametrize("peak", [50.0, 150.0, 1e4, 1e6])
def test_a_peaked_distribution_keeps_its_thin_tail(peak: float) -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(1, 4, 300)
    logits_BTV[:, :, 17] = peak
    ids_BT = np.full((1, 4), 17)
    arrays = encode(*one_hot_head(logits_BTV), ids_BT, encoding=top(4))
    check_against_dense(arrays, logits_BTV, ids_BT, [4])
    assert (arrays["tail_log_odds"] != EMPTY_TAIL).all()
    assert (arrays["head_ids"][..., 0] == 17).all()


def test_a_full_head_has_an_empty_tail() -> None:
    arrays = encode(*one_hot_head(torch.randn(1, 3, 20)), np.zeros((1, 3), int), encoding=top(20))
    assert (arrays["tail_log_odds"] == EMPTY_TAIL).all()


def test_a_normaliser_that_is_not_finite_is_refused() -> None:
    with pytest.raises(BadInputError, match="non-finite-normaliser: block 0") as caught:
        encode(*one_hot_head(torch.randn(1, 3, 500)), np.zeros((1, 3), int), temperatures=(1e-40, 1.0))
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_other_temperatures_of_the_grid_change_nothing() -> None:
    logits_BTV = torch.randn(1, 3, 500)
    grids = (TEMPERATURES, (2.0,), (0.7, 2.0))
    full, *others = (encode(*one_hot_head(logits_BTV), np.zeros((1, 3), int), temperatures=grid) for grid in grids)
    for other in others:
        np.testing.assert_array_equal(other["tail_log_odds"][:, -1], full["tail_log_odds"][:, -1])
        np.testing.assert_array_equal(other["head_gaps"], full["head_gaps"])
        np.testing.assert_allclose(other["block_entropy"], full["block_entropy"], rtol=1e-6)


def test_a_block_of_one_real_token_has_no_loss() -> None:
    logits_BTV = torch.randn(2, 4, 50)
    ids_BT = np.arange(8).reshape(2, 4)
    arrays = encode(*one_hot_head(logits_BTV), ids_BT, [4, 1])
    check_against_dense(arrays, logits_BTV, ids_BT, [4, 1])
    assert arrays["block_loss"][1] == 0


def test_loss_and_entropy_are_the_same_whatever_is_stored() -> None:
    assert set(ENCODINGS) == set(ENCODERS)
    torch.manual_seed(0)
    logits_BTV = torch.randn(2, 4, 300) * 3
    ids_BT = np.random.default_rng(0).integers(0, 300, (2, 4))
    expected, *others = (encode(*one_hot_head(logits_BTV), ids_BT, encoding=e, window=2) for e in ENCODINGS.values())
    for other in others:
        for name in ("input_ids", "block_lengths", "hidden"):
            np.testing.assert_array_equal(other[name], expected[name])
        for name in ("block_loss", "block_entropy"):
            np.testing.assert_allclose(other[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("vocab_size", [50, 1000])
@pytest.mark.parametrize("name", ENCODINGS)
def test_one_non_finite_logit_is_refused_by_its_blocks_name(bad: float, vocab_size: int, name: str) -> None:
    patched = torch.randn(12, vocab_size)
    patched[7, 33] = bad
    head = SimpleNamespace(
        weight_VD=torch.zeros(vocab_size, 12),
        logits=lambda hidden_ND, out_NV: out_NV.copy_(patched[hidden_ND.argmax(1)]),
    )
    hidden_BTD = torch.eye(12).reshape(3, 4, 12)
    with pytest.raises(BadInputError, match="block 11") as info:
        encode(head, hidden_BTD, np.zeros((3, 4), int), encoding=ENCODINGS[name], first_block=10)
    assert info.value.kind == "non-finite-logits"
    assert info.value.exit_code == EXIT_BAD_INPUT


def test_a_teacher_of_nans_is_refused_at_its_first_block(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, spread=float("nan"))
    teacher = load_teacher(resolve_teacher(str(folder)), device="cpu")
    ids_BT = np.zeros((2, 8), int)
    with pytest.raises(BadInputError, match="non-finite-logits: block 5,"):
        encode(teacher.head, teacher.hidden(ids_BT), ids_BT, first_block=5)


@pytest.mark.parametrize(("name", "window"), [("topk", 2), ("hidden", None)])
def test_hidden_states_beyond_float16_are_refused_by_their_blocks_name(name: str, window: int | None) -> None:
    head, hidden_BTD = one_hot_head(torch.randn(2, 4, 50))
    head.weight_VD.mul_(1e-3)
    hidden_BTD[1, 2] = 1e6
    encode(head, hidden_BTD, np.zeros((2, 4), int))
    with pytest.raises(BadInputError, match="hidden-overflow: block 8,"):
        encode(head, hidden_BTD, np.zeros((2, 4), int), encoding=ENCODINGS[name], first_block=7, window=window)


def test_pooling_averages_real_tokens_only() -> None:
    hidden_BTD = torch.arange(8.0).reshape(1, 8, 1)
    pooled = pool_hidden(hidden_BTD, torch.tensor([5]), 4)
    assert pooled.flatten().tolist() == [1.5, 4.0]
    assert pool_hidden(hidden_BTD, torch.tensor([4]), 4).flatten().tolist() == [1.5, 0.0]
    assert pool_hidden(hidden_BTD, torch.tensor([8]), 1).flatten().tolist() == list(range(8))
    assert pool_hidden(hidden_BTD.bfloat16(), torch.tensor([8]), 8).item() == 3.5


@pytest.mark.parametrize(("k", "window", "kind"), [(51, None, "k-above-vocabulary"), (8, 3, "bad-window")])
def test_settings_that_do_not_fit_are_refused(k: int, window: int | None, kind: str) -> None:
    with pytest.raises(BadInputError) as info:
        encode(*one_hot_head(torch.randn(1, 4, 50)), np.zeros((1, 4), int), encoding=top(k), window=window)
    assert info.value.kind == kind


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        parts: Iterator[Any] = iter(result if isinstance(result, list | tuple) else [result])
        self.largest = max([self.largest, *(part.numel() for part in parts if isinstance(part, torch.Tensor))])
        return result


@pytest.mark.parametrize("name", ENCODINGS)
def test_no_tensor_is_larger_than_the_chunk(name: str) -> None:
    torch.manual_seed(0)
    head = OutputHead(weight_VD=torch.randn(3008, 4), bias_V=None)
    hidden_BTD = torch.randn(4, 32, 4)
    with LargestTensor() as seen:
        encode(head, hidden_BTD, np.zeros((4, 32), int), encoding=ENCODINGS[name], chunk_rows=16, window=4)
    assert seen.largest == 16 * 3008
    assert default_chunk_rows(49_152) == 341
    assert default_chunk_rows(10**7) == 16


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_number_of_threads_does_not_change_a_bit(tmp_path: Path, name: str) -> None:
    teacher = load_teacher(resolve_teacher(str(make_folder(tmp_path, "llama", spread=3.0))), device="cpu")
    ids_BT = np.random.default_rng(0).integers(0, 100, (4, 50))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            hidden_BTD = teacher.hidden(ids_BT)
            results.append(encode(teacher.head, hidden_BTD, ids_BT, window=5, encoding=ENCODINGS[name]))
    finally:
        torch.set_num_threads(threads)
    for key, array in results[0].items():
        assert array.tobytes() == results[1][key].tobytes(), key
