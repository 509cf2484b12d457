"""One thread finishes what another began: the teacher goes on while what it made is encoded, packed and written.

In: items as they are made, and what is left to do with each. Out: the results, in order, or the first failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

DEPTH = 1
"""Items that wait while one is being finished: no other is begun before that is done."""


def overlapped(items: Iterable[Item], finish: Callable[[Item], Result]) -> Iterator[Result]:
    """``(finish(item) for item in items)``, with ``finish`` on one other thread; raises what either side raises."""
    with ThreadPoolExecutor(1, thread_name_prefix="finish") as writer:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(writer.submit(finish, item))
                del item  # or it would be held until the next one is there
                if len(waiting) > DEPTH:
                    yield waiting.popleft().result()
            for future in waiting:
                yield future.result()
        except BaseException:
            writer.shutdown(wait=False, cancel_futures=True)
            raise
