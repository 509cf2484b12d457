"""Several ranks train what one rank would: gradients, order, resume and errors, over gloo on the CPU."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_spec.errors import KdpipeError
from cache_spec.reader import CacheReader
from tests.processes import on_ranks
from tests.runs import BLOCKS, metric_lines, run_settings, save_run_cache, save_run_teacher, weights_of
from train.batches import MicroBatch, StepPlan, ahead, micro_batches
from train.config import TrainConfig
from train.loop import train
from train.parallel import is_slice, whole

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
LENGTHS = [8, 3, 1, 7, 8, 5, 2, 8, 6, 4, 1, 8, 8, 2, 5, 7, 3, 8, 1, 6, 4, 5]

WIDER: dict[str, Any] = {
    "student": "config",
    "num_layers": 2,
    "dropout": 0.2,
    "student_config": {
        "model_type": "llama",
        "hidden_size": 28,
        "intermediate_size": 33,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return save_run_cache(tmp_path_factory.mktemp("cache"), teacher, lengths=LENGTHS)


@pytest.fixture
def settings(cache: Path, teacher: Path, tmp_path: Path) -> dict[str, Any]:
    return run_settings(cache, teacher, tmp_path / "run") | {"batch_blocks": 1, "accumulate": 4}


def train_on(num_ranks: int, settings: dict[str, Any], **changes: Any) -> list[Any]:
    """Train with as many ranks; a step has the blocks that the settings give one rank."""
    accumulate = settings["accumulate"] // num_ranks
    config = TrainConfig(**(settings | {"accumulate": accumulate} | changes))
    return on_ranks(num_ranks, lambda _: train(config, quiet=True))


def gradients(num_ranks: int, settings: dict[str, Any], file: Path, **changes: Any) -> list[torch.Tensor]:
    """Gradients of the first step, as the optimizer gets them."""
    accumulate = settings["accumulate"] // num_ranks
    changed = {"accumulate": accumulate, "max_steps": 1, "max_grad_norm": 1e9, "out": file.with_suffix("")}
    config = TrainConfig(**(settings | changed | changes))

    def body(rank: int) -> bool:
        slices = False

        def record(optimizer: torch.optim.Optimizer) -> None:
            found = [whole(p.grad).clone() for group in optimizer.param_groups for p in group["params"]]
            nonlocal slices
            slices = all(is_slice(p) for group in optimizer.param_groups for p in group["params"])
            if rank == 0:
                torch.save(found, file)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", record)
            train(config, quiet=True)
        return slices

    assert on_ranks(num_ranks, body) == [config.strategy == "fsdp"] * num_ranks
    loaded: list[torch.Tensor] = torch.load(file, weights_only=True)
    return loaded


def worst_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert all(float(t.abs().max()) > 0 for t in theirs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_gradients_do_not_depend_on_ranks_and_accumulation(settings: dict[str, Any], tmp_path: Path) -> None:
    reference = gradients(1, settings, tmp_path / "one.pt")
    for num_ranks in (2, 4):
        ours = gradients(num_ranks, settings, tmp_path / f"{num_ranks}.pt")
        assert worst_difference(ours, reference) <= 1e-6
    assert worst_difference(gradients(1, settings | {"seed": 1}, tmp_path / "other.pt"), reference) > 1e-3


def test_whole_runs_do_not_depend_on_ranks_even_where_some_have_no_block_left(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """22 blocks in steps of 4 leave 2 for the last step of an epoch, and 4 ranks."""
    one = train(TrainConfig(**(settings | {"out": tmp_path / "one"})), quiet=True)
    results = train_on(4, settings)
    assert results == [results[0]] * 4
    assert {k: results[0][k] for k in ("steps", "tokens", "stopped_by")} == {
        k: one[k] for k in ("steps", "tokens", "stopped_by")
    }
    for ours, theirs in zip(metric_lines(settings["out"]), metric_lines(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name, tensor in weights_of(settings["out"]).items():
        torch.testing.assert_close(tensor, weights_of(tmp_path / "one")[name], rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_with_another_number_of_ranks(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(TrainConfig(**(settings | {"out": tmp_path / "one"})), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.ahead", killing_at(5, on_rank=1))
        killed = train_on(2, settings)
    assert killed[1] is None
    assert isinstance(killed[0], KdpipeError)
    assert (killed[0].kind, killed[0].said_elsewhere) == ("rank-lost", False)
    assert train(TrainConfig(**settings), quiet=True)["steps"] == 12
    for ours, theirs in zip(metric_lines(settings["out"]), metric_lines(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def killing_at(step: int, *, on_rank: int) -> Any:
    def items_until(items: Iterator[MicroBatch], depth: int = 2) -> Iterator[MicroBatch]:
        for item in ahead(items, depth):
            if item.step == step and int(os.environ.get("RANK", "0")) == on_rank:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    return items_until


def test_an_interrupt_of_one_rank_stops_all_after_the_same_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(items: Iterator[MicroBatch], depth: int = 2) -> Iterator[MicroBatch]:
        for item in ahead(items, depth):
            if item.step == 4 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr("train.loop.ahead", interrupting)
        assert [type(told) for told in train_on(2, settings)] == [KeyboardInterrupt] * 2
    assert [path.name for path in (settings["out"] / "checkpoints").glob("step-*")] == ["step-00000004"]


def test_an_error_of_one_rank_ends_all_and_is_said_once(
    settings: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "cache"
    shutil.copytree(cache, broken)
    shard = next((broken / "head_ids").glob("c.*"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    told = train_on(2, settings | {"cache": broken})
    assert all(isinstance(error, KdpipeError) for error in told)
    assert str(told[0]) == str(told[1])
    assert [error.said_elsewhere for error in told].count(False) == 1


def test_a_gradient_that_is_not_finite_stops_all_ranks_and_names_the_blocks_of_all(settings: dict[str, Any]) -> None:
    told = train_on(2, settings | {"learning_rate": 1e30, "max_grad_norm": 1e30})
    assert [error.kind for error in told] == ["non-finite-loss"] * 2
    assert [error.said_elsewhere for error in told] == [False, True]
    assert str(told[0]) == str(told[1])
    assert str(told[0]).count(", ") >= 4


def test_settings_that_are_refused_are_refused_by_one_rank_for_all(settings: dict[str, Any]) -> None:
    told = train_on(2, settings, temperature=3.0)
    assert [error.kind for error in told] == ["undeclared-temperature"] * 2
    assert [error.said_elsewhere for error in told] == [False, True]
    assert not settings["out"].exists()


@pytest.mark.parametrize("read_ahead", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_order_is_the_same_at_any_number_of_ranks_and_from_any_step(
    cache: Path, num_ranks: int, read_ahead: int
) -> None:
    reader = CacheReader.open(cache)

    def order(ranks: int, depth: int, first_step: int) -> dict[tuple[int, int], list[int]]:
        plan = StepPlan(num_blocks=BLOCKS, batch_blocks=1, accumulate=4 // ranks, epochs=2, num_ranks=ranks)
        found: dict[tuple[int, int], list[int]] = {}
        ends: set[tuple[int, ...]] = set()
        for rank in range(ranks):
            items = micro_batches(
                reader, plan, first_step=first_step, temperature=1.0, seed=3, window_shards=2, rank=rank
            )
            taken = list(ahead(items, depth))
            ends.add(tuple(micro.step for micro in taken if micro.ends_step))
            for micro in taken:
                if len(micro.blocks):
                    found[micro.step, micro.number] = micro.blocks.tolist()
                    assert np.array_equal(micro.batch.lengths_B.numpy(), [LENGTHS[b] for b in micro.blocks])
                else:
                    assert micro.batch.lengths_B.tolist() == [0]
        assert len(ends) == 1
        return found

    whole_order = order(1, 0, 0)
    assert sum(len(blocks) for blocks in whole_order.values()) == 2 * BLOCKS
    for first_step in (0, 1, 5, 8):
        wanted = {key: blocks for key, blocks in whole_order.items() if key[0] >= first_step}
        assert order(num_ranks, read_ahead, first_step) == wanted


def test_slices_of_the_student_on_two_ranks_learn_what_a_whole_one_does(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, a checkpoint of an interrupted run, which one rank could go on from, and the exported student."""
    settings |= {"mse_weight": 0.5, "evaluate_cache": settings["cache"], "evaluate_every": 4}
    train(TrainConfig(**(settings | {"out": tmp_path / "one"})), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.ahead", killing_at(7, on_rank=1))
        assert train_on(2, settings, strategy="fsdp")[1] is None
    results = train_on(2, settings, strategy="fsdp")
    assert results[0] == results[1]
    assert results[0]["steps"] == 12
    for ours, theirs in zip(metric_lines(settings["out"]), metric_lines(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name, tensor in weights_of(settings["out"]).items():
        torch.testing.assert_close(tensor, weights_of(tmp_path / "one")[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_of_a_wider_student_with_its_own_head_and_a_projection(
    settings: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    reference = gradients(1, settings | WIDER, tmp_path / "one.pt")
    assert worst_difference(gradients(2, settings | WIDER, tmp_path / "two.pt", strategy=strategy), reference) <= 1e-6


def test_gradients_of_slices_are_those_of_the_whole(settings: dict[str, Any], tmp_path: Path) -> None:
    reference = gradients(1, settings, tmp_path / "one.pt")
    ours = gradients(2, settings, tmp_path / "two.pt", strategy="fsdp")
    assert worst_difference(ours, reference) <= 1e-6
