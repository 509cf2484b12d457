"""One thread finishes what another began: the teacher's next batch runs while the last one is encoded.

In: items as they are made, and what is left to do with each. Out: the results, in order, or the first failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

DEPTH = 1
"""Items that wait while one is being finished: each holds a batch's hidden states."""


def overlapped(items: Iterable[Item], finish: Callable[[Item], Result]) -> list[Result]:
    """``[finish(item) for item in items]``, with ``finish`` on one other thread; raises what either side raises."""
    results: list[Result] = []
    with ThreadPoolExecutor(1, thread_name_prefix="encode") as writer:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(writer.submit(finish, item))
                del item  # or the batch would be held until the next one is there
                if len(waiting) > DEPTH:
                    results.append(waiting.popleft().result())
            results.extend(future.result() for future in waiting)
        except BaseException:
            writer.shutdown(wait=False, cancel_futures=True)
            raise
    return results
