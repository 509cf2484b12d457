"""The command's body: settings come in, one HTML file is written whole or not at all, its facts go out."""

from __future__ import annotations

from typing import Any

from cache_spec.durable import replace_file
from train.family_plots import require_matplotlib
from train.report.config import ReportConfig
from train.report.facts import report_facts
from train.report.page import render


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write the report; returns its facts, with ``out`` and ``bytes`` of the file.

    Raises BadInputError, among its kinds those of ``report_facts``, ``no-matplotlib`` where plots were asked for and
    cannot be drawn, and ``cannot-write``.
    """
    plots = config.plots is not False and require_matplotlib(asked=config.plots is not None)
    facts = report_facts(config)
    page = render(facts, plots=plots).encode()
    replace_file(config.out, page)
    return {"out": str(config.out), "bytes": len(page), **facts}
