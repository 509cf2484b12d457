"""Compiled teachers: a compiler that fails says so in one line.

In: whether a teacher is compiled, when its first batch runs. Out: that batch, or one error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cache_spec.errors import KdpipeError
from cache_spec.failures import first_line

COMPILE_BACKEND = "inductor"


@contextmanager
def compiling(compiled: bool, place: str) -> Iterator[None]:
    """Raise KdpipeError ``cannot-compile`` where torch.compile fails on what is called within."""
    if not compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        hint = "leave compile out; on the CPU it needs a C++ compiler"
        raise KdpipeError("cannot-compile", place, found=first_line(error), hint=hint) from error
