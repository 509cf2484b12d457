"""The section of a page about a plan: what was planned and what became of it come in, blocks go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.report.plots import Line, Plotter, Words, beside
from train.report.tables import Cell, FactList, Section, Table, as_text, count, figure, hours, percent, size, words


def plan_section(plan: Mapping[str, Any], happened: Sequence[Mapping[str, Any]], plotter: Plotter | None) -> Section:
    """What was planned, what became of it, and what it was planned from."""
    section = Section(key="plan", title="Plan against what happened")
    how = "calibrated on the machine" if plan["calibrated"] else "by formula"
    section.blocks.append(FactList(items=[("File", words(plan["file"])), ("Estimated", words(how))]))
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
    facts = [
        (f"{part}: {name}".replace("_", " "), words(as_text(v)))
        for part in ("totals", "break_even", "budget")
        for name, v in _items(plan[part])
    ]
    if facts:
        section.blocks.append(FactList(items=facts))
    if plan["assumptions"]:
        columns = ("name", "value", "unit", "source")
        assumed = [[words(as_text(assumption[key])) for key in columns] for assumption in plan["assumptions"]]
        section.blocks.append(Table(caption="Assumptions", headings=columns, rows=assumed))
    return section


def _in_unit(value: float | None, unit: str) -> Cell:
    if unit == "hours":
        return hours(value)
    if unit == "bytes":
        return size(value)
    return figure(value, 1) if unit == "tokens/s" else count(value)


def _items(part: object) -> list[tuple[str, Any]]:
    return list(part.items()) if isinstance(part, dict) else []


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
    curve: Sequence[Mapping[str, Any]] = plan["curve"] or ()
    names = dict.fromkeys(name for point in curve for name in point["ways"])
    lines = [
        Line(
            label=name.replace("_", " "),
            x=[_number(point["ways"].get(name, {}).get("hours")) for point in curve],
            y=[_number(point["ways"].get(name, {}).get("loss")) for point in curve],
        )
        for name in names
    ]
    if plotter is not None and lines:
        caption = f"From {curve[0]['students']:g} to {curve[-1]['students']:g} students."
        title = "Loss to expect by hours in all"
        labels = Words(title=title, x="hours in all", y="held-out loss (nats)", caption=caption)
        by_loss = plotter.lines(lines, labels)
        numbers = [point["students"] for point in curve]
        labels = Words(title="Hours by number of students", x="students", y="hours in all", caption="As planned.")
        by_number = plotter.lines(
            [Line(label=line.label, x=numbers, y=line.x) for line in lines], labels, from_zero=True
        )
        blocks.append(beside(by_loss, by_number))
    return blocks


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None
