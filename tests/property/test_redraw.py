"""Draws dealt out to epochs are right on average, have none in common within a cycle, and depend on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_spec.encodings.sampled import Sampled
from cache_spec.reader import CacheReader
from cache_spec.targets import PointTargets
from tests.evaluation import save_cache
from tests.refusals import refused
from tests.synthetic import make_manifest, make_rows, write_cache
from train.batches import StepPlan, micro_batches
from train.distil_batch import PointTensors
from train.redraw import check_draws, deal

COUNTS_J = np.array([20, 10, 6, 3, 1, 0])
DRAWS, KEEP = 40, 8


def test_dealt_draws_are_right_on_average_and_vary_as_draws_without_replacement() -> None:
    """Of 12,000 tokens: means within five standard errors, variances of the multivariate hypergeometric within 10%."""
    num_tokens = 1000
    dealt = np.concatenate(
        [
            deal(np.tile(COUNTS_J, (num_tokens, 1)), KEEP, seed=1, epoch=epoch, block=block)
            for block in range(3)
            for epoch in (0, 2, 4, 7)
        ]
    )
    share_J = COUNTS_J / DRAWS
    variance_J = KEEP * share_J * (1 - share_J) * (DRAWS - KEEP) / (DRAWS - 1)
    error_J = np.sqrt(variance_J / len(dealt))
    assert (np.abs(dealt.mean(0) - KEEP * share_J) <= 5 * error_J).all()
    assert (np.abs(dealt.var(0) - variance_J) <= 0.1 * variance_J).all()
    assert (dealt.sum(1) == KEEP).all()


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda c: sum(c) > 0),
    keep=st.integers(1, 12),
    cycle=st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_epochs_of_a_cycle_have_no_draw_in_common(counts: list[int], keep: int, cycle: int, seed: int) -> None:
    counts_TJ, keep = np.array([counts] * 3), min(keep, sum(counts))
    parts = sum(counts) // keep
    dealt = [deal(counts_TJ, keep, seed=seed, epoch=cycle * parts + part, block=5) for part in range(parts)]
    total_TJ = np.sum(dealt, axis=0)
    assert (total_TJ <= counts_TJ).all()
    assert (total_TJ.sum(1) == parts * keep).all()


def test_seed_cycle_and_block_change_the_draws() -> None:
    counts_TJ = np.tile(COUNTS_J, (50, 1))
    seen = [
        deal(counts_TJ, KEEP, seed=seed, epoch=epoch, block=block).tobytes()
        for seed, epoch, block in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 5, 0), (0, 0, 1)]
    ]
    assert len(set(seen)) == len(seen)


def sampled_cache(folder: Path, draws: int = 12) -> CacheReader:
    manifest = make_manifest(num_blocks=7, block_tokens=8, shard_blocks=4, vocab_size=50, encoding=Sampled(draws=draws))
    write_cache(folder, manifest, make_rows(manifest))
    return CacheReader.open(folder)


def points(reader: CacheReader, batch_blocks: int, first_step: int = 0, **changes: Any) -> dict[tuple[int, int], Any]:
    """Dense targets of each (epoch, block)."""
    plan = StepPlan(num_blocks=7, batch_blocks=batch_blocks, accumulate=1, epochs=3)
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 2, "window_shards": 2, "draws_per_step": 4, **changes}
    found: dict[tuple[int, int], Any] = {}
    for micro in micro_batches(reader, plan, first_step=first_step, **settings):
        targets = micro.batch.targets
        assert isinstance(targets, PointTensors)
        dense_BTV = torch.zeros(*targets.ids_BTJ.shape[:2], 50)
        dense_BTV.scatter_add_(2, targets.ids_BTJ.long(), targets.probs_BTJ)
        for block, dense_TV in zip(micro.blocks.tolist(), dense_BTV, strict=True):
            found[micro.epoch, block] = dense_TV
        assert targets.ids_BTJ.shape[2] == min(settings["draws_per_step"] or 12, 12)
    return found


def test_a_block_has_the_same_draws_in_any_batch_and_from_any_resume_point(tmp_path: Path) -> None:
    reader = sampled_cache(tmp_path / "cache")
    whole, other, late = points(reader, 2), points(reader, 3), points(reader, 2, first_step=5)
    assert whole.keys() == other.keys()
    assert all(torch.equal(dense_TV, whole[key]) for found in (other, late) for key, dense_TV in found.items())
    # Three epochs of 4 of 12 draws make up the whole of them.
    full = points(reader, 2, draws_per_step=None)
    for block in range(7):
        mean_TV = sum(whole[epoch, block] for epoch in range(3)) / 3
        torch.testing.assert_close(mean_TV, full[0, block])
        assert not torch.equal(whole[0, block], whole[1, block])
    assert all(torch.equal(dense_TV, full[key]) for key, dense_TV in points(reader, 2, draws_per_step=12).items())


def test_redrawing_needs_a_cache_of_enough_draws(tmp_path: Path) -> None:
    manifest = sampled_cache(tmp_path / "cache").manifest
    check_draws(12, manifest)
    check_draws(None, manifest)
    assert "at most 12" in refused("no-draws", check_draws, 13, manifest)
    assert "leave draws_per_step out" in refused("no-draws", check_draws, 4, save_cache(tmp_path / "heads").manifest)


@pytest.mark.parametrize("draws", [12, 300])
def test_shares_of_draws_give_their_counts_back(tmp_path: Path, draws: int) -> None:
    reader = sampled_cache(tmp_path / "cache", draws)
    targets = reader.batch(range(7), 1.0).targets
    assert isinstance(targets, PointTargets)
    counts = np.rint(targets.probs_BTJ * draws).astype(np.int64)
    stored = reader.read("draw_counts", range(7))[:, 0].swapaxes(1, 2)
    assert np.array_equal(counts, stored)
