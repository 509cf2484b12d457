"""Plots of a report, drawn by matplotlib, the extra ``plots``: numbers come in, pairs of SVG and caption go out.

No plot tells apart by colour alone: lines have their own dashes, points their own shapes.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from train.report.svg import FAINT, INK, SERIES, inline_svg
from train.report.tables import Plots, numbered

_WIDTH_INCHES, _HEIGHT_INCHES, _BAR_INCHES = 5.0, 3.0, 0.26
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_SHAPES = "osD^vP"
_LONGEST_NAME = 26
_MANY = 10_000
_FEW = 20
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kdpipe",
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line, with a band around it if both bounds are given; places without a value are left out."""

    label: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A named bar, with a line for its interval."""

    label: str
    value: float
    interval: Sequence[float] | None = None
    is_pale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A named point; of points of the same group one is linked to the one before it."""

    label: str
    x: float
    y: float
    is_control: bool = False
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What stands around a plot."""

    title: str
    x: str
    y: str
    caption: str = ""
    description: str = ""
    """For those who do not see it; default: title, axes and caption."""


def short(names: Sequence[str]) -> list[str]:
    """Names that fit into a plot, without the middle of long ones; numbered where that makes them equal."""
    half = _LONGEST_NAME // 2
    return numbered([n if len(n) <= _LONGEST_NAME else f"{n[: half - 1]}\u2026{n[-half:]}" for n in names])


class Plotter:
    """Draws the plots of one page."""

    def __init__(self) -> None:
        self._matplotlib: Any = importlib.import_module("matplotlib")
        self._figure: Any = importlib.import_module("matplotlib.figure").Figure
        self._ticker: Any = importlib.import_module("matplotlib.ticker")
        self._keys = (f"plot{number}" for number in itertools.count(1))

    def lines(self, lines: Sequence[Line], words: Words, *, log_x: bool = False, from_zero: bool = False) -> Plots:
        """Lines over a common axis; those without a point are left out."""
        lines = [line for line in lines if any(None not in pair for pair in zip(line.x, line.y, strict=True))]

        def draw(axes: Any) -> None:
            handles: list[Any] = []
            for at, line in enumerate(lines):
                colour, dashes = SERIES[at % len(SERIES)], _DASHES[at % len(_DASHES)]
                pairs = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x is not None and y is not None]
                marker = _SHAPES[at % len(_SHAPES)] if len(pairs) < 24 else None
                handles += axes.plot(
                    *zip(*pairs, strict=True),
                    color=colour,
                    linestyle=dashes,
                    marker=marker,
                    markersize=3.5,
                )
                if line.low is not None and line.high is not None:
                    axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
            places = [x for line in lines for x in line.x if x is not None]
            if log_x:
                self._logarithmic(axes, places)
            elif max(places) < _FEW and all(float(x).is_integer() for x in places):
                axes.xaxis.set_major_locator(self._ticker.MaxNLocator("auto", integer=True))
            if from_zero:
                axes.set_ylim(bottom=0)
            if len(lines) > 1:
                # Labels of the lines themselves would be left out where they begin with an underscore.
                axes.legend(handles, short([line.label for line in lines]), loc="best")

        return self._plots(draw if lines else None, words)

    def histogram(self, counts: Sequence[int], edges: Sequence[float], mean: float, words: Words) -> Plots:
        """Counts in bins, and a mark at the mean."""

        def draw(axes: Any) -> None:
            axes.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.75)
            axes.axvline(mean, color=INK, linestyle="--", linewidth=1.2)

        return self._plots(draw, words)

    def bars(
        self,
        bars: Sequence[Bar],
        words: Words,
        *,
        shown: Callable[[float], str],
    ) -> Plots:
        """Horizontal bars, each with its value."""

        def draw(axes: Any) -> None:
            drawn = axes.barh(range(len(bars)), [bar.value for bar in bars], color=SERIES[0], height=0.7)
            for at, (bar, patch) in enumerate(zip(bars, drawn, strict=True)):
                patch.set_alpha(0.4 if bar.is_pale else 0.9)
                end = bar.value
                if bar.interval is not None:
                    axes.plot(bar.interval, [at, at], color=INK, linewidth=1.2, marker="|", markersize=6)
                    end = max(end, bar.interval[-1])
                axes.annotate(
                    shown(bar.value), (end, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
                )
            axes.set_yticks(range(len(bars)), short([bar.label for bar in bars]))
            axes.invert_yaxis()
            axes.margins(x=0.22)
            axes.set_xlim(left=0)
            axes.tick_params(axis="y", length=0)

        return self._plots(draw if bars else None, words, height=0.9 + _BAR_INCHES * len(bars), grid="x")

    def dots(self, dots: Sequence[Dot], words: Words, *, log_x: bool = False) -> Plots:
        """Named points: squares are controls, linked to what they are controls of."""

        def draw(axes: Any) -> None:
            for group in dict.fromkeys(dot.group for dot in dots):
                linked = [dot for dot in dots if dot.group == group]
                if group and len(linked) > 1:
                    axes.plot(
                        [dot.x for dot in linked], [dot.y for dot in linked], ":", color=INK, linewidth=1, alpha=0.6
                    )
            names = short([dot.label for dot in dots])
            for dot, name in zip(dots, names, strict=True):
                axes.plot(
                    dot.x,
                    dot.y,
                    "s" if dot.is_control else "o",
                    markersize=6,
                    color=SERIES[1] if dot.is_control else SERIES[0],
                )
                if not dot.is_control:
                    axes.annotate(name, (dot.x, dot.y), xytext=(6, 4), textcoords="offset points", fontsize=9)
            axes.margins(x=0.25, y=0.18)
            if log_x:
                self._logarithmic(axes, [dot.x for dot in dots])

        return self._plots(draw if dots else None, words)

    def _logarithmic(self, axes: Any, values: Sequence[float]) -> None:
        """A logarithmic axis with few round numbers as people write them."""
        axes.set_xscale("log", base=2)
        low, high = min(values), max(values)
        digits = self._ticker.LogLocator(base=10, subs=(1, 2, 5) if high < 200 * low else (1,))
        if high < 3 * low:
            digits = self._ticker.MaxNLocator(4)
        axes.xaxis.set_major_locator(digits)
        axes.xaxis.set_major_formatter(self._ticker.EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(self._ticker.NullLocator())

    def _plots(
        self, draw: Callable[[Any], None] | None, words: Words, *, height: float = _HEIGHT_INCHES, grid: str = "both"
    ) -> Plots:
        if draw is None:
            return Plots(figures=())
        key = next(self._keys)
        with self._matplotlib.rc_context():
            # Whatever a user's own settings for matplotlib are.
            self._matplotlib.rcdefaults()
            self._matplotlib.rcParams.update(_SETTINGS)
            figure = self._figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
            axes = figure.add_subplot()
            axes.grid(axis=grid)
            draw(axes)
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() == "linear" and max(map(abs, axis.get_view_interval())) >= _MANY:
                    axis.set_major_formatter(self._ticker.EngFormatter(sep=""))
            axes.set(xlabel=words.x, ylabel=words.y)
            axes.set_title(words.title)
            about = words.description or f"{words.y or 'values'} by {words.x}. {words.caption}".strip()
            svg: Markup = inline_svg(figure, key=key, title=words.title, description=about)
        return Plots(figures=((svg, words.caption),))


def beside(*plots: Plots) -> Plots:
    """Several plots in one row, where there is room."""
    return Plots(figures=[figure for some in plots for figure in some.figures])
