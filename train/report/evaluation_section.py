"""The section of a page about an evaluation: its facts come in, blocks go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.evaluation.tables import KL_WORDS
from train.report.plots import Bar, Plotter, Words, beside
from train.report.tables import (
    Cell,
    FactList,
    Note,
    Samples,
    Section,
    Table,
    as_text,
    bare,
    count,
    figure,
    numbered,
    size,
    with_interval,
    words,
)

Models = Sequence[Mapping[str, Any]]
_COMMON = {
    "loss_nats": ("loss (nats)", 4),
    "perplexity": ("perplexity", 2),
    "word_perplexity": ("word perplexity", 2),
    "bits_per_byte": ("bits/byte", 4),
    "accuracy": ("accuracy", 4),
    "ece": ("ECE", 4),
    "kl_to_teacher": ("KL (nats)", 4),
    "agreement": ("agreement", 4),
    "overlap": ("acceptance", 4),
    "tokens_per_s": ("tokens/s", 0),
}


def evaluation_section(evaluation: Mapping[str, Any], number: int, plotter: Plotter | None) -> Section:
    """Models side by side on each text, each corpus and the cache; then speed and what they write."""
    title = "Evaluation" if number == 1 else f"Evaluation {number}"
    section = Section(key=f"evaluation-{number}", title=title)
    models, names = evaluation["models"], distinct_names([model["name"] for model in evaluation["models"]])
    section.blocks.append(FactList(items=[("File", words(evaluation["file"])), *_bootstrap(evaluation["bootstrap"])]))
    section.blocks.append(_models_table(models, names))
    texts = list(dict.fromkeys(part["text"] for model in models for part in model["texts"]))
    text_labels = dict(zip(texts, distinct_names(texts), strict=True))
    labelled = (("texts", lambda part: text_labels[part["text"]]), ("corpora", _corpus_label))
    for key, label_of in labelled:
        for label in dict.fromkeys(label_of(part) for model in models for part in model[key]):
            found = [
                (name, part)
                for name, model in zip(names, models, strict=True)
                for part in model[key]
                if label_of(part) == label
            ]
            section.blocks.extend(_compared(label, found, plotter))
    found = [(name, model["cache"]) for name, model in zip(names, models, strict=True) if model["cache"]]
    if found:
        section.blocks.extend(_on_cache(found, plotter))
    section.blocks.extend(_speed(models, names, plotter))
    section.blocks.extend(_samples(models, names))
    return section


def distinct_names(names: Sequence[str]) -> list[str]:
    """The last part of each name, or the whole where that does not tell two apart; equal ones are numbered."""
    ends = [bare(name) for name in names]
    return numbered([end if ends.count(end) == 1 else name for end, name in zip(ends, names, strict=True)])


def _corpus_label(part: Mapping[str, Any]) -> str:
    """What figures of several models must share to be compared."""
    windows = [
        f"{name} {part[key]:,}" for key, name in (("window_tokens", "window"), ("stride", "stride")) if part[key]
    ]
    known = [part["corpus"], part["mode"], *windows]
    return ", ".join(str(value) for value in dict.fromkeys(known) if value)


def _bootstrap(bootstrap: object) -> list[tuple[str, Cell]]:
    if not bootstrap:
        return []
    told = bootstrap if isinstance(bootstrap, dict) else {"": bootstrap}
    return [("Intervals", words(", ".join(f"{name} {as_text(value)}".strip() for name, value in told.items())))]


def _models_table(models: Models, names: Sequence[str]) -> Table:
    rows = [
        (
            words(name),
            count(m["parameters"]),
            size(m["file_bytes"]),
            words(m["dtype"]),
            words(m["device"]),
            words(m["name"]),
        )
        for name, m in zip(names, models, strict=True)
    ]
    headings = ("model", "parameters", "file", "dtype", "device", "where")
    return Table(caption="Models", headings=headings, rows=rows)


def _compared(label: str, found: Sequence[tuple[str, Mapping[str, Any]]], plotter: Plotter | None) -> list[Any]:
    protocols = dict.fromkeys(_protocol(part) for _, part in found if part.get("protocol"))
    notes = [Note(text=protocol) for protocol in protocols]
    blocks: list[Any] = [_figures_table(label, found), *notes, *_differences(found)]
    name = next((n for n in ("loss_nats", "accuracy") if any(part.get(n) is not None for _, part in found)), None)
    if plotter is not None and name is not None:
        blocks.append(_bars(label, name, found, plotter))
    return blocks


def _protocol(part: Mapping[str, Any]) -> str:
    units = f"{part['num_units']:,} units of one {part['interval_unit']} each" if part["num_units"] else ""
    return "; ".join(str(value) for value in (part["protocol"], part["source"], units) if value) + "."


def _differences(found: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Table]:
    """How much more each model has than the first, where both were measured on the same tokens."""
    told = [(model, difference) for model, part in found if (difference := part.get("difference"))]
    if not told:
        return []
    names = [n for n in ("loss_nats", "accuracy") if any(difference[n] is not None for _, difference in told)]
    rows = [
        (words(model), *(with_interval(difference[n], difference["intervals"].get(n)) for n in names))
        for model, difference in told
    ]
    headings = ("model", *(_COMMON[name][0] for name in names))
    return [Table(caption=f"More than {bare(told[0][1]['to'])}, with intervals of pairs", headings=headings, rows=rows)]


def _figures_table(
    label: str, found: Sequence[tuple[str, Mapping[str, Any]]], above: Sequence[Sequence[Cell]] = ()
) -> Table:
    shown = [name for name in _COMMON if any(part.get(name) is not None for _, part in found)]
    rows = [
        (words(model), count(part["num_tokens"]), *(_figure(part, name) for name in shown)) for model, part in found
    ]
    units = {part.get("interval_unit") for _, part in found} - {None}
    note = "; [lower, upper] ends of intervals" if any(part["intervals"] for _, part in found) else ""
    note += f" over {', '.join(sorted(map(str, units)))}" if note and units else ""
    sampled = "; of a sample" if any(part.get("sampled") for _, part in found) else ""
    headings = ("model", "tokens", *(_COMMON[name][0] for name in shown))
    rows = [*(tuple(row) + (Cell(""),) * (len(headings) - len(row)) for row in above), *rows]
    return Table(caption=f"{label}{sampled}{note}", headings=headings, rows=rows)


def _figure(part: Mapping[str, Any], name: str) -> Cell:
    return with_interval(part[name], part["intervals"].get(name), _COMMON[name][1]) if name in part else Cell("")


def _bars(label: str, name: str, found: Sequence[tuple[str, Mapping[str, Any]]], plotter: Plotter) -> Any:
    heading = _COMMON[name][0]
    bars = [
        Bar(label=model, value=part[name], interval=part["intervals"].get(name))
        for model, part in found
        if part[name] is not None
    ]
    caption = f"{label}." + (" Lines: intervals." if any(bar.interval for bar in bars) else "")
    labels = Words(title=f"{heading[:1].upper()}{heading[1:]}", x=heading, y="", caption=caption)
    return plotter.bars(bars, labels, shown=lambda value: f"{value:,.4g}")


def _on_cache(found: Sequence[tuple[str, Mapping[str, Any]]], plotter: Plotter | None) -> list[Any]:
    cache = found[0][1]
    above = []
    if cache["teacher_loss"] is not None:
        own = (figure(cache["teacher_loss"]), figure(cache["teacher_perplexity"], 2))
        above.append((Cell("(the teacher)"), count(cache["num_tokens"]), *own))
    told = KL_WORDS.get(cache["kl_is"], "KL and {overlap}").format(overlap="acceptance")
    label = f"Held-out cache {bare(cache['cache'])}, {told} at temperature {cache['temperature']:g}"
    blocks: list[Any] = [_figures_table(label, found, above)]
    if plotter is not None:
        names = [n for n in ("loss_nats", "kl_to_teacher", "overlap") if any(part[n] is not None for _, part in found)]
        blocks.append(beside(*(_bars("Held-out cache", name, found, plotter) for name in names)))
    return blocks


def _speed(models: Models, names: Sequence[str], plotter: Plotter | None) -> list[Any]:
    timed = [(name, model["speed"]) for name, model in zip(names, models, strict=True) if model["speed"]]
    if not timed:
        return []
    headings = (
        "model",
        "prompt tokens",
        "prefill tokens/s",
        "decode tokens/s",
        "first token (ms)",
        "further token (ms)",
        "peak memory",
    )
    rows = [
        (
            words(name),
            count(speed["prompt_tokens"]),
            figure(speed["prefill_tokens_per_s"], 1),
            figure(speed["decode_tokens_per_s"], 1),
            *(figure(None if speed[key] is None else 1000 * speed[key], 2) for key in ("first_token_s", "token_s")),
            size(speed["peak_bytes"]),
        )
        for name, speed in timed
    ]
    blocks: list[Any] = [Table(caption="Speed of generation, one text at a time", headings=headings, rows=rows)]
    if plotter is not None:
        figures = (("prefill_tokens_per_s", "Reading a prompt"), ("decode_tokens_per_s", "Generating"))
        plots = [
            plotter.bars(
                [Bar(label=name, value=speed[key]) for name, speed in timed if speed[key] is not None],
                Words(title=title, x="tokens/s", y="", caption="One text at a time."),
                shown=lambda value: f"{value:,.1f}",
            )
            for key, title in figures
        ]
        blocks.append(beside(*plots))
    return blocks


def _samples(models: Models, names: Sequence[str]) -> list[Any]:
    prompts = dict.fromkeys(sample["prompt"] for model in models for sample in model["samples"])
    if not prompts:
        return []
    written = [
        (
            prompt,
            [
                (name, sample["text"])
                for name, model in zip(names, models, strict=True)
                for sample in model["samples"]
                if sample["prompt"] == prompt
            ],
        )
        for prompt in prompts
    ]
    return [Samples(prompts=written)]
