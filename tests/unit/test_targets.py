"""Stored arrays equal a dense float64 account of the teacher, for any head, temperature, chunk and thread count."""

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

from cache_spec.errors import EXIT_BAD_INPUT, BadInputError
from cache_spec.topk import decode_gaps
from pipeline.targets import default_chunk_rows, encode_batch, pool_hidden, top_k
from pipeline.teacher import OutputHead, load_teacher
from pipeline.teacher_files import resolve_teacher
from tests.models import make_folder

STEP = 1 / 256
TEMPERATURES = (0.5, 1.0, 2.0)


def stub_teacher(logits_BTV: torch.Tensor) -> Any:
    """A teacher whose logits are given: its hidden states are one-hot rows over a head that holds the logits."""
    num_blocks, num_tokens, vocab_size = logits_BTV.shape
    rows = num_blocks * num_tokens
    head = OutputHead(weight_VD=logits_BTV.reshape(rows, vocab_size).T.contiguous(), bias_V=None)
    hidden_BTD = torch.eye(rows).reshape(num_blocks, num_tokens, rows)
    return SimpleNamespace(info=SimpleNamespace(vocab_size=vocab_size), head=head, hidden=lambda _ids: hidden_BTD)


def encode(teacher: Any, ids_BT: Any, lengths_B: Any = None, **changes: Any) -> dict[str, Any]:
    ids_BT = np.asarray(ids_BT)
    lengths_B = np.full(len(ids_BT), ids_BT.shape[1]) if lengths_B is None else np.asarray(lengths_B)
    settings: dict[str, Any] = {"first_block": 0, "k": 8, "step_nats": STEP, "temperatures": TEMPERATURES} | changes
    return encode_batch(teacher, ids_BT, lengths_B, **settings)


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
    decoded_BTK = decode_gaps(arrays["head_gaps"], STEP)
    assert arrays["head_gaps"].shape == (num_blocks, k, num_tokens)
    expected_BTK = head_lp_BTK.clamp_min(-65535 * STEP).numpy()
    assert np.abs(decoded_BTK - expected_BTK).max() <= STEP / 2 + 2e-5 * np.abs(expected_BTK).max()
    inside_BTV = torch.zeros_like(z_BTV, dtype=torch.bool).scatter_(2, head_BTK, True)
    for index, temperature in enumerate(TEMPERATURES):
        normaliser_BT = (lp_BTV / temperature).logsumexp(-1)
        found = torch.from_numpy(arrays["log_normaliser"][:, index])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), normaliser_BT, rtol=3e-6, atol=1e-5)
        tail_BT = (lp_BTV / temperature).masked_fill(inside_BTV, -torch.inf).logsumexp(-1) - normaliser_BT
        tail_found = torch.from_numpy(arrays["log_tail_mass"][:, index])
        assert tail_found.dtype == torch.float16
        torch.testing.assert_close(
            tail_found.double(), tail_BT.clamp_min(-65504) if k < vocab_size else tail_BT, rtol=1e-3, atol=2e-5
        )
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
    arrays = encode(teacher, ids_BT, lengths_B, k=k, window=8)
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
    arrays = encode(stub_teacher(logits_BTV), ids_BT, k=6)
    check_against_dense(arrays, logits_BTV, ids_BT, [5, 5])
    assert arrays["head_ids"][0, 0, 0] == vocab_size - 1


@pytest.mark.parametrize("peak", [50.0, 150.0, 1e4, 1e6])
def test_a_peaked_distribution_keeps_its_thin_tail(peak: float) -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(1, 4, 300)
    logits_BTV[:, :, 17] = peak
    ids_BT = np.full((1, 4), 17)
    arrays = encode(stub_teacher(logits_BTV), ids_BT, k=4)
    check_against_dense(arrays, logits_BTV, ids_BT, [4])
    assert np.isfinite(arrays["log_tail_mass"]).all()
    assert (arrays["head_ids"][..., 0] == 17).all()


def test_a_full_head_has_an_empty_tail() -> None:
    arrays = encode(stub_teacher(torch.randn(1, 3, 20)), np.zeros((1, 3), int), k=20)
    assert np.isneginf(arrays["log_tail_mass"]).all()


def test_the_normaliser_at_one_is_exactly_zero() -> None:
    arrays = encode(stub_teacher(torch.randn(1, 3, 500)), np.zeros((1, 3), int))
    assert (arrays["log_normaliser"][:, TEMPERATURES.index(1.0)] == 0).all()


def test_a_normaliser_that_is_not_finite_is_refused() -> None:
    with pytest.raises(BadInputError, match="non-finite-normaliser: block 0") as caught:
        encode(stub_teacher(torch.randn(1, 3, 500)), np.zeros((1, 3), int), temperatures=(1e-40, 1.0))
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_temperatures_need_not_include_one() -> None:
    logits_BTV = torch.randn(1, 3, 500)
    full, two = (
        encode(stub_teacher(logits_BTV), np.zeros((1, 3), int), temperatures=t) for t in (TEMPERATURES, (2.0,))
    )
    np.testing.assert_array_equal(two["log_normaliser"], full["log_normaliser"][:, 2:])
    np.testing.assert_array_equal(two["block_entropy"], full["block_entropy"])


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


def test_a_block_of_one_real_token_has_no_loss() -> None:
    logits_BTV = torch.randn(2, 4, 50)
    ids_BT = np.arange(8).reshape(2, 4)
    arrays = encode(stub_teacher(logits_BTV), ids_BT, [4, 1])
    check_against_dense(arrays, logits_BTV, ids_BT, [4, 1])
    assert arrays["block_loss"][1] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("vocab_size", [50, 1000])
def test_one_non_finite_logit_is_refused_by_its_blocks_name(bad: float, vocab_size: int) -> None:
    logits_BTV = torch.randn(3, 4, vocab_size)
    teacher = stub_teacher(logits_BTV)
    patched = torch.randn(12, vocab_size)
    patched[7, 33] = bad
    teacher.head = SimpleNamespace(
        logits=lambda hidden_ND, out_NV: out_NV.copy_(patched[hidden_ND.argmax(1)]),
    )
    with pytest.raises(BadInputError, match="block 11") as info:
        encode(teacher, np.zeros((3, 4), int), first_block=10)
    assert info.value.kind == "non-finite-logits"
    assert info.value.exit_code == EXIT_BAD_INPUT


def test_a_teacher_of_nans_is_refused_at_its_first_block(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, spread=float("nan"))
    teacher = load_teacher(resolve_teacher(str(folder)), device="cpu")
    with pytest.raises(BadInputError, match="non-finite-logits: block 5,"):
        encode(teacher, np.zeros((2, 8), int), first_block=5)


def test_hidden_states_beyond_float16_are_refused_by_their_blocks_name() -> None:
    teacher = stub_teacher(torch.randn(2, 4, 50))
    hidden_BTD = teacher.hidden(None).clone()
    hidden_BTD[1, 2] = 1e6
    teacher.hidden = lambda _ids: hidden_BTD
    teacher.head.weight_VD.mul_(1e-3)
    encode(teacher, np.zeros((2, 4), int))
    with pytest.raises(BadInputError, match="hidden-overflow: block 8,"):
        encode(teacher, np.zeros((2, 4), int), first_block=7, window=2)


def test_pooling_averages_real_tokens_only() -> None:
    hidden_BTD = torch.arange(8.0).reshape(1, 8, 1)
    pooled = pool_hidden(hidden_BTD, torch.tensor([5]), 4)
    assert pooled.flatten().tolist() == [1.5, 4.0]
    assert pool_hidden(hidden_BTD, torch.tensor([4]), 4).flatten().tolist() == [1.5, 0.0]
    assert pool_hidden(hidden_BTD, torch.tensor([8]), 1).flatten().tolist() == list(range(8))
    assert pool_hidden(hidden_BTD.bfloat16(), torch.tensor([8]), 8).item() == 3.5


@pytest.mark.parametrize(("changes", "kind"), [({"k": 51}, "k-above-vocabulary"), ({"window": 3}, "bad-window")])
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], kind: str) -> None:
    with pytest.raises(BadInputError) as info:
        encode(stub_teacher(torch.randn(1, 4, 50)), np.zeros((1, 4), int), **changes)
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


def test_no_tensor_is_larger_than_the_chunk() -> None:
    torch.manual_seed(0)
    head = OutputHead(weight_VD=torch.randn(3000, 4), bias_V=None)
    hidden_BTD = torch.randn(4, 32, 4)
    teacher: Any = SimpleNamespace(info=SimpleNamespace(vocab_size=3000), head=head, hidden=lambda _ids: hidden_BTD)
    with LargestTensor() as seen:
        encode(teacher, np.zeros((4, 32), int), k=16, chunk_rows=16, window=4)
    assert seen.largest == 16 * 3000
    assert default_chunk_rows(49_152) == 341
    assert default_chunk_rows(10**7) == 16


def test_the_number_of_threads_does_not_change_a_bit(tmp_path: Path) -> None:
    teacher = load_teacher(resolve_teacher(str(make_folder(tmp_path, "llama", spread=3.0))), device="cpu")
    ids_BT = np.random.default_rng(0).integers(0, 100, (4, 50))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(encode(teacher, ids_BT, window=5, k=9))
    finally:
        torch.set_num_threads(threads)
    for name, array in results[0].items():
        assert array.tobytes() == results[1][name].tobytes(), name
