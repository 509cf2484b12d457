"""A cache as a torch Dataset: batches, their order at any number of workers and ranks, and what joins them."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from cache_spec.reader import CacheReader
from tests.refusals import refused
from tests.synthetic import ENCODINGS, make_manifest, make_rows, write_cache
from train.batches import StepPlan, micro_batches
from train.dataset import BlockSampler, CacheDataset, CacheLoader, collate
from train.distil_batch import DistilBatch, count_terms

BLOCKS = 11
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
"""A machine may have fewer cores than there are workers."""


@pytest.fixture(scope="module", params=["prototype", "sparsified", "hidden"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    manifest = make_manifest(num_blocks=BLOCKS, encoding=ENCODINGS[request.param])
    rows = make_rows(manifest)
    rows["block_lengths"][-1] = 3
    write_cache(folder, manifest, rows)
    return folder


def tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    return [] if part is None else [each for field in fields(part) for each in tensors(getattr(part, field.name))]


def assert_same(left: DistilBatch, right: DistilBatch) -> None:
    assert len(tensors(left)) == len(tensors(right))
    assert all(torch.equal(*pair) for pair in zip(tensors(left), tensors(right), strict=True))


def loader(cache: Path, *, num_workers: int = 0, epoch: int = 0, **sampling: Any) -> CacheLoader:
    data = CacheDataset(cache, temperature=2.0)
    made = CacheLoader(data, BlockSampler(data, **{"batch_blocks": 2, "seed": 5} | sampling), num_workers=num_workers)
    made.set_epoch(epoch)
    return made


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_training_loop(cache: Path, num_workers: int) -> None:
    plan = StepPlan(num_blocks=BLOCKS, batch_blocks=2, accumulate=2, epochs=2)
    wanted = list(micro_batches(CacheReader.open(cache), plan, first_step=0, temperature=2.0, seed=5, window_shards=16))
    for epoch in (0, 1):
        found = list(loader(cache, num_workers=num_workers, epoch=epoch))
        of_epoch = [micro.batch for micro in wanted if micro.epoch == epoch]
        assert len(found) == len(of_epoch) == 6
        for left, right in zip(found, of_epoch, strict=True):
            assert_same(left, right)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_the_steps_of_one_rank_and_have_as_many_batches(
    cache: Path, num_ranks: int, num_workers: int
) -> None:
    whole = list(loader(cache))
    ranks = [list(loader(cache, num_workers=num_workers, num_ranks=num_ranks, rank=rank)) for rank in range(num_ranks)]
    assert {len(batches) for batches in ranks} == {-(-6 // num_ranks)}
    in_turn = [batches[turn] for turn in range(len(ranks[0])) for batches in ranks]
    for left, right in zip(in_turn, whole, strict=False):
        assert_same(left, right)
    for idle in in_turn[len(whole) :]:
        counts = count_terms(idle.lengths_B, 4)
        assert (counts.kl_tokens, counts.ce_tokens, counts.hidden_windows) == (0, 0, 0)


def test_epochs_and_seeds_differ_and_repeat(cache: Path) -> None:
    def order(**changed: Any) -> list[list[int]]:
        data = CacheDataset(cache)
        sampler = BlockSampler(data, batch_blocks=3, seed=changed.get("seed", 0))
        sampler.set_epoch(changed.get("epoch", 0))
        assert len(sampler) == len(list(sampler))
        return list(sampler)

    assert sorted(block for blocks in order() for block in blocks) == list(range(BLOCKS))
    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)


def test_any_sampler_of_torch_does(cache: Path) -> None:
    data = CacheDataset(cache, temperature=2.0)
    assert_same(collate([data[3], data[0], data[10]]), data.__getitems__([3, 0, 10])[0])
    plain = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate)
    assert sorted(len(batch.lengths_B) for batch in plain) == [3, 4, 4]
    part = DataLoader(Subset(data, [7, 8]), batch_size=2, collate_fn=collate)
    assert_same(next(iter(part)), data.__getitems__([7, 8])[0])


def test_a_dataset_that_has_read_travels_to_another_process_without_its_open_files(cache: Path) -> None:
    data = CacheDataset(cache, temperature=2.0)
    first = data[0]
    assert_same(pickle.loads(pickle.dumps(data))[0], first)
    assert b"ShardFile" not in pickle.dumps(data)
    assert_same(pickle.loads(pickle.dumps(first)), first)


def test_hidden_states_may_be_left_out(cache: Path) -> None:
    assert CacheDataset(cache)[0].hidden_BWD is not None
    assert CacheDataset(cache, with_hidden=False)[0].hidden_BWD is None


def test_a_temperature_that_the_cache_does_not_serve_is_refused(cache: Path) -> None:
    if CacheReader.open(cache).manifest.encoding.name == "hidden":
        assert len(CacheDataset(cache, temperature=3.0)) == BLOCKS  # which serves any
    else:
        refused("undeclared-temperature", CacheDataset, cache, temperature=3.0)


@pytest.mark.parametrize("changed", [{"batch_blocks": 0}, {"num_ranks": 2, "rank": 2}, {"rank": -1}])
def test_a_sampler_that_makes_no_sense_is_refused(cache: Path, changed: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="needs"):
        BlockSampler(CacheDataset(cache), **{"batch_blocks": 2} | changed)
