"""Targets that came as top-k log-probabilities from elsewhere: what is declared of them, and what that rules out.

In: a manifest's field ``imported``. Out: a checked record, and the treatments of a tail that are right with it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cache_spec.errors import BadInputError
from cache_spec.record import Record
from cache_spec.targets import Tail

TEMPERATURE = 1.0
"""The only one that log-probabilities without a normaliser are right at."""
UNKNOWN_OF_TEACHER = ("weights_sha256", "hidden_size", "num_layers", "num_parameters")
MAX_MASS_ERROR = 0.01


class ImportedInfo(Record):
    """What the log-probabilities are that a cache was imported from."""

    logprobs: Literal["full", "renormalised"]
    """``full``: of the whole vocabulary's distribution, so that what is missing from one is the mass of the tail;
    ``renormalised``: of the kept tokens alone, each row summing to one, and nothing is known of the tail."""
    mass_error: float = Field(ge=0, le=MAX_MASS_ERROR, allow_inf_nan=False)
    """How far a row's sum of probabilities may be off because the values were rounded before they came here."""

    @property
    def tails(self) -> tuple[Tail, ...]:
        """What may be done with the mass outside a head, the best first."""
        return ("bucket", "renormalise") if self.logprobs == "full" else ("renormalise",)


def refuse_import(info: ImportedInfo | None, place: object, needed: str) -> None:
    """BadInputError ``imported-cache`` where something needs what an imported cache does not have."""
    if info is not None:
        found, hint = f"log-probabilities imported as {info.logprobs}", "capture with kdpipe cache-teacher"
        raise BadInputError("imported-cache", place, expected=needed, found=found, hint=hint)
