"""Running out of memory as one line: what a library raises when an allocation fails comes in, a KdpipeError goes out.

CUDA has a class of its own for it; other devices, and the libraries below, say it in the text of a RuntimeError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cache_spec.errors import KdpipeError
from cache_spec.failures import first_line, is_out_of_memory

TRAINING_HINT = "a smaller --chunk-rows helps here; fewer --batch-blocks with more --accumulate is another run"


@contextmanager
def out_of_memory_at(place: object, hint: str = TRAINING_HINT) -> Iterator[None]:
    """Raise KdpipeError("out-of-memory") at ``place`` for an allocation that failed below, whoever caught it since."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not is_out_of_memory(cause):
            # Whoever takes every failure of a library for a user's fault has this one in its context.
            cause = cause.__context__
        if cause is None:
            raise
        raise KdpipeError("out-of-memory", place, found=first_line(cause), hint=hint) from None
