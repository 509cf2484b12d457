"""The section of a page about a plan: what was planned and what became of it come in, blocks go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.report.plots import Line, Plotter, Words, beside
from train.report.tables import (
    Cell,
    FactList,
    Plots,
    Section,
    Table,
    as_text,
    count,
    figure,
    hours,
    percent,
    size,
    words,
)

_WAYS = ("cached", "online", "cross_entropy")


def plan_section(plan: Mapping[str, Any], happened: Sequence[Mapping[str, Any]], plotter: Plotter | None) -> Section:
    """What was planned, what became of it, and what it was planned from."""
    title = "Plan against what happened" if any(row["real"] is not None for row in happened) else "Plan"
    section = Section(key="plan", title=title)
    section.blocks.append(FactList(items=_what(plan)))
    rows = [
        (
            words(row["what"]),
            _in_unit(row["planned"], row["unit"]),
            _in_unit(row["real"], row["unit"]),
            percent(row["difference"], signed=True),
            Cell(row["note"]),
        )
        for row in happened
    ]
    headings = ("what", "planned", "happened", "difference", "note")
    section.blocks.append(Table(caption="Planned and happened", headings=headings, rows=rows))
    section.blocks.extend(_ways(plan, plotter))
    section.blocks.extend(_totals(plan))
    if plan["assumptions"]:
        columns = ("name", "value", "unit", "source")
        assumed = [[words(as_text(assumption[key])) for key in columns] for assumption in plan["assumptions"]]
        section.blocks.append(Table(caption="Assumptions", headings=columns, rows=assumed))
    return section


def _what(plan: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    device = _mapping(plan["device"])
    where = f"{plan['num_devices'] or 1} x {device.get('name', 'device')}, by formula"
    items = [
        ("File", words(plan["file"])),
        ("Estimated for", words("this machine, measured" if plan["calibrated"] else where)),
        ("Teacher", words(plan["teacher"].get("name"))),
        ("Tokens", words(f"{plan['cache']['tokens']:,.0f} ({plan['cache']['tokens_certainty'] or 'as given'})")),
    ]
    even = _mapping(_mapping(plan["break_even"]).get("words")) or _mapping(plan["break_even"])
    told = ", ".join(f"{name} {as_text(even[name])}" for name in ("students", "epochs") if name in even)
    items.append(("Break-even with online distillation", words(told)))
    budget = _mapping(plan["budget"])
    items += [(f"Budget: {name}".replace("_", " "), words(as_text(value))) for name, value in budget.items()]
    if plan["fits_in_memory"] is not None:
        items.append(("Fits in memory", words("yes" if plan["fits_in_memory"] else "no")))
    return items


def _totals(plan: Mapping[str, Any]) -> list[Table]:
    """Hours, money, energy and carbon dioxide of all ways."""
    totals = plan["totals"]
    rows = [[Cell("time"), *(hours(_number(totals.get(f"{way}_hours"))) for way in _WAYS)]]
    for name, heading in (("money", "money"), ("kwh", "kWh"), ("co2_kg", "kg of CO2")):
        of = _mapping(totals.get(name))
        if of:
            rows.append([Cell(heading), *(figure(_number(of.get(way)), 2) for way in _WAYS)])
    headings = ("in all", "from the cache", "online distillation", "cross-entropy")
    return [Table(caption="Planned in all", headings=headings, rows=rows)] if totals else []


def _in_unit(value: float | None, unit: str) -> Cell:
    if unit == "hours":
        return hours(value)
    if unit == "bytes":
        return size(value)
    return figure(value, 1) if unit == "tokens/s" else count(value)


def _mapping(part: object) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}


def _ways(plan: Mapping[str, Any], plotter: Plotter | None) -> list[Any]:
    """Training from the cache beside other ways, and the loss to expect of hours."""
    students = plan["students"]
    blocks: list[Any] = []
    if students:
        ways = ("online", "cross_entropy")
        rows = [
            (
                words(s["name"]),
                count(s["parameters"]),
                hours(s["hours_per_epoch"]),
                hours(s["hours"]),
                *(hours((s[way] or {}).get("hours")) for way in ways),
                figure(s["tokens_per_s"], 1),
                size(s["peak_bytes"]),
            )
            for s in students
        ]
        headings = (
            "student",
            "parameters",
            "an epoch",
            "from the cache",
            "online distillation",
            "cross-entropy",
            "tokens/s",
            "peak memory",
        )
        blocks.append(Table(caption="Planned training of each student", headings=headings, rows=rows))
    if plotter is not None:
        blocks.append(beside(*_curves(plan, plotter)))
    return blocks


def _curves(plan: Mapping[str, Any], plotter: Plotter) -> list[Plots]:
    """Hours and loss by the number of students, and the loss of all students by the hours that they are given."""
    curve: Sequence[Mapping[str, Any]] = plan["curve"] or ()
    by_hours: Sequence[Mapping[str, Any]] = plan["loss_by_hours"] or ()
    most = max((point["students"] for point in by_hours), default=0)
    by_hours = [point for point in by_hours if point["students"] == most]
    numbers = [point["students"] for point in curve]
    hours_given = [point["hours"] for point in by_hours]
    label = "held-out loss (nats)"
    plots = []
    if len(curve) > 1:
        labels = Words(title="Time by number of students", x="students", y="hours in all", caption="As planned.")
        plots.append(plotter.lines(_by_way(curve, "hours", numbers), labels, from_zero=True))
        labels = Words(title="Mean loss by number of students", x="students", y=label, caption="By a model of it.")
        plots.append(plotter.lines(_by_way(curve, "loss", numbers), labels))
    caption = f"Mean of {most:g} student(s), by a model of it, as far as that reaches."
    labels = Words(title="Loss by hours in all", x="hours in all (logarithmic)", y=label, caption=caption)
    plots.append(plotter.lines(_by_way(by_hours, "loss", hours_given), labels, log_x=True))
    return plots


def _by_way(points: Sequence[Mapping[str, Any]], name: str, x: Sequence[float]) -> list[Line]:
    ways = dict.fromkeys(way for point in points for way in point["ways"])
    return [
        Line(label=way.replace("_", " "), x=x, y=[_number(point["ways"].get(way, {}).get(name)) for point in points])
        for way in ways
    ]


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None
