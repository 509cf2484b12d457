"""A probe of nothing, for what surrounds probes: an order says what it does."""

from __future__ import annotations

import sys
from typing import Any

from cache_spec.errors import WouldLoseDataError


def probe(order: dict[str, Any]) -> dict[str, Any]:
    """Answer, print, raise for the user, raise anything, or end without a word."""
    print("a library prints")
    if order["do"] == "refuse":
        raise WouldLoseDataError("a-kind", "a place", expected=1, found="two", hint="a hint")
    if order["do"] == "end":
        print("last words", file=sys.stderr, flush=True)
        sys.exit(7)
    return {"told": order["told"]}
