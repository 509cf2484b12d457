"""Stopping without tearing a step: SIGINT and SIGTERM come in, a flag that is looked at between passes goes out."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

logger = logging.getLogger("kdpipe")


class Interrupted(Exception):
    """Someone asked to stop, and no weight was touched since the last whole step."""


class Interrupts:
    """Remembers the first SIGINT or SIGTERM, so that a step is never torn; a second one stops at once.

    Within ``same_s`` seconds a second one is the first once more: of Ctrl-C both the terminal and a launcher tell.
    """

    def __init__(self, same_s: float = 0.0) -> None:
        self.asked = False
        self._same_s = same_s
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._asked_at < self._same_s:
                return
            raise KeyboardInterrupt
        self.asked, self._asked_at = True, time.monotonic()
        logger.info("%s: stopping after a checkpoint", signal.Signals(number).name)
