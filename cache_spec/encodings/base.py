"""What every encoding's record has: the parts that most of them leave empty, and how a broken rule is reported.

In: nothing. Out: the base of the records in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from cache_spec.errors import CacheError
from cache_spec.record import Record
from cache_spec.targets import Array, Geometry, TablePart


class EncodingRecord(Record):
    """An encoding's parameters: without tables, bound to its temperatures, fit for any geometry, unless it says so."""

    any_temperature: ClassVar[bool] = False
    """Whether targets serve temperatures outside the cache's grid."""

    def tables(self, g: Geometry) -> tuple[TablePart, ...]:
        """The arrays that are stored once for the whole cache."""
        return ()

    def refuse(self, g: Geometry) -> str | None:
        """Why these parameters do not fit; None if they do."""
        return None

    def prepare(self, table: Callable[[str], Array]) -> Array | None:
        """What ``decode`` needs of the cache's tables, made once."""
        return None


def broken(rule: Callable[[], object]) -> Iterator[CacheError]:
    """The error that checking a rule raises, if it does."""
    try:
        rule()
    except CacheError as error:
        yield error
