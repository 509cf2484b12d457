"""From block indices to tensors: a cache and a plan of steps come in, micro-batches for the student go out.

A background thread reads ahead, so that disk and decompression hide behind the student's passes, and others fetch what
a store keeps. A step's blocks are
cut into micro-batches in one order; of ``num_ranks`` ranks, rank r takes the r-th, and every ``num_ranks``-th after it.

Legend: B batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from cache_spec.masking import MaskedText
from cache_spec.reader import CacheReader
from train.distil_batch import DistilBatch, TermCounts, count_terms, masked_tensors, to_tensors
from train.order import EpochOrder, IndexArray
from train.redraw import redrawn
from train.trim import trimmed

READ_AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How a run's steps tile its epochs; it does not depend on where a run resumes."""

    num_blocks: int
    """Blocks in the cache."""
    batch_blocks: int
    """Blocks of a micro-batch."""
    accumulate: int
    """Micro-batches of a step on each rank; the last step of an epoch may have fewer and smaller ones."""
    epochs: int
    max_steps: int | None = None
    num_ranks: int = 1
    """Processes that share a step."""
    shuffle: bool = True
    """Whether the order is drawn from seed and epoch."""
    group_by_length: bool = False
    """Whether the blocks of a micro-batch are of like length."""

    @property
    def step_blocks(self) -> int:
        """Blocks of one whole step, over all ranks."""
        return self.batch_blocks * self.accumulate * self.num_ranks

    @property
    def steps_per_epoch(self) -> int:
        """No step crosses the end of an epoch."""
        return -(-self.num_blocks // self.step_blocks)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        planned = self.epochs * self.steps_per_epoch
        return planned if self.max_steps is None else min(planned, self.max_steps)

    def start_of(self, step: int) -> tuple[int, int]:
        """Return (epoch, blocks of it already consumed) where ``step`` starts."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        return epoch, inside * self.step_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass: its blocks, and what the loss of its whole step is divided by."""

    step: int
    epoch: int
    number: int
    """Which micro-batch of its step, over all ranks, from 0."""
    blocks: IndexArray
    """int64 [B], block indices; none where a rank has nothing left to do but to keep step with the others."""
    batch: DistilBatch
    """In host memory; ``to`` moves it."""
    counts: TermCounts
    """Of the whole step."""
    ends_step: bool
    """Whether the optimizer moves after this one."""


def micro_batches(
    reader: CacheReader,
    plan: StepPlan,
    *,
    first_step: int,
    temperature: float,
    seed: int,
    window_shards: int,
    rank: int = 0,
    draws_per_step: int | None = None,
    with_hidden: bool = True,
    masked_only: bool = False,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """Yield all micro-batches of one rank from ``first_step`` to the end of the run, in order; only they are read.

    Of masked text with ``masked_only``, targets count at selected positions alone. Every rank makes as many passes:
    where a step has none left for it, it gets a block without a real token.
    """
    manifest = reader.manifest
    window = manifest.hidden.window if manifest.hidden else None
    names = reader.batch_arrays(with_hidden=with_hidden)
    for step, epoch, step_blocks in _steps(
        reader, plan, names, first_step=first_step, seed=seed, window_shards=window_shards
    ):
        lengths_B, text = torch.from_numpy(reader.lengths(step_blocks).astype(np.int64)), reader.masked(step_blocks)
        masked = None if text is None else masked_tensors(restricted(text) if masked_only else text)
        counts = count_terms(lengths_B, window, masked)
        pieces = [step_blocks[i : i + plan.batch_blocks] for i in range(0, len(step_blocks), plan.batch_blocks)]
        passes = -(-len(pieces) // plan.num_ranks)
        for turn in range(passes):
            number = turn * plan.num_ranks + rank
            idle = number >= len(pieces)
            blocks = pieces[-1][:1] if idle else pieces[number]
            stored = reader.batch(blocks, temperature, with_hidden=with_hidden)
            if masked_only and stored.masked is not None:
                stored = replace(stored, masked=restricted(stored.masked))
            stored = redrawn(stored, manifest, blocks, draws_per_step=draws_per_step, seed=seed, epoch=epoch)
            batch = to_tensors(trimmed(stored, window), pin_memory=pin_memory)
            yield MicroBatch(
                step=step,
                epoch=epoch,
                number=number,
                blocks=blocks[:0] if idle else blocks,
                batch=replace(batch, lengths_B=torch.zeros_like(batch.lengths_B)) if idle else batch,
                counts=counts,
                ends_step=turn == passes - 1,
            )


def _steps(
    reader: CacheReader, plan: StepPlan, names: list[str], *, first_step: int, seed: int, window_shards: int
) -> Iterator[tuple[int, int, IndexArray]]:
    """Yield each step, its epoch and its blocks; shards of these arrays are fetched a window before they are read."""

    @lru_cache(maxsize=2)
    def order_of(epoch: int) -> EpochOrder:
        return epoch_order(reader, plan, epoch=epoch, seed=seed, window_shards=window_shards)

    last_epoch = plan.start_of(plan.total_steps - 1)[0]
    with reader.read_ahead(names) as ahead:
        for step in range(first_step, plan.total_steps):
            epoch, start = plan.start_of(step)
            now, then = order_of(epoch).shards_at(start)
            if not len(then) and epoch < last_epoch:
                then, _ = order_of(epoch + 1).shards_at(0)
            ahead.want(now, then)
            yield step, epoch, order_of(epoch).indices(start, min(plan.step_blocks, plan.num_blocks - start))


def restricted(text: MaskedText) -> MaskedText:
    """The same masked blocks, where the targets of selected tokens alone count."""
    return replace(text, kept_BT=text.selected_BT)


def epoch_order(reader: CacheReader, plan: StepPlan, *, epoch: int, seed: int, window_shards: int) -> EpochOrder:
    """Return the order in which an epoch of a run visits its blocks."""
    return EpochOrder(
        num_blocks=plan.num_blocks,
        shard_blocks=reader.manifest.blocks.shard_blocks,
        window_shards=window_shards,
        seed=seed,
        epoch=epoch,
        # Not how targets are kept: caches of one text give one order, whatever their encoding.
        fingerprint=reader.manifest.corpus.tokens_sha256,
        shuffle=plan.shuffle,
        group_blocks=plan.batch_blocks,
        lengths=reader.lengths if plan.group_by_length else None,
    )


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException


class _End:
    pass


def ahead(items: Iterator[MicroBatch], depth: int = READ_AHEAD) -> Generator[MicroBatch, None, None]:
    """Yield ``items``, drawn up to ``depth`` ahead by a thread; close the generator to stop the thread.

    An error of the thread is raised here, in its place among the items. With a depth of 0 there is no thread.
    """
    if depth == 0:
        yield from items
        return
    ready: queue.Queue[MicroBatch | _Failure | _End] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: MicroBatch | _Failure | _End) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None

    def draw() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_End())
        except BaseException as error:  # whatever it is, it must reach the training thread
            put(_Failure(error))

    thread = threading.Thread(target=draw, name="kdpipe-read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()
