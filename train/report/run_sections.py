"""The sections of a page about training: facts of runs and of a family come in, blocks go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.family_report import figures_of, kl_notes
from train.report.plots import Dot, Line, Plotter, Words, beside
from train.report.tables import (
    Cell,
    Details,
    FactList,
    Note,
    Section,
    Table,
    as_text,
    count,
    figure,
    hours,
    percent,
    words,
)

_TERMS = {"loss": "loss", "kl": "KL", "ce": "cross-entropy", "cosine": "cosine", "mse": "mean squared error"}
_HELD_OUT = {"loss": "loss (nats)", "kl": "KL to the teacher (nats)", "agreement": "agreement", "ece": "ECE"}
_UNFOLDED_RUNS = 3
_DRAWN_RUNS = 20


def runs_section(runs: Sequence[Mapping[str, Any]], plotter: Plotter | None) -> Section:
    """Training runs beside each other, then each by itself."""
    section = Section(key="training", title="Training")
    section.blocks.append(_runs_table(runs))
    if plotter is not None and len(runs) > _DRAWN_RUNS:
        section.blocks.append(Note(text=f"The curves of the first {_DRAWN_RUNS} runs are drawn one by one."))
    if plotter is not None and len(runs) > 1:
        section.blocks.append(_compared(runs, plotter))
    for number, run in enumerate(runs):
        blocks = _run(run, plotter if number < _DRAWN_RUNS else None)
        section.blocks.append(Details(summary=f"Run {run['name']}", blocks=blocks, is_open=len(runs) <= _UNFOLDED_RUNS))
    return section


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            words(run["name"]),
            words(
                "finished" if run["finished"] else f"not finished: step {run['steps']:,} of {run['total_steps'] or '?'}"
            ),
            count(run["parameters"]),
            count(run["steps"]),
            count(run["tokens"]),
            hours(None if run["seconds"] is None else run["seconds"] / 3600),
            figure(run["tokens_per_s"], 1),
            *(figure(run["last"].get(name)) for name in ("loss", "kl", "ce")),
            figure(run["evaluation"].get("loss")),
        )
        for run in runs
    ]
    headings = (
        "run",
        "state",
        "parameters",
        "steps",
        "tokens",
        "time",
        "tokens/s",
        "last loss",
        "last KL",
        "last cross-entropy",
        "held-out loss",
    )
    return Table(
        caption="Runs; losses are in nats, those of training are of the last line of metrics",
        headings=headings,
        rows=rows,
    )


def _compared(runs: Sequence[Mapping[str, Any]], plotter: Plotter) -> Any:
    """Cross-entropy with the text is what all runs share, if they have it; the loss is not the same of all."""
    plots = []
    for name in ("ce", "kl"):
        lines = [
            Line(label=run["name"], x=_places(run), y=run["training"][name]) for run in runs if name in run["training"]
        ]
        if len(lines) > 1:
            labels = Words(
                title=f"Training {_TERMS[name]} of the runs",
                x="tokens",
                y="nats",
                caption="Of single steps, as they were logged.",
            )
            plots.append(plotter.lines(lines, labels))
    held_out = [Line(label=r["name"], x=r["held_out"]["step"], y=r["held_out"]["loss"]) for r in runs if r["held_out"]]
    if len(held_out) > 1:
        plots.append(plotter.lines(held_out, Words(title="Held-out loss of the runs", x="step", y="nats")))
    return beside(*plots)


def _places(run: Mapping[str, Any]) -> list[float | None]:
    columns = run["training"]
    found: list[float | None] = columns.get("tokens") or columns["step"]
    return found


def _run(run: Mapping[str, Any], plotter: Plotter | None) -> list[Any]:
    blocks: list[Any] = []
    if not run["num_lines"]:
        blocks.append(Note(text="There are no metrics yet."))
    elif plotter is not None:
        blocks.append(_curves(run, plotter))
        points = len(run["training"].get("step", ()))
        if points < run["num_lines"] and points:
            blocks.append(
                Note(text=f"Curves are means of lines in a row: {run['num_lines']:,} lines, {points:,} points.")
            )
    if run["evaluation"]:
        items = [(_HELD_OUT.get(name, name), figure(value)) for name, value in run["evaluation"].items()]
        blocks.append(FactList(items=[("Held-out text", Cell("newest figures")), *items]))
    facts = [
        ("Folder", words(run["folder"])),
        ("Cache", words(run["cache"])),
        ("Cache's fingerprint", words(run["fingerprint"])),
        ("Ended by", words(run["stopped_by"] if run["finished"] else "not yet")),
    ]
    student = [(f"student: {name}", words(as_text(value))) for name, value in run["student"].items()]
    settings = [(name, words(value)) for name, value in run["settings"].items()]
    versions = [(name, words(value)) for name, value in run["versions"].items()]
    folded = Details(
        summary="Student, settings and versions", blocks=[FactList(items=[*student, *settings, *versions])]
    )
    return [*blocks, FactList(items=facts), folded]


def _curves(run: Mapping[str, Any], plotter: Plotter) -> Any:
    columns, x = run["training"], "tokens" if "tokens" in run["training"] else "step"
    plots = []
    if columns:
        terms = [Line(label=shown, x=columns[x], y=columns[name]) for name, shown in _TERMS.items() if name in columns]
        labels = Words(title="Loss and its terms", x=x, y="nats (cosine: 1 − cosine)", caption=f"Run {run['name']}.")
        plots.append(plotter.lines(terms, labels))
    held_out = run["held_out"]
    nats = [
        Line(label=name, x=held_out["step"], y=held_out[key])
        for key, name in (("loss", "loss"), ("kl", "KL to the teacher"))
        if key in held_out
    ]
    if nats and len(held_out["step"]) > 1:
        plots.append(
            plotter.lines(nats, Words(title="Held-out text", x="step", y="nats", caption=f"Run {run['name']}."))
        )
    for name, title, unit in (
        ("lr", "Learning rate", "learning rate"),
        ("tokens_per_s", "Speed", "tokens/s"),
        ("grad_norm", "Gradient norm before clipping", "norm"),
    ):
        if name in columns:
            labels = Words(title=title, x=x, y=unit, caption=f"Run {run['name']}.")
            plots.append(plotter.lines([Line(label=title, x=columns[x], y=columns[name])], labels, from_zero=True))
    return beside(*plots)


def family_section(family: Mapping[str, Any], plotter: Plotter | None) -> Section:
    """Students against their teacher, and against the same students without it."""
    section = Section(key="family", title="Students against the teacher")
    section.blocks.append(FactList(items=[("Family", words(family["folder"])), ("Cache", words(family["cache"]))]))
    students = family["students"]
    known = {student["name"]: figures_of(student) for student in students}
    section.blocks.append(_students_table(students, known))
    section.blocks.extend(_notes(students))
    if plotter is not None:
        section.blocks.append(beside(*_student_plots(students, known, plotter)))
    return section


def _students_table(students: Sequence[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]) -> Table:
    headings = (
        "student",
        "parameters",
        "loss",
        "perplexity",
        "KL",
        "agreement",
        "acceptance",
        "ECE",
        "prefill tokens/s",
        "decode tokens/s",
        "training time",
        "training tokens",
    )
    rows: list[tuple[Cell, ...]] = []
    teacher = next((c for s in students if (c := (s["evaluation"] or {}).get("cache")) and c["teacher_loss"]), None)
    if teacher is not None:
        own = (figure(teacher["teacher_loss"]), figure(teacher["teacher_perplexity"], 2))
        rows.append((Cell("(the teacher)"), Cell(""), *own, *[Cell("")] * 8))
    for student in students:
        row = known[student["name"]]
        rows.append(
            (
                words(student["name"] + ("" if student["status"] == "done" else f" ({student['status']})")),
                count(row["parameters"]),
                figure(row["loss"]),
                figure(row["perplexity"], 2),
                figure(row["kl"]),
                percent(row["agreement"]),
                percent(row["acceptance"]),
                figure(row["ece"]),
                figure(row["prefill"], 0),
                figure(row["decode"], 1),
                hours(row["hours"]),
                count(row["tokens"]),
            )
        )
    caption = "Students: on the held-out cache, or else the first text; losses in nats a token"
    return Table(caption=caption, headings=headings, rows=rows)


def _notes(students: Sequence[Mapping[str, Any]]) -> list[Note]:
    failed = [f"{s['name']} failed: {s['error']}" for s in students if s["status"] == "failed"]
    return [Note(text=text) for text in (*failed, *kl_notes(students))]


def _student_plots(
    students: Sequence[Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]], plotter: Plotter
) -> list[Any]:
    panels = (
        ("parameters", "loss", "Loss by size", "parameters (logarithmic)", "held-out loss (nats)"),
        ("decode", "loss", "Loss by speed", "generated tokens/s", "held-out loss (nats)"),
        ("parameters", "kl", "Distance from the teacher", "parameters (logarithmic)", "KL to the teacher (nats)"),
        ("parameters", "acceptance", "Acceptance", "parameters (logarithmic)", "Σ min(p, q)"),
    )
    plots = []
    for across, up, title, x, y in panels:
        dots = [
            Dot(
                label=student["name"],
                x=row[across],
                y=row[up],
                is_control=student["control_of"] is not None,
                group=student["control_of"] or student["name"],
            )
            for student in students
            if None not in ((row := known[student["name"]])[across], row[up])
        ]
        if dots:
            has_controls = any(dot.is_control for dot in dots)
            caption = "Squares: the same students, trained on the text alone." if has_controls else ""
            labels = Words(title=title, x=x, y=y, caption=caption)
            plots.append(plotter.dots(dots, labels, log_x=across == "parameters"))
    return plots
