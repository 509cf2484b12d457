"""CUDA streams: what follows the teacher does not queue up behind the teacher's next batch.

In: a device, and tensors that its current stream computes. Out: a second stream that waits for them and for nothing
else. On other devices there is none, and nothing happens. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Event = Any
"""``torch.cuda.Event``, which torch has no types for."""


def side_stream(device: torch.device) -> Any:
    """A stream of the device beside its current one; None where there are no streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def recorded(device: torch.device) -> Event | None:
    """The moment at which all that the device's current stream was told to do is done."""
    if device.type != "cuda":
        return None
    event: Event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def on_stream(stream: Any, computed: Event | None, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Work on ``stream`` with ``tensors`` of another, from the moment on that they are ``computed``."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        stream.wait_event(computed)
        for tensor in tensors:
            # Or the allocator would give their memory away before this stream has read it.
            tensor.record_stream(stream)
        yield
