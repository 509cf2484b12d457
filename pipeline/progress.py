"""What a capture tells while it runs: one bar for people, or one JSON line an event for programs.

In: tokens read, shards committed, tried again and given up. Out, on standard error: a bar where it is a terminal, or
with ``events`` lines such as ``{"event": "committed", "shard": 3, "shards_done": 4, …}``.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from cache_spec.manifest import BlocksInfo

logger = logging.getLogger("kdpipe")


class Progress:
    """Counts of one run of a capture, shown as they change."""

    def __init__(self, blocks: BlocksInfo, todo: list[int], *, quiet: bool = False, events: bool = False) -> None:
        self.blocks, self.events = blocks, events
        self.num_done, self.num_running, self.num_failed = blocks.num_shards - len(todo), 0, 0
        self.num_bytes = 0
        """Written by this run."""
        self.tokens_left = sum(blocks.shard_range(shard)[1] for shard in todo) * blocks.block_tokens
        self._read_tokens, self._began = 0, time.monotonic()
        total = blocks.num_blocks * blocks.block_tokens
        self._bar = tqdm(
            total=total,
            initial=total - self.tokens_left,
            unit="tok",
            unit_scale=True,
            desc="teacher",
            disable=quiet or events or None,
        )

    def __enter__(self) -> Self:
        self._tell("begun")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def read(self, num_tokens: int) -> None:
        """The teacher has read this many tokens more."""
        self._read_tokens += num_tokens
        self.tokens_left -= num_tokens
        self._bar.update(num_tokens)

    def running(self, num_shards: int) -> None:
        """So many shards are being made now."""
        self.num_running = num_shards

    def committed(self, shard: int, num_bytes: int) -> None:
        """A shard is committed, in files of ``num_bytes``."""
        self.num_done += 1
        self.num_bytes += num_bytes
        self._tell("committed", shard=shard, bytes=num_bytes)

    def retried(self, shard: int, num_failures: int, error: object) -> None:
        """A shard failed and will be tried again."""
        if not self.events:
            self.say(f"shard {shard} failed, and is tried again: {error}")
        self._tell("retried", shard=shard, failures=num_failures, error=str(error))

    def failed(self, shard: int, error: object) -> None:
        """A shard is given up for this run."""
        self.num_failed += 1
        if not self.events:
            self.say(f"shard {shard} is given up: {error}")
        self._tell("failed", shard=shard, error=str(error))

    def note(self, event: str, line: str, **facts: Any) -> None:
        """Something that concerns the run as a whole: a line for people, an event for programs."""
        if not self.events:
            self.say(line)
        self._tell(event, **facts)

    def say(self, line: str) -> None:
        """One line of the log, above the bar and not through it."""
        self._bar.clear()
        logger.info("%s", line)
        self._bar.refresh()

    def _tell(self, event: str, **facts: Any) -> None:
        seconds = time.monotonic() - self._began
        rate = self._read_tokens / seconds if seconds > 0 else 0.0
        if self.events:
            counts = {
                "shards_done": self.num_done,
                "shards_running": self.num_running,
                "shards_failed": self.num_failed,
                "shards": self.blocks.num_shards,
                "tokens_left": self.tokens_left,
                "tokens_per_s": round(rate, 1),
                "eta_s": round(self.tokens_left / rate) if rate else None,
                "bytes_written": self.num_bytes,
            }
            print(json.dumps({"event": event, **facts, **counts}), file=sys.stderr, flush=True)
        running = f", {self.num_running} running" if self.num_running else ""
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        shards = f"{self.num_done}/{self.blocks.num_shards} shards{running}{failed}"
        written = tqdm.format_sizeof(self.num_bytes, "B", divisor=1000)
        self._bar.set_postfix_str(f"{shards}, {written} written", refresh=False)
