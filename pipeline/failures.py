"""Failures of other libraries, as they are told to the user.

In: an exception that another library raised. Out: what an error of ours says was found.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 300 characters, or its type where there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
