"""What was measured, for people: two tables as lines, and three plots as files.

In: the benchmark's report. Out: aligned lines; SVG or PNG files, in black and white.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_spec.errors import BadInputError

_MARKERS = {
    "topk": "s",
    "sampled": "^",
    "sparsified": "v",
    "prototype": "o",
    "hidden": "D",
    "rival": "x",
}


def target_table(part: Mapping[str, Any]) -> list[str]:
    """One line a configuration.

    ``zero`` is the teacher's mass on tokens that the target gives none; a divergence in brackets leaves it out.
    ``angle`` and ``large`` are degrees on the student's head, in the smaller and the larger batch.
    """
    temperatures = sorted({at for row in part["rows"] for at in row["temperatures"]}, key=float)
    header = ["", "B/token"]
    for at in temperatures:
        header += [f"T={at}: TV", "KL", "zero", "mass", "angle", "large", "norm"]
    cells = [[*header, "enc tok/s", "dec tok/s"]]
    for row in part["rows"]:
        line = [row["name"], _figure(row["bytes_per_token"], 1)]
        for at in temperatures:
            of = row["temperatures"].get(at)
            if of is None:
                line += ["-"] * 7
                continue
            small, large = of["gradient"]["smaller"]["head"], of["gradient"]["larger"]["head"]
            line += [_figure(of["total_variation"]), _divergence(of), _figure(of["uncovered_mass"])]
            line.append(_figure(of["mass_coverage"]))
            line += [_figure(small["degrees"], 2), _figure(large["degrees"], 2), _figure(large["norm_ratio"], 3)]
        speed = row.get("tokens_per_s", {})
        line += [f"{speed[name]:,.0f}" if name in speed else "-" for name in ("encode", "decode")]
        cells.append(line)
    return _aligned(cells)


def student_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a kind of target and temperature: means over seeds, and their standard deviations where it matters."""
    cells = [
        ["", "T", "seeds", "loss", "KL", "agree", "overlap", "ECE", "gap in loss %", "gap in KL %", "KL vs full %"]
    ]
    for row in rows:
        line = [row["name"], f"{row['temperature']:g}", str(len(row["seeds"]))]
        figures = ("loss_nats", "kl_to_teacher", "agreement", "overlap", "ece")
        line += [_figure(row[name] and row[name]["mean"]) for name in figures]
        for name in ("percent_of_gap_in_loss_nats", "percent_of_gap_in_kl_to_teacher", "kl_above_full_percent"):
            value = row[name]
            line.append("-" if value is None else f"{value['mean']:.1f} ± {value['std']:.1f}")
        cells.append(line)
    return _aligned(cells)


def _divergence(of: Mapping[str, float | None]) -> str:
    """Infinite ones in brackets: over the tokens that have a mass."""
    covered = of["kl_of_covered_nats"]
    if of["kl_nats"] is None and covered is not None:
        return f"({covered:.4f})"
    return _figure(of["kl_nats"])


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]


def plot(report: Mapping[str, Any], folder: Path, suffix: str = "svg") -> list[Path]:
    """Write what can be plotted of a report; BadInputError ``no-matplotlib`` where that is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        hint = "pip install 'kdpipe[bench]', or leave --plots out"
        raise BadInputError("no-matplotlib", "--plots", expected="matplotlib", hint=hint) from None
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    targets, students = report.get("targets"), report.get("students")
    if targets:
        for name, label, pick in (
            (
                "divergence",
                "KL where the target is positive, nats",
                lambda of: of["kl_of_covered_nats"],
            ),
            ("variation", "total variation", lambda of: of["total_variation"]),
            ("angle", "angle on the student's head, degrees", lambda of: of["gradient"]["larger"]["head"]["degrees"]),
        ):
            made.append(folder / f"{name}.{suffix}")
            _scatter(pyplot, targets["rows"], label, pick, made[-1])
    if students and students["summary"]:
        made.append(folder / f"recovered.{suffix}")
        _bars(pyplot, students["summary"], made[-1])
    return made


def _scatter(pyplot: Any, rows: Sequence[Mapping[str, Any]], label: str, pick: Any, path: Path) -> None:
    """Bytes a token against a figure, a panel a temperature, both axes logarithmic; grey at the top where infinite."""
    temperatures = sorted({at for row in rows for at in row["temperatures"]}, key=float)
    figure, panels = pyplot.subplots(1, len(temperatures), figsize=(5.2 * len(temperatures), 4.2), squeeze=False)
    for panel, at in zip(panels[0], temperatures, strict=True):
        infinite = []
        for row in rows:
            of = row["temperatures"].get(at)
            if of is None:
                continue
            kind = "rival" if row.get("rival") else row["encoding"]["name"]
            value = pick(of)
            if value is None:
                infinite.append(row["bytes_per_token"])
                continue
            panel.plot(row["bytes_per_token"], value, _MARKERS[kind], color="black", fillstyle="none", markersize=6)
            place = (row["bytes_per_token"], value)
            panel.annotate(row["name"], place, xytext=(4, 3), textcoords="offset points", fontsize=6)
        panel.margins(x=0.3, y=0.1)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", subs=[])
        # Plain numbers: powers of two for bytes, 1, 2 and 5 times powers of ten for figures.
        panel.yaxis.set_major_locator(pyplot.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        for num_bytes in infinite:
            transform = panel.get_xaxis_transform()
            panel.plot(num_bytes, 0.985, "^", color="0.6", markersize=4, transform=transform)
        panel.set_xlabel("bytes a token on disk" + (" (grey: infinite, or no meaning)" if infinite else ""))
        panel.set_ylabel(label)
        panel.set_title(f"T = {at}", fontsize=9)
        panel.grid(True, which="both", color="0.9", linewidth=0.5)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _bars(pyplot: Any, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Percent of the gap recovered, with the standard deviation over seeds."""
    kinds = [("percent_of_gap_in_loss_nats", "loss", "white"), ("percent_of_gap_in_kl_to_teacher", "KL", "0.6")]
    shown = [row for row in rows if any(row[key] is not None for key, _, _ in kinds)]
    figure, panel = pyplot.subplots(figsize=(6.4, 0.8 + 0.42 * len(shown)))
    for offset, (key, label, shade) in enumerate(kinds):
        there = [(at, row[key]) for at, row in enumerate(shown) if row[key] is not None]
        panel.barh(
            [at + 0.38 * offset - 0.19 for at, _ in there],
            [value["mean"] for _, value in there],
            xerr=[value["std"] for _, value in there],
            height=0.36,
            color=shade,
            edgecolor="black",
            linewidth=0.6,
            label=f"in {label}",
            error_kw={"elinewidth": 0.8, "capsize": 2},
        )
    panel.set_yticks(range(len(shown)), [f"{row['name']}, T = {row['temperature']:g}" for row in shown], fontsize=7)
    panel.invert_yaxis()
    panel.axvline(0, color="black", linewidth=0.6)
    panel.axvline(100, color="black", linewidth=0.6, linestyle=":")
    panel.set_xlabel("percent of the gap between cross-entropy and full distillation")
    panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
