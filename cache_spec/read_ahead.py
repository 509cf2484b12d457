"""Shards are fetched before they are read: what will be read comes in, files of the local copy come of it.

In: shards in the order in which they will be read. Out: nothing; a file that could not be fetched is left to the read
that needs it, which asks again and fails where that fails.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from cache_spec.layout import array_specs
from cache_spec.local_copy import LocalCopy

logger = logging.getLogger("kdpipe")

_THREADS = 8
# Files of a copy are let go a little before the bound is reached.
_SHARE_OF_BOUND = 0.9


class ReadAhead:
    """Threads that fetch what is wanted next of some arrays of a local copy; without a copy, none and nothing."""

    def __init__(self, copy: LocalCopy | None, names: Sequence[str]) -> None:
        self._copy, self._names = copy, tuple(names)
        self._wanted: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._sizes: dict[int, int] = {}
        self._queue: deque[tuple[int, str]] = deque()
        self._changed = threading.Condition()
        self._closed = self._has_warned = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def want(self, now: Iterable[int], then: Iterable[int] = ()) -> None:
        """Fetch the shards that are read ``now``, then those that come after them, as far as the copy's bound goes."""
        if self._copy is None:
            return
        wanted = tuple(int(shard) for shard in now), tuple(int(shard) for shard in then)
        if wanted == self._wanted:
            return
        with self._changed:
            self._wanted = wanted
            self._queue = deque((shard, name) for shards in wanted for shard in shards for name in self._names)
            self._changed.notify_all()
        while len(self._threads) < _THREADS:
            # Daemons: what a store keeps waiting must not keep a process from ending.
            thread = threading.Thread(target=self._run, args=(self._copy,), name="kdpipe-fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Begin no other file; those under way are not waited for."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    def _run(self, copy: LocalCopy) -> None:
        specs = array_specs(copy.manifest)
        while (task := self._next()) is not None:
            shard, name = task
            try:
                if self._is_within_bound(copy, shard):
                    os.close(copy.open_shard(specs[name], copy.receipt(shard)))
            except Exception as error:  # whatever it is, the read that needs this file meets it too
                logger.debug("read-ahead of shard %d: %s", shard, error)

    def _next(self) -> tuple[int, str] | None:
        """The next file to fetch, waited for; None if there is nothing left to do, ever."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            return None if self._closed else self._queue.popleft()

    def _is_within_bound(self, copy: LocalCopy, shard: int) -> bool:
        """Whether all shards that are read before this one, and it, may lie in the copy at the same time."""
        if copy.limit_bytes is None:
            return True
        now, then = self._wanted
        shards = (now + then)[: (now + then).index(shard) + 1] if shard in now + then else ()
        needed = sum(self._num_bytes(copy, other) for other in shards)
        if needed <= copy.limit_bytes * _SHARE_OF_BOUND:
            return True
        if shard in now and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: the %d shards that are read together do not fit in --copy-gb: they are fetched more than once",
                copy.url,
                len(now),
            )
        return False

    def _num_bytes(self, copy: LocalCopy, shard: int) -> int:
        """Of the wanted arrays in a shard."""
        if shard not in self._sizes:
            receipt = copy.receipt(shard)
            self._sizes[shard] = sum(receipt.files[name].num_bytes for name in self._names)
        return self._sizes[shard]
