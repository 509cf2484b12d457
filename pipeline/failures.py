"""Failures of other libraries, as they are told to the user.

In: an exception that another library raised. Out: what an error of ours says was found, or the error itself.
"""

from __future__ import annotations

import errno

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.failures import first_line, is_out_of_memory


def as_failure(error: BaseException, place: object) -> KdpipeError | None:
    """One line for a failure of the machine: ``out-of-memory``, ``system-error``, ``early-end``; None for a bug.

    A name too long is the user's: BadInputError ``name-too-long``.
    """
    if is_out_of_memory(error):
        return KdpipeError("out-of-memory", place, found=first_line(error), hint="give a smaller --batch-blocks")
    if isinstance(error, OSError):
        where = place if error.filename is None else f"{place}: {str(error.filename)[:300]}"
        if error.errno == errno.ENAMETOOLONG:
            return BadInputError("name-too-long", where)
        return KdpipeError("system-error", where, found=error.strerror or first_line(error))
    if isinstance(error, EOFError):
        return KdpipeError("early-end", place, found=first_line(error))
    return None
