"""The section of a page about a cache: its facts come in, blocks go out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from train.report.plots import Bar, Line, Plotter, Words, beside
from train.report.tables import (
    Beside,
    Cell,
    Details,
    Examples,
    FactList,
    Note,
    Section,
    Table,
    count,
    figure,
    percent,
    size,
    words,
)

_SHOWN_SOURCES = 200


def cache_section(facts: dict[str, Any], plotter: Plotter | None) -> Section:
    """What is in a cache and what it costs."""
    section = Section(key="cache", title="Cache")
    section.blocks.append(FactList(items=_what(facts)))
    if not facts["finished"]:
        text = f"This cache is not finished: {facts['shards_done']:,} of {facts['shards_planned']:,} shards are there."
        section.blocks.append(Note(text=text))
    if facts["sizes"] is None:
        return section
    section.blocks.extend(_sizes(facts, plotter))
    section.blocks.extend(_teacher_on_text(facts, plotter))
    section.blocks.append(Details(summary="Sources, settings and versions", blocks=_particulars(facts)))
    return section


def _what(facts: dict[str, Any]) -> list[tuple[str, Cell]]:
    teacher, blocks, sizes, corpus = facts["teacher"], facts["blocks"], facts["sizes"], facts["corpus"]
    items = [
        ("Cache", words(facts["cache"])),
        ("Fingerprint", words(facts["fingerprint"])),
        (
            "Teacher",
            words(
                f"{teacher['name']}: {_known(teacher['model_type'])}, {_known(teacher['num_parameters'])} parameters,"
                f" vocabulary {teacher['vocab_size']:,}, width {_known(teacher['hidden_size'])}"
            ),
        ),
        ("Weights' sha256", words(_known(teacher["weights_sha256"]))),
        ("Corpus", words(f"{len(corpus['sources']):,} source(s), {corpus['num_documents']:,} documents")),
        ("Blocks", words(f"{blocks['num_blocks']:,} of {blocks['block_tokens']:,} tokens")),
        ("Targets", words(_encoding(facts["encoding"]))),
        ("Temperatures", words(", ".join(f"{t:g}" for t in facts["temperatures"]))),
    ]
    if (imported := facts["imported"]) is not None:
        items.append(("Imported", words(f"log-probabilities, {imported['logprobs']}, by no teacher that ran for it")))
    if (masking := facts["masking"]) is not None:
        kept = "these" if masking["positions"] == "masked" else "all"
        items.append(("Masked", words(f"{masking['probability']:g} of a block's tokens, targets of {kept}")))
    if facts["hidden"] is not None:
        items.append(
            ("Hidden states", words(f"{facts['hidden']['dtype']}, means of {facts['hidden']['window']} tokens"))
        )
    if sizes is not None:
        about = "about " if sizes["is_estimate"] else ""
        about_tokens = "about " if sizes["is_estimate_of_tokens"] else ""
        per_token = f"{sizes['bytes'] / sizes['tokens']:,.1f} bytes/token" if sizes["tokens"] else "no tokens"
        items.append(("Tokens", words(f"{about_tokens}{sizes['tokens']:,}")))
        items.append(("Size", words(f"{about}{size(sizes['bytes']).text}, {per_token}")))
    state = "finished" if facts["finished"] else "not finished"
    items.append(("Shards", words(f"{facts['shards_done']:,} of {facts['shards_planned']:,}, {state}")))
    return items


def _known(value: int | str | None) -> str:
    return "unknown" if value is None else value if isinstance(value, str) else f"{value:,}"


def _encoding(encoding: dict[str, Any]) -> str:
    known = {name: value for name, value in encoding.items() if name != "name" and value is not None}
    return ", ".join([encoding["name"], *(f"{name.replace('_', ' ')} {value}" for name, value in known.items())])


def _sizes(facts: dict[str, Any], plotter: Plotter | None) -> list[Any]:
    sizes = facts["sizes"]
    parts = sorted({**sizes["arrays"], **sizes["tables"]}.items(), key=lambda part: -part[1])
    total = max(1, sum(num for _, num in parts))
    rows = [
        (
            words(name),
            words("once" if name in sizes["tables"] else "targets" if name in sizes["target_arrays"] else "each block"),
            size(num),
            figure(num / sizes["tokens"] if sizes["tokens"] else None, 3),
            Cell(f"{num / total:.1%}", num / total, bar=num / total),
        )
        for name, num in parts
    ]
    table = Table(caption="Bytes by array", headings=("array", "kept for", "size", "bytes/token", "share"), rows=rows)
    blocks: list[Any] = []
    if sizes["is_estimate"]:
        text = (
            f"Sizes and figures of blocks are scaled up from {sizes['shards_read']:,} of {facts['shards_done']:,}"
            f" shards, chosen evenly (seed {facts['seed']})."
        )
        blocks.append(Note(text=text))
    if plotter is not None:
        unit, scale = _unit(parts[0][1])
        strong = {*sizes["target_arrays"], *sizes["tables"]}
        bars = [Bar(label=name, value=num / scale, is_pale=name not in strong) for name, num in parts if num]
        caption = "Strong: targets and tables of the encoding. Pale: text, hidden states, figures of blocks."
        labels = Words(title="Bytes by array", x=f"size ({unit})", y="", caption=caption)
        plot = plotter.bars(bars, labels, shown=lambda value: size(value * scale).text)
        return [*blocks, Beside(blocks=(plot, table))]
    return [*blocks, table]


def _unit(largest: float) -> tuple[str, float]:
    name = size(largest).text.rpartition(" ")[2]
    return name, 1000.0 ** ("B", "kB", "MB", "GB", "TB", "PB").index(name)


def _teacher_on_text(facts: dict[str, Any], plotter: Plotter | None) -> list[Any]:
    sizes, sample = facts["sizes"], facts["sample"]
    blocks: list[Any] = []
    figures = [
        (name, found)
        for name, found in (("teacher's loss", sizes["block_loss"]), ("teacher's entropy", sizes["block_entropy"]))
        if found is not None
    ]
    if sample is not None:
        text = (
            f"Distributions are those of {sample['positions']:,} positions in {sample['blocks']:,} blocks, spread"
            f" evenly over the shards that are there (seed {facts['seed']}). Entropies of positions are"
            f" {sample['entropy_is']}" + ("." if facts["imported"] else "; those of blocks are the teacher's own.")
        )
        blocks.append(Note(text=text))
        blocks += _head_mass(facts, sample, plotter)
        base = f"{sample['temperature']:g}"
        figures.append((f"entropy of positions, T = {base}", sample["entropy"][base]))
    rows = [
        (words(name), count(found["num"]), *(figure(found[key]) for key in ("mean", "p10", "p50", "p90")))
        for name, found in figures
        if found is not None
    ]
    headings = ("nats", "number", "mean", "10%", "50%", "90%")
    blocks.append(Table(caption="Loss and entropy of the teacher on this text", headings=headings, rows=rows))
    if plotter is not None:
        blocks.append(beside(*(_histogram(plotter, name, found) for name, found in figures if found is not None)))
    if sample is not None and sample["examples"]:
        text = (
            "From positions where the teacher is sure to positions where it is not, with what it finds most probable."
        )
        blocks += [Note(text=text), Examples(examples=_shown(sample, facts["masking"] is not None))]
    return blocks


def _histogram(plotter: Plotter, name: str, found: dict[str, Any]) -> Any:
    of_blocks = "positions" not in name
    title = name[:1].upper() + name[1:]
    caption = (
        f"{found['num']:,} {'blocks' if of_blocks else 'positions'}; the dashed line is the mean, {found['mean']:.3g}."
    )
    labels = Words(
        title=title,
        x=f"nats a token{', mean of a block' if of_blocks else ''}",
        y="blocks" if of_blocks else "positions",
        caption=caption,
    )
    return plotter.histogram(found["counts"], found["edges"], found["mean"], labels)


def _head_mass(facts: dict[str, Any], sample: dict[str, Any], plotter: Plotter | None) -> list[Any]:
    encoding = facts["encoding"]["name"]
    of_what = {"sampled": "drawn tokens", "sparsified": "kept tokens"}.get(encoding, "tokens")
    title = f"Mass of the K most probable {of_what}"
    head: dict[str, Any] = sample["head_mass"]
    blocks: list[Any] = []
    some = [k for k in (1, 2, 4, 8, 16, 32, 64, 100) if k <= len(next(iter(head.values())))]
    rows = [(Cell(t, float(t)), *(percent(columns[k - 1]["mean"]) for k in some)) for t, columns in head.items()]
    tail = sample["tail_mass"]
    if plotter is not None:
        first = next(iter(head))
        lines = [
            Line(
                label=f"T = {t}",
                x=[row["k"] for row in columns],
                y=[row["mean"] for row in columns],
                low=[row["p10"] for row in columns] if t == first else None,
                high=[row["p90"] for row in columns] if t == first else None,
            )
            for t, columns in head.items()
        ]
        caption = f"Means over positions; the band at T = {first} holds 80% of them."
        labels = Words(title=title, x="K (tokens, logarithmic)", y="probability mass", caption=caption)
        figures = [plotter.lines(lines, labels, log_x=True, from_zero=True)]
        if len(tail) > 1:
            grid, means = [float(t) for t in tail], [row["mean"] for row in tail.values()]
            low, high = ([row[name] for row in tail.values()] for name in ("p10", "p90"))
            outside = next(iter(tail.values()))["outside"]
            caption = f"Mass outside the {outside:,} most probable tokens: means over positions; the band holds 80%."
            labels = Words(title="Tail mass by temperature", x="temperature", y="probability mass", caption=caption)
            line = Line(label="mean", x=grid, y=means, low=low, high=high)
            figures.append(plotter.lines([line], labels, from_zero=True))
        blocks.append(beside(*figures))
    tables: list[Any] = [
        Table(caption=f"{title}, mean", headings=("temperature", *(f"K\u00a0=\u00a0{k}" for k in some)), rows=rows)
    ]
    if tail:
        tail_rows = [
            (Cell(t, float(t)), count(row["outside"]), *(percent(row[key], 2) for key in ("mean", "p10", "p50", "p90")))
            for t, row in tail.items()
        ]
        headings = ("temperature", "outside of", "mean", "10%", "50%", "90%")
        tables.append(Table(caption="Tail mass by temperature", headings=headings, rows=tail_rows))
    else:
        why = "Log-probabilities that were renormalised tell" if facts["imported"] else f"The encoding {encoding} keeps"
        tables.append(Note(text=f"{why} no mass of a tail."))
    return [*blocks, Beside(blocks=tables)]


def _shown(sample: dict[str, Any], is_masked: bool) -> list[dict[str, Any]]:
    base = f"{sample['temperature']:g}"
    return [
        {
            **example,
            "is_masked": is_masked,
            "temperatures": list(sample["head_mass"]),
            "outside_text": {t: percent(mass, 2).text for t, mass in example["outside"].items()},
            "entropy_text": figure(example["entropy"], 3).text,
            "rows": [
                {**token, "cells": [_probability(token["probability"][t], t == base) for t in sample["head_mass"]]}
                for token in example["tokens"]
            ],
        }
        for example in sample["examples"]
    ]


def _probability(share: float | None, has_bar: bool) -> Cell:
    """A token's, with a bar at the temperature by which the examples were chosen."""
    return replace(percent(share, 2), bar=share if has_bar else None)


def _particulars(facts: dict[str, Any]) -> list[Any]:
    sources = facts["corpus"]["sources"]
    rows = [(words(s["name"]), size(s["num_bytes"]), words(s["sha256"][:16])) for s in sources[:_SHOWN_SOURCES]]
    more = len(sources) - len(rows)
    blocks: list[Any] = [Table(caption="Sources", headings=("source", "size", "sha256 begins"), rows=rows)]
    if more:
        blocks.append(Note(text=f"{more:,} more sources are not shown."))
    records = ("corpus", "blocks", "encoding", "hidden", "masking", "imported", "compute", "tokenizer", "provenance")
    items = [
        (f"{record}.{name}", words(value))
        for record in records
        for name, value in (facts[record] or {}).items()
        if not isinstance(value, dict | list)
    ]
    return [*blocks, FactList(items=items)]
