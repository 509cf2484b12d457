"""One table of a family: what ``family.json`` says comes in, lines for people, CSV or Markdown go out.

The first measured thing, the held-out cache or else the first text or corpus, gives loss, perplexity and calibration
error; other texts add their perplexities, and each corpus the figure that it is known by.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
_OF_CORPORA = {
    "wikitext103": ("word perplexity", "word_perplexity"),
    "ptb": ("word perplexity", "word_perplexity"),
    "enwik8": ("bits/byte", "bits_per_byte"),
    "lambada": ("accuracy", "accuracy"),
}
"""What a family is compared by on a corpus, heading and figure; on others by perplexity."""


def table_lines(report: Mapping[str, Any]) -> list[str]:
    """The table in aligned columns, then what failed."""
    header, *cells = _cells(report)
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in [header, *cells]
    ]
    return [*lines, *_notes(report)]


def report_markdown(report: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    header, *cells = _cells(report)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]
    return "\n".join([*rows, "", *_notes(report)]).rstrip() + "\n"


def report_csv(report: Mapping[str, Any]) -> str:
    """All figures in full precision, one student a line."""
    columns = _columns(report)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["student", "control_of", "status", *(name.replace(" ", "_") for name in columns), "error"])
    for row in report["students"]:
        figures = [figure(row) for figure, _ in columns.values()]
        writer.writerow([row["name"], row["control_of"], row["status"], *figures, row["error"]])
    return out.getvalue()


def plan_lines(facts: Mapping[str, Any]) -> list[str]:
    """What a family would do, for people."""
    header = ["student", "parameters", "steps", "done", "tokens to train", "hours", "checkpoint MB"]
    rows = [header]
    for row in facts["students"]:
        told = [f"{row['parameters']:,}"]
        if row["status"] == "done":
            told += ["-", "all", "-", "-", "-"]
        else:
            told += [f"{row[name]:,}" for name in ("steps", "steps_done", "tokens_to_train")]
            told += [f"{row['hours']:.3f}", f"{row['checkpoint_bytes'] / 1e6:,.1f}"]
        rows.append([row["name"], *told])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return [*lines, f"{facts['hours']:.3f} hours of training in all"]


def figures_of(row: Row) -> dict[str, Any]:
    """What a student is compared by, None where it was not measured; ``loss`` and so on of the first measured thing."""
    evaluation = row["evaluation"] or {}
    cache = evaluation.get("cache") or {}
    texts = evaluation.get("texts") or []
    corpora = evaluation.get("corpora") or []
    first = cache or next(iter([*texts, *corpora]), {})
    speed = row["speed"] or {}
    return {
        "parameters": row["parameters"],
        "loss": first.get("loss_nats"),
        "perplexity": first.get("perplexity"),
        "kl": cache.get("kl_to_teacher"),
        "agreement": cache.get("agreement"),
        "acceptance": cache.get("overlap"),
        "ece": first.get("ece"),
        "prefill": speed.get("prefill_tokens_per_s"),
        "decode": speed.get("decode_tokens_per_s"),
        "hours": row["training_hours"],
        "tokens": row["training_tokens"],
    }


def _columns(report: Mapping[str, Any]) -> dict[str, tuple[Callable[[Row], Any], Callable[[Any], str]]]:
    """Headings, each with how its figure is found in a row and shown."""

    def figure(name: str) -> Callable[[Row], Any]:
        return lambda row: figures_of(row)[name]

    def of_text(number: int) -> Callable[[Row], Any]:
        return lambda row: row["evaluation"]["texts"][number]["perplexity"] if row["evaluation"] else None

    def of_corpus(number: int, key: str) -> Callable[[Row], Any]:
        return lambda row: row["evaluation"]["corpora"][number][key] if row["evaluation"] else None

    names = {
        "parameters": ("parameters", "{:,}"),
        "loss": ("loss", "{:.4f}"),
        "perplexity": ("perplexity", "{:,.2f}"),
        "KL": ("kl", "{:.4f}"),
        "agreement": ("agreement", "{:.4f}"),
        "acceptance": ("acceptance", "{:.4f}"),
        "ECE": ("ece", "{:.4f}"),
        "prefill tokens/s": ("prefill", "{:,.0f}"),
        "decode tokens/s": ("decode", "{:,.1f}"),
        "training hours": ("hours", "{:.3f}"),
        "training tokens": ("tokens", "{:,}"),
    }
    columns: dict[str, tuple[Callable[[Row], Any], Callable[[Any], str]]] = {
        heading: (figure(name), form.format) for heading, (name, form) in names.items()
    }
    evaluate = report["evaluate"] or {}
    for number, given in enumerate(evaluate.get("corpus") or []):
        name = given.partition("=")[0]
        heading, key = _OF_CORPORA.get(name, ("perplexity", "perplexity"))
        columns[f"{name} {heading}"] = (of_corpus(number, key), "{:,.3f}".format)
    others = list(evaluate.get("text") or [])
    for number, text in enumerate(others):
        if number or evaluate.get("cache"):
            columns[f"perplexity {Path(text).name}"] = (of_text(number), "{:,.2f}".format)
    return columns


def _cells(report: Mapping[str, Any]) -> list[list[str]]:
    columns = _columns(report)
    cells = [["student", *columns]]
    for row in report["students"]:
        name = row["name"] if row["status"] == "done" else f"{row['name']} ({row['status']})"
        shown = [(figure(row), form) for figure, form in columns.values()]
        cells.append([name, *("-" if value is None else form(value) for value, form in shown)])
    teacher = next((cache for row in report["students"] if (cache := (row["evaluation"] or {}).get("cache"))), None)
    if teacher is not None:
        own = {} if teacher["teacher_loss"] is None else {"loss": f"{teacher['teacher_loss']:.4f}"}
        if teacher["teacher_perplexity"] is not None:
            own["perplexity"] = f"{teacher['teacher_perplexity']:,.2f}"
        cells.insert(1, ["(the teacher)", *(own.get(heading, "") for heading in columns)])
    return cells


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = [f"{row['name']} failed: {row['error']}" for row in report["students"] if row["status"] == "failed"]
    return notes + kl_notes(report["students"])


def kl_notes(students: Sequence[Row]) -> list[str]:
    """What the figures on the held-out cache cannot tell, in words."""
    notes = []
    kinds = {cache["kl_is"] for row in students if (cache := (row["evaluation"] or {}).get("cache"))}
    if "lower-bound" in kinds:
        notes.append("KL is a lower bound and acceptance an upper one: the cache holds heads of the distributions.")
    if None in kinds:
        notes.append(
            "The held-out cache holds drawn or imported targets, which tell neither KL nor agreement nor acceptance."
        )
    return notes
