"""The order of blocks: (seed, epoch, fingerprint) comes in, block indices of any stretch of an epoch go out.

Shards are shuffled and taken in windows of a few; the blocks of a window are permuted together. So the disk is read
shard by shard, batches mix many shards, and any position of an epoch is reached at the cost of one window. Where
lengths are given, a window's permuted blocks are sorted by length and cut into groups, whose order is permuted again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IndexArray = NDArray[np.int64]


def keyed_permutation(num_items: int, *key: object) -> IndexArray:
    """Return the permutation of ``range(num_items)`` that belongs to ``key``, the same on every machine.

    It sorts raw PCG64 words: NumPy keeps a bit generator's raw stream for ever, and may change
    ``Generator.permutation`` from one version to the next.
    """
    digest = hashlib.sha256("\n".join(str(part) for part in key).encode()).digest()
    words: NDArray[Any] = np.atleast_1d(np.random.PCG64(int.from_bytes(digest, "little")).random_raw(num_items))
    return np.argsort(words, kind="stable").astype(np.int64)


@dataclass(slots=True, kw_only=True)
class EpochOrder:
    """The order in which one epoch visits all blocks, each once; a pure function of its fields."""

    num_blocks: int
    """Blocks in the cache; the last shard holds what is left."""
    shard_blocks: int
    """Blocks in each shard but the last."""
    window_shards: int
    """Shards whose blocks are permuted together."""
    seed: int
    """Seed of the run."""
    epoch: int
    """Epoch, from 0."""
    fingerprint: str
    """Digest of the text in the cache."""
    shuffle: bool = True
    """Whether anything is permuted; without it, blocks come as they lie in the cache."""
    group_blocks: int = 1
    """Blocks in a group of like length: a micro-batch's."""
    lengths: Callable[[IndexArray], NDArray[Any]] | None = None
    """Gives the real tokens of blocks; without it, nothing is grouped."""
    _shards: IndexArray = field(init=False, repr=False)
    _bounds: IndexArray = field(init=False, repr=False)
    _window: tuple[int, IndexArray] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        sizes_given = (self.num_blocks, self.shard_blocks, self.window_shards, self.group_blocks)
        if min(sizes_given) < 1 or min(self.epoch, self.seed) < 0:
            raise ValueError("an order needs blocks, shards, a window, and an epoch and a seed that are not negative")
        num_shards = -(-self.num_blocks // self.shard_blocks)
        self._shards = self._permutation(num_shards, "shards")
        sizes = np.full(num_shards, self.shard_blocks, dtype=np.int64)
        sizes[self._shards == num_shards - 1] = self.num_blocks - (num_shards - 1) * self.shard_blocks
        per_window = np.add.reduceat(sizes, np.arange(0, num_shards, self.window_shards))
        self._bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(per_window)])

    def indices(self, start: int, count: int) -> IndexArray:
        """Return the blocks at positions ``start`` to ``start + count`` of this epoch, int64 [count].

        Costs as much as the windows it touches; raises ValueError for a stretch outside the epoch.
        """
        if start < 0 or count < 0 or start + count > self.num_blocks:
            raise ValueError(f"positions {start}..{start + count} are outside an epoch of {self.num_blocks} blocks")
        pieces: list[IndexArray] = []
        while count:
            window = int(np.searchsorted(self._bounds, start, side="right")) - 1
            offset = start - int(self._bounds[window])
            piece = self._blocks_of(window)[offset : offset + count]
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def shards_at(self, start: int) -> tuple[IndexArray, IndexArray]:
        """Return the shards of the window that position ``start`` lies in, and those of the next one."""
        window = int(np.searchsorted(self._bounds, start, side="right")) - 1
        return self._shards_of(window), self._shards_of(window + 1)

    def _shards_of(self, window: int) -> IndexArray:
        return self._shards[window * self.window_shards : (window + 1) * self.window_shards]

    def _blocks_of(self, window: int) -> IndexArray:
        if self._window is None or self._window[0] != window:
            shards = self._shards_of(window)
            blocks = (shards[:, None] * self.shard_blocks + np.arange(self.shard_blocks, dtype=np.int64)).ravel()
            blocks = blocks[blocks < self.num_blocks]
            blocks = blocks[self._permutation(len(blocks), "window", window)]
            self._window = (window, blocks if self.lengths is None else self._grouped(blocks, self.lengths, window))
        return self._window[1]

    def _grouped(self, blocks: IndexArray, lengths: Callable[[IndexArray], NDArray[Any]], window: int) -> IndexArray:
        """A window's blocks in groups of like length, each where a micro-batch of the epoch starts.

        What completes the last group of the window before comes first, what begins one with the next window last.
        """
        blocks = blocks[np.argsort(lengths(blocks).astype(np.int64), kind="stable")]
        first = min(-int(self._bounds[window]) % self.group_blocks, len(blocks))
        num_groups = (len(blocks) - first) // self.group_blocks
        whole, rest = np.split(blocks[: len(blocks) - first], [num_groups * self.group_blocks])
        groups = whole.reshape(num_groups, self.group_blocks)[self._permutation(num_groups, "groups", window)]
        return np.concatenate([blocks[len(blocks) - first :], groups.ravel(), rest])

    def _permutation(self, num_items: int, *what: object) -> IndexArray:
        if not self.shuffle:
            return np.arange(num_items, dtype=np.int64)
        return keyed_permutation(num_items, *what, self.seed, self.epoch, self.fingerprint)
