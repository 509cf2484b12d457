"""What a user's fault is answered with: one line, of a stable kind.

In: a call that must be refused. Out: its error, or the error's message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cache_spec.errors import EXIT_BAD_INPUT, BadInputError


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> BadInputError:
    """The error of a call, of one line."""
    with pytest.raises(BadInputError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert "\n" not in str(caught.value)
    return caught.value


def refused(kind: str, call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The message of a call's error, which is of this kind."""
    error = refusal(call, *args, **kwargs)
    assert error.kind == kind
    return str(error)
