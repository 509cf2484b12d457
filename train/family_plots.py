"""Plots of a family: what ``family.json`` says comes in, one picture goes out. matplotlib is the extra ``plots``."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_spec.durable import TEMPORARY_PREFIX, writing
from cache_spec.errors import BadInputError
from train.family_report import figures_of

logger = logging.getLogger("kdpipe")

_HINT = "pip install 'kdpipe[plots]'"
_PANELS = (
    ("parameters", "loss", "parameters", "held-out loss (nats)"),
    ("decode", "loss", "generated tokens a second", "held-out loss (nats)"),
    ("parameters", "kl", "parameters", "KL to the teacher (nats)"),
    ("parameters", "acceptance", "parameters", "acceptance, sum of min(p, q)"),
)


def require_matplotlib(*, asked: bool) -> bool:
    """Whether plots can be drawn; BadInputError ``no-matplotlib`` if they were asked for and cannot."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    if asked:
        raise BadInputError("no-matplotlib", "--plots", expected="matplotlib", hint=_HINT)
    logger.info("no plots without matplotlib: %s", _HINT)
    return False


def draw_family(report: Mapping[str, Any], path: Path) -> bool:
    """Draw the figures that were measured, a dotted line from each student to its control; False: there were none."""
    figures = {row["name"]: figures_of(row) for row in report["students"] if row["status"] == "done"}
    control_of = {row["name"]: row["control_of"] for row in report["students"]}
    panels = [
        panel for panel in _PANELS if any(None not in (known[panel[0]], known[panel[1]]) for known in figures.values())
    ]
    if not panels:
        return False
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    picture, grid = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), squeeze=False, layout="constrained")
    for panel, (across, up, x_label, y_label) in zip(grid[0], panels, strict=True):
        points = {
            name: (known[across], known[up])
            for name, known in figures.items()
            if known[across] is not None and known[up] is not None
        }
        for name, (x, y) in points.items():
            student = control_of[name]
            panel.plot(x, y, "s" if student else "o", color="tab:gray" if student else "tab:blue")
            if student is None:
                panel.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
            elif student in points:
                panel.plot(*zip(points[student], (x, y), strict=True), ":", color="tab:gray", linewidth=1)
        panel.set(xlabel=x_label, ylabel=y_label)
        panel.margins(0.2)
        panel.grid(alpha=0.3)
    if any(control_of[name] for name in figures):
        picture.suptitle("squares: the same students, trained on the text alone", fontsize=9)
    # The picture at its place is a whole one at any moment.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    with writing(path):
        picture.savefig(temporary, dpi=120)
        os.replace(temporary, path)
    pyplot.close(picture)
    return True
