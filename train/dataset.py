"""A cache for trainers of one's own: blocks go in by number, batches for a `Distiller` come out of a DataLoader.

In: a finished cache's folder or URL, and the numbers that any sampler gives. Out: ``DistilBatch``. ``BlockSampler``
gives the blocks in the order of `kdpipe train-student`, split between ranks, the same for any number of ranks
and workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cache_spec.address import CopySettings, as_address
from cache_spec.errors import BadInputError
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from cache_spec.store import is_url
from train.batches import StepPlan, epoch_order, restricted
from train.distil_batch import DistilBatch, to_tensors


class CacheDataset(Dataset[DistilBatch]):
    """The blocks of a cache; an item is one block as a batch of one, and ``collate`` joins items.

    Args:
        cache: folder of the finished cache, or its URL in a store.
        temperature: of the targets; BadInputError ``undeclared-temperature`` for one that the cache does not serve.
        with_hidden: read pooled hidden states where the cache has them; a loss without them is faster.
        masked_only: of masked text, let the targets of masked tokens alone count.
        copy: where files of a cache in a store are kept. Workers of a DataLoader must be spawned then: the client of a
            store does not survive a fork. ``CacheLoader`` does so.
    """

    def __init__(
        self,
        cache: str | Path,
        *,
        temperature: float = 1.0,
        with_hidden: bool = True,
        masked_only: bool = False,
        copy: CopySettings | None = None,
    ) -> None:
        self.cache, self.temperature, self.with_hidden = as_address(cache), temperature, with_hidden
        self.masked_only, self.copy = masked_only, copy
        self._opened: tuple[int, CacheReader] | None = None
        self.manifest.temperature_index(temperature)

    @property
    def reader(self) -> CacheReader:
        """This process's reader: a worker opens its own."""
        if self._opened is None or self._opened[0] != os.getpid():
            if self._opened is not None and is_url(self.cache):
                hint = 'give the DataLoader multiprocessing_context="spawn"'
                raise BadInputError("forked-reader", self.cache, expected="a worker that was spawned", hint=hint)
            self._opened = os.getpid(), CacheReader.open(self.cache, self.copy)
        return self._opened[1]

    @property
    def manifest(self) -> Manifest:
        """What the cache says of itself."""
        return self.reader.manifest

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __len__(self) -> int:
        return self.manifest.blocks.num_blocks

    def __getitem__(self, block: int) -> DistilBatch:
        return self.__getitems__([block])[0]

    def __getitems__(self, blocks: Sequence[int]) -> list[DistilBatch]:
        """One batch of all these blocks, in a list, as a DataLoader asks; of none, one block that counts nothing."""
        read = self.reader.batch(list(blocks) or [0], self.temperature, with_hidden=self.with_hidden)
        if self.masked_only and read.masked is not None:
            read = replace(read, masked=restricted(read.masked))
        batch = to_tensors(read)
        return [batch if blocks else replace(batch, lengths_B=torch.zeros_like(batch.lengths_B))]


def collate(items: Sequence[DistilBatch]) -> DistilBatch:
    """Join items of a ``CacheDataset`` to one batch: the ``collate_fn`` of its DataLoader."""
    return items[0] if len(items) == 1 else items[0].joined(items[1:])


class BlockSampler(Sampler[list[int]]):
    """The micro-batches of one rank, in order, as lists of blocks: the ``batch_sampler`` of a DataLoader.

    Ranks take ``batch_blocks`` blocks each in turn from the epoch's order, which depends on the text, the seed and the
    epoch alone. So the blocks of a step of ``accumulate`` micro-batches are the same for any ``accumulate`` and
    ``num_ranks`` of one product, and every rank has as many micro-batches as every other: at the end of an epoch a rank
    may get an empty list, of which ``CacheDataset`` makes a batch that counts nothing.
    """

    def __init__(
        self,
        dataset: CacheDataset,
        *,
        batch_blocks: int,
        num_ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        window_shards: int = 16,
    ) -> None:
        if min(batch_blocks, window_shards) < 1 or not 0 <= rank < num_ranks:
            raise ValueError("a sampler needs blocks, shards and ranks, and a rank among them")
        self.batch_blocks, self.num_ranks, self.rank, self.epoch = batch_blocks, num_ranks, rank, 0
        self._reader, self._window_shards, self._seed = dataset.reader, window_shards, seed
        self._names = dataset.reader.batch_arrays(with_hidden=dataset.with_hidden)
        self._plan = StepPlan(
            num_blocks=len(dataset), batch_blocks=batch_blocks, accumulate=1, epochs=1, num_ranks=num_ranks
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._plan.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(
            self._reader, self._plan, epoch=self.epoch, seed=self._seed, window_shards=self._window_shards
        )
        num_blocks = self._plan.num_blocks
        with self._reader.read_ahead(self._names) as ahead:
            for turn in range(len(self)):
                start = min((turn * self.num_ranks + self.rank) * self.batch_blocks, num_blocks)
                ahead.want(*order.shards_at(min(start, num_blocks - 1)))
                yield order.indices(start, min(self.batch_blocks, num_blocks - start)).tolist()


class CacheLoader(DataLoader[DistilBatch]):
    """A DataLoader in the order of a ``BlockSampler``; ``settings`` are a DataLoader's."""

    def __init__(self, dataset: CacheDataset, sampler: BlockSampler, **settings: Any) -> None:
        settings = {"collate_fn": collate} | settings
        if is_url(dataset.cache) and settings.get("num_workers"):
            settings.setdefault("multiprocessing_context", "spawn")
        super().__init__(dataset, batch_sampler=sampler, **settings)
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order comes next."""
        self._sampler.set_epoch(epoch)
