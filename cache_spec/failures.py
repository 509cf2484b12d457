"""What an exception of another library says, for an error of ours to quote.

In: an exception. Out: its first line, and whether it means that memory ran out.
"""

from __future__ import annotations

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something, at most 300 characters, or else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Strict dataclasses put the reason on the second line, below the validator's name.
    return (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0])[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch says so in a RuntimeError, and is known by its words so as not to be imported."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
