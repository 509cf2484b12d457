"""What a campaign counts, and what went wrong in it.

In: one case after the other. Out: JSON.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_TOLD = 10


@dataclass
class Tally:
    """Counts by name, and a line for each case that did not end as it must."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, is_right: object, what: str) -> None:
        """Note ``what`` as wrong unless it is right."""
        if not is_right:
            self.wrong.append(what)

    def report(self, **facts: Any) -> dict[str, Any]:
        """All of it; ``facts`` come first."""
        return {**facts, **self.counts, "wrong": len(self.wrong), "first_wrong": self.wrong[:_TOLD]}
