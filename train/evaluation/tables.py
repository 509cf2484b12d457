"""Tables for people: what ``evaluate_models`` returns comes in, lines go out.

The corpora come first, one line a figure and one column a model, as in a paper; what each figure means stands below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_CORPUS_FIGURES = {
    "accuracy": ("accuracy", 4),
    "word_perplexity": ("word perplexity", 2),
    "perplexity": ("perplexity", 2),
    "bits_per_byte": ("bits/byte", 4),
}
KL_WORDS = {
    "exact": "exact KL and {overlap}",
    "lower-bound": "KL from below and {overlap} from above",
    None: "of drawn or imported targets, which tell neither KL nor {overlap},",
}
"""What a cache tells of the teacher, by ``kl_is``."""


def table(report: Mapping[str, Any]) -> list[str]:
    """Lines for people, of what ``report`` returns; models are under each other but on corpora."""
    rows = report["models"]
    if not rows:
        return []
    parts = [*_corpora(rows, report["bootstrap"]), *_texts(rows), *_cache(rows), *_speed(rows), *_samples(rows)]
    return [line for part in parts for line in ["", *part]][1:]


def _corpora(rows: Sequence[Row], bootstrap: Mapping[str, Any]) -> list[list[str]]:
    if not rows[0]["corpora"]:
        return []
    names = _short([row["name"] for row in rows])
    cells = [["corpus", "figure", *names]]
    protocols = []
    for number, first in enumerate(rows[0]["corpora"]):
        of_models = [row["corpora"][number] for row in rows]
        for name, (heading, digits) in _CORPUS_FIGURES.items():
            if any(of[name] is not None for of in of_models):
                shown = [_with_interval(of[name], of["intervals"].get(name), digits) for of in of_models]
                cells.append([first["corpus"], heading, *shown])
        if any(of["difference"] is not None for of in of_models):
            shown = [_with_interval(*_difference(of), 4, sign="+") for of in of_models]
            cells.append([first["corpus"], f"loss - {names[0]}", *shown])
        for name, row in zip(names, rows, strict=True):
            if row["harness"] is not None:
                found = row["harness"][number]["figures"]
                told = ", ".join(f"{figure} {_figure(value)}" for figure, value in found.items())
                protocols.append(f"{first['corpus']}, {name} by lm-evaluation-harness{_windows(first)}: {told}")
        size = f"{first['num_tokens']:,} tokens, {first['num_units']:,} units ({first['interval_unit']})"
        protocols.append(f"{first['corpus']} ({first['source']}; {size}): {first['protocol']}")
    if bootstrap["resamples"]:
        settings = f"{bootstrap['resamples']:,} resamples of units, seed {bootstrap['seed']}"
        protocols.append(
            f"[{100 * bootstrap['level']:g}% intervals] by bootstrap: {settings}; of a loss - loss, of pairs."
        )
    return [_aligned(cells, left=2), protocols]


def _windows(figures: Row) -> str:
    """What the harness reads together, which is not what ours reads where windows overlap."""
    window = figures["window_tokens"]
    return (
        f", at most {window} tokens read"
        if figures["mode"] == "examples"
        else f", windows of {window}, stride {window}"
    )


def _short(names: Sequence[str]) -> list[str]:
    """Names of models without the folders that do not tell them apart: they head columns."""
    parts = [name.rstrip("/").split("/") for name in names]
    for kept in range(1, max(map(len, parts))):
        short = ["/".join(part[-kept:]) for part in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def _difference(figures: Row) -> tuple[float | None, list[float] | None]:
    of = figures["difference"]
    return (None, None) if of is None else (of["loss_nats"], of["intervals"].get("loss_nats"))


def _texts(rows: Sequence[Row]) -> list[list[str]]:
    parts = []
    for number, text in enumerate(rows[0]["texts"]):
        pairs = [(row, row["texts"][number]) for row in rows]
        parts.append([str(text["text"]), *_aligned(_cells(pairs, {"bits_per_byte": "bits/byte", "ece": "ECE"}))])
    return parts


def _cache(rows: Sequence[Row]) -> list[list[str]]:
    cache = rows[0]["cache"]
    if cache is None:
        return []
    names = {"ece": "ECE", "kl_to_teacher": "KL", "agreement": "agreement", "overlap": "overlap"}
    header, *cells = _cells([(row, row["cache"]) for row in rows], names)
    teacher = ["(the teacher)", "", cells[0][2], _figure(cache["teacher_loss"])]
    teacher += [_figure(cache["teacher_perplexity"], 2), *[""] * (len(header) - 5)]
    told = KL_WORDS[cache["kl_is"]].format(overlap="overlap")
    place = f"{cache['cache']}, {told} at temperature {cache['temperature']:g}"
    return [[place, *_aligned([header, teacher, *cells]), *_cache_intervals(rows)]]


def _cache_intervals(rows: Sequence[Row]) -> list[str]:
    names = {"loss_nats": "loss", "perplexity": "perplexity", "ece": "ECE", "kl_to_teacher": "KL"}
    names |= {"agreement": "agreement", "overlap": "overlap"}
    found = [row["cache"]["intervals"] for row in rows]
    if not any(found):
        return []
    cells = [["intervals, by block", *names.values()]]
    for row, intervals in zip(rows, found, strict=True):
        cells.append([row["name"], *(_range(intervals.get(name)) for name in names)])
    return _aligned(cells)


def _range(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"[{interval[0]:,.4f}, {interval[1]:,.4f}]"


def _speed(rows: Sequence[Row]) -> list[list[str]]:
    if rows[0]["speed"] is None:
        return []
    first = rows[0]["speed"]
    header = ["model", "parameters", "weights MB", "prefill tokens/s", "times", "decode tokens/s", "times"]
    cells = [[*header, "first token ms", "token ms", "peak MB"]]
    for row in rows:
        speed = row["speed"]
        times = {part: f"{speed[part] / first[part]:.2f}" for part in ("prefill_tokens_per_s", "decode_tokens_per_s")}
        peak = "-" if speed["peak_bytes"] is None else f"{speed['peak_bytes'] / 1e6:,.0f}"
        cells.append(
            [
                row["name"],
                f"{row['parameters']:,}",
                f"{row['file_bytes'] / 1e6:,.1f}",
                f"{speed['prefill_tokens_per_s']:,.0f}",
                times["prefill_tokens_per_s"],
                f"{speed['decode_tokens_per_s']:,.1f}",
                times["decode_tokens_per_s"],
                f"{speed['first_token_s'] * 1e3:,.1f}",
                f"{speed['token_s'] * 1e3:,.1f}",
                peak,
            ]
        )
    about = f"generation, batch of 1, after {first['prompt_tokens']} tokens; times: those of {rows[0]['name']}"
    return [[about, *_aligned(cells)]]


def _samples(rows: Sequence[Row]) -> list[list[str]]:
    parts = []
    for number, sample in enumerate(rows[0]["samples"]):
        texts = [f"{row['name']}: {_printable(row['samples'][number]['text'])}" for row in rows]
        parts.append([f"after {_printable(sample['prompt'])!r}", *texts])
    return parts


def _printable(text: str) -> str:
    """On one line, and without what a terminal would take for a command."""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def _cells(pairs: list[tuple[Row, Row]], more: dict[str, str]) -> list[list[str]]:
    """A header, and one line for each pair of a model's row and its figures; ``more`` maps figures to headings."""
    is_timed = "tokens_per_s" in pairs[0][1]
    header = ["model", "parameters", "tokens", "loss", "perplexity", *more.values()]
    cells = [[*header, "tokens/s"] if is_timed else header]
    for row, of in pairs:
        common = [row["name"], f"{row['parameters']:,}", f"{of['num_tokens']:,}"]
        figures = [_figure(of["loss_nats"]), _figure(of["perplexity"], 2), *(_figure(of[name]) for name in more)]
        cells.append([*common, *figures, *([f"{of['tokens_per_s']:,.0f}"] if is_timed else [])])
    return cells


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _with_interval(value: float | None, interval: list[float] | None, digits: int, sign: str = "") -> str:
    if value is None:
        return "-"
    shown = [f"{number:{sign},.{digits}f}" for number in (value, *(interval or ()))]
    return shown[0] if interval is None else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _aligned(cells: list[list[str]], left: int = 1) -> list[str]:
    """Columns of equal width, the first ``left`` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return [
        "  ".join(to(cell, width) for to, cell, width in zip(align, row, widths, strict=True)).rstrip() for row in cells
    ]
