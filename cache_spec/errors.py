"""Errors a user can cause or meet: one line each, with a stable kind and an exit code.

In: what went wrong, where, what was expected and what was found. Out: an exception that the command line
prints as one line, and that programs can match by ``kind``. ``assert`` is for our own bugs.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_WOULD_LOSE_DATA = 4
EXIT_INTERRUPTED = 130


class KdpipeError(Exception):
    """A failure with a stable ``kind``, the place, what was expected, what was found and what to do.

    ``kind`` is a stable lower-case-with-dashes word that tests and scripts may match. ``place`` names the file,
    array, block or setting. The message is always one line.
    """

    exit_code = EXIT_FAILED
    said_elsewhere = False
    """Whether another process of the same run prints it."""

    def __init__(
        self,
        kind: str,
        place: object,
        *,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.kind = kind
        self.place = str(place)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.hint = hint
        super().__init__(kind, self.place, self.expected, self.found, self.hint)

    def __str__(self) -> str:
        parts = [f"{self.kind}: {self.place}"]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        line = ", ".join(parts)
        if self.hint:
            line += f" ({self.hint})"
        return " ".join(line.split())

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.kind, self.place, self.expected, self.found, self.hint)


def _rebuild(
    cls: type[KdpipeError],
    kind: str,
    place: str,
    expected: str | None,
    found: str | None,
    hint: str | None,
) -> KdpipeError:
    return cls(kind, place, expected=expected, found=found, hint=hint)


class BadInputError(KdpipeError):
    """The user's text, model, recipe, setting or cache is wrong."""

    exit_code = EXIT_BAD_INPUT


class CacheError(BadInputError):
    """A cache on disk breaks a rule of ``SPEC.md``."""


class WouldLoseDataError(KdpipeError):
    """Going on would overwrite or mix up what is already on disk."""

    exit_code = EXIT_WOULD_LOSE_DATA
