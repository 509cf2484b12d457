"""What sections of a page are made of: tables whose cells keep the number they show, lists of facts, notes, plots.

In: values of the facts. Out: blocks that the page's template lays out. A table is sorted by its cells' numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

MISSING = "\u2013"
_POWERS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table, or one value of a list."""

    text: str
    number: float | None = None
    """What it is sorted by; None: by its text."""
    bar: float | None = None
    """A share from 0 to 1 to draw behind the text."""
    kind: str = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that can be sorted."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    kind: str = "table"

    @property
    def numeric(self) -> list[bool]:
        """Which columns are of numbers."""
        return [any(row[at].number is not None for row in self.rows) for at in range(len(self.headings))]


@dataclass(frozen=True, slots=True, kw_only=True)
class FactList:
    """Names and values."""

    items: Sequence[tuple[str, Cell]]
    kind: str = "facts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A paragraph."""

    text: str
    kind: str = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plots:
    """Plots beside each other."""

    figures: Sequence[tuple[Markup, str]]
    """SVG and caption of each."""
    kind: str = "plots"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Blocks beside each other, where there is room."""

    blocks: Sequence[Any]
    kind: str = "beside"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Positions of the text with the teacher's tokens."""

    examples: Sequence[Mapping[str, Any]]
    kind: str = "examples"


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What models wrote."""

    prompts: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    """Each prompt with the models' names and texts."""
    kind: str = "samples"


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """Blocks that can be folded away."""

    summary: str
    blocks: Sequence[Any]
    is_open: bool = False
    kind: str = "details"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page with a heading."""

    key: str
    title: str
    blocks: list[Any] = field(default_factory=list)


def words(value: object) -> Cell:
    """Text as it is."""
    return Cell(MISSING if value is None or value == "" else str(value))


def as_text(value: object) -> str:
    """A JSON value in a line."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e6 and value.is_integer() else f"{value:,.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def count(value: float | None) -> Cell:
    """A whole number."""
    return Cell(MISSING) if value is None else Cell(f"{value:,.0f}", value)


def figure(value: float | None, digits: int = 4) -> Cell:
    """A number with so many digits after the point; a large or a tiny one with as many in all."""
    if value is None:
        return Cell(MISSING)
    small = 0 < abs(value) < 10.0**-digits
    return Cell(f"{value:.{digits}g}" if small or abs(value) >= 1e9 else f"{value:,.{digits}f}", value)


def with_interval(value: float | None, interval: Sequence[float] | None, digits: int = 4) -> Cell:
    """A number with its interval of confidence."""
    cell = figure(value, digits)
    if value is None or interval is None:
        return cell
    low, high = (figure(end, digits).text for end in interval)
    return Cell(f"{cell.text} [{low}, {high}]", value)


def percent(value: float | None, digits: int = 1, *, signed: bool = False) -> Cell:
    """A share as percent."""
    return Cell(MISSING) if value is None else Cell(f"{value:{'+' if signed else ''}.{digits}%}", value)


def size(value: float | None) -> Cell:
    """Bytes in powers of 1,000."""
    if value is None:
        return Cell(MISSING)
    scaled, power = float(value), 0
    while abs(scaled) >= 1000 and power < len(_POWERS) - 1:
        scaled, power = scaled / 1000, power + 1
    return Cell(f"{scaled:,.{2 if power else 0}f} {_POWERS[power]}", value)


def hours(value: float | None) -> Cell:
    """A time in the unit that suits it, from hours."""
    if value is None:
        return Cell(MISSING)
    if value >= 1:
        return Cell(f"{value:,.2f} h", value)
    return Cell(f"{value * 60:.1f} min" if value * 60 >= 1 else f"{value * 3600:.1f} s", value)


def numbered(names: Sequence[str]) -> list[str]:
    """The names, equal ones with a number."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[:at].count(name) + 1})" for at, name in enumerate(names)
    ]


def bare(name: str) -> str:
    """A model's or file's name for a heading: of a path, the parts that tell it from others."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    own = [part for part in parts if part != "student"]
    return (own or parts or [name])[-1]
