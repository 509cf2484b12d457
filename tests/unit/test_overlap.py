"""Overlap: the same results in the same order, the next item made meanwhile, and no failure lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pipeline.overlap import DEPTH, overlapped


def test_results_keep_their_order_and_the_next_item_is_made_meanwhile() -> None:
    made = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(5):
            yield number
            made.release()

    def finish(number: int) -> int:
        if number == 0:  # the second item is asked for before the first is finished
            assert made.acquire(timeout=60)
        assert threading.current_thread() is not threading.main_thread()
        return number * number

    assert list(overlapped(items(), finish)) == [0, 1, 4, 9, 16]


def test_no_more_items_wait_than_stated() -> None:
    most, num_made, num_finished = 0, 0, 0

    def items() -> Iterator[int]:
        nonlocal num_made, most
        for number in range(20):
            num_made += 1
            most = max(most, num_made - num_finished)
            yield number

    def finish(number: int) -> None:
        nonlocal num_finished
        threading.Event().wait(0.002)
        num_finished += 1

    list(overlapped(items(), finish))
    assert 1 < most <= DEPTH + 2  # one is finished, one is being made


@pytest.mark.parametrize("side", ["items", "finish"])
def test_a_failure_of_either_side_is_raised_and_ends_the_other(side: str) -> None:
    finished: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            if side == "items" and number == 3:
                raise OSError("three")
            yield number

    def finish(number: int) -> None:
        if side == "finish" and number == 3:
            raise OSError("three")
        finished.append(number)

    with pytest.raises(OSError, match="three"):
        list(overlapped(items(), finish))
    assert len(finished) <= 5
