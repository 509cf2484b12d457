"""The page: facts come in, sections of them are laid out by one template, one HTML file's text goes out.

The page needs nothing else: style, script and plots are in it, and its policy forbids every request and every script
but the one whose digest it names. Text is escaped by the template engine, and made inert before that.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from train.report.cache_section import cache_section
from train.report.evaluation_section import evaluation_section
from train.report.inert import isolated, signs, visible
from train.report.plan_section import plan_section
from train.report.plots import Plotter
from train.report.run_sections import family_section, runs_section
from train.report.tables import Section

BEGINNING = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="kdpipe report"""
"""How every page begins, so that it is known for one."""
_SPACE = "\u00b7"


def render(facts: dict[str, Any], *, plots: bool) -> str:
    """The page of a report's facts; ``plots``: draw them, by matplotlib."""
    environment = Environment(
        loader=PackageLoader("train.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"isolated": isolated, "signs": signs, "spaces": _spaces}
    style, script = _asset("report.css"), _asset("report.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src 'sha256-{_digest(style)}'",
            f"script-src 'sha256-{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return environment.get_template("report.html").render(
        beginning=Markup(BEGINNING),
        facts=facts,
        sections=sections(facts, Plotter() if plots else None),
        style=Markup(style),
        script=Markup(script),
        policy=Markup(policy),
        has_plots=plots,
    )


def sections(facts: dict[str, Any], plotter: Plotter | None) -> list[Section]:
    """The sections of what there is, in the order of the work."""
    found: list[Section] = []
    if facts["cache"] is not None:
        found.append(cache_section(facts["cache"], plotter))
    if facts["family"] is not None:
        found.append(family_section(facts["family"], plotter))
    if facts["runs"]:
        found.append(runs_section(facts["runs"], plotter))
    found += [evaluation_section(part, number, plotter) for number, part in enumerate(facts["evaluations"], 1)]
    if facts["plan"] is not None:
        found.append(plan_section(facts["plan"], facts["happened"], plotter))
    return found


def _asset(name: str) -> str:
    return (resources.files("train.report") / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _spaces(text: str) -> Markup:
    """A token's text, with signs for the spaces at its ends."""
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    dots = Markup('<span class="sign">{}</span>')
    if not inner:
        return dots.format(_SPACE * len(text))
    after = len(text) - before - len(inner)
    return (
        (dots.format(_SPACE * before) if before else Markup(""))
        + signs(inner)
        + (dots.format(_SPACE * after) if after else Markup(""))
    )
