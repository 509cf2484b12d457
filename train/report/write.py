"""The command's body: settings come in, one HTML file is written whole or not at all, its facts go out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_spec.durable import replace_file, writing
from cache_spec.errors import WouldLoseDataError
from train.family_plots import require_matplotlib
from train.report.config import ReportConfig
from train.report.facts import report_facts
from train.report.page import BEGINNING, render


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write the report; returns its facts, with ``out`` and ``bytes`` of the file.

    Raises BadInputError, among its kinds those of ``report_facts``, ``no-matplotlib`` where plots were asked for and
    cannot be drawn, and ``cannot-write``; and WouldLoseDataError ``not-a-report`` where ``config.out`` is a file of
    anything else.
    """
    _refuse_other_file(config.out)
    plots = config.plots is not False and require_matplotlib(asked=config.plots is not None)
    facts = report_facts(config)
    page = render(facts, plots=plots).encode()
    replace_file(config.out, page)
    return {"out": str(config.out), "bytes": len(page), **facts}


def _refuse_other_file(path: Path) -> None:
    """Nothing but an older report is replaced: a mistyped path may be that of what the report is made from."""
    # A folder is what no file can replace.
    if path.is_dir() or not path.exists():
        return
    with writing(path):
        is_report = path.is_file() and _begins(path, BEGINNING.encode())
    if not is_report:
        hint = "remove that file, or name another"
        raise WouldLoseDataError("not-a-report", path, expected="a new file or an older report", hint=hint)


def _begins(path: Path, with_: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(with_)) == with_
