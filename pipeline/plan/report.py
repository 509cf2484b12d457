"""The report of a plan: rates and sizes come in, plain JSON values and lines for people go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.inspect import describe_encoding
from pipeline.plan.cache_size import RATIO_SOURCE, CacheSize
from pipeline.plan.config import PlanConfig
from pipeline.plan.curve import REPEATS, Law, curve, loss_by_hours
from pipeline.plan.devices import CPU, Device, as_facts
from pipeline.plan.rates import Assumption, Rates
from pipeline.plan.totals import WAYS, affordable, break_even, costs, student_hours, total_hours

FORMAT = "kdpipe-plan"
_STORED = "stored bytes of "
_WORDS = {"cached": "cached", "online": "online", "cross_entropy": "cross-entropy"}


def facts_of(
    config: PlanConfig,
    rates: Rates,
    size: CacheSize,
    told: Sequence[Assumption],
    *,
    device: Device | None,
    num_devices: int,
    teacher: Any,
    students: Sequence[Mapping[str, Any]],
    tokens: int,
    certainty: str,
    laws: Mapping[str, Law | None],
) -> dict[str, Any]:
    """One device's plan; ``device`` is None where this machine was measured."""
    hours = total_hours(rates, tokens)
    at = config.budget_hours if config.budget_hours is not None else hours.cached
    memory_bytes = None if device is None or device.memory_gb is None else 1e9 * device.memory_gb
    most_bytes = max(rates.capture_peak_bytes, *(student.peak_bytes for student in rates.students))
    most_online_bytes = max(student.online_peak_bytes for student in rates.students)
    measured = device is None
    # A machine is paid for once, however many of its threads share the work.
    billed = 1 if device is None or device.name == CPU else num_devices
    assumptions = [asdict(one) for one in told]
    source = "R*_D of Muennighoff et al. 2023 (arXiv 2305.16264)"
    unit = "epochs after which it has lost most of its worth"
    assumptions.append({"name": "repeated text", "value": REPEATS, "unit": unit, "source": source})
    if not measured:
        source = RATIO_SOURCE
        assumptions += [
            {
                "name": f"{_STORED}{name}",
                "value": round(stored / raw, 2),
                "unit": "of the raw ones",
                "source": source,
            }
            for name, raw in size.raw_bytes_per_token.items()
            if raw >= 0.1 and (stored := size.bytes_per_token[name])
        ]
    return {
        "format": FORMAT,
        "format_version": 1,
        "calibrated": measured,
        "device": None if device is None else as_facts(device),
        "num_devices": num_devices,
        "teacher": {
            "name": config.teacher,
            "model_type": teacher.model_type,
            "parameters": teacher.parameters,
            "vocab_size": teacher.vocab_size,
            "forward_flops_per_token": teacher.forward_flops,
        },
        "cache": {
            "tokens": tokens,
            "tokens_certainty": certainty,
            "encoding": size.encoding.model_dump(mode="json"),
            "bytes": size.bytes(tokens),
            "bytes_per_token": sum(size.bytes_per_token.values()),
            "bytes_by_array": {name: round(tokens * stored) for name, stored in size.bytes_per_token.items()},
            "table_bytes": sum(size.table_bytes.values()),
            "bytes_by_table": size.table_bytes,
            "shards": size.num_shards,
        },
        "capture": {
            "hours": rates.capture_s(tokens) / 3600,
            "tokens_per_s": 1 / rates.capture_token_s,
            "fixed_s": rates.capture_fixed_s,
            "learning_s": rates.learning_s,
            "learnt_tokens": min(tokens, rates.learnt_tokens),
            "peak_bytes": rates.capture_peak_bytes,
        },
        "students": [
            _student(student, described, tokens) for student, described in zip(rates.students, students, strict=True)
        ],
        "totals": {f"{way}_hours": hours.of(way) for way in WAYS} | costs(config, hours, billed),
        "break_even": break_even(rates, tokens),
        "budget": _budget(config, rates, hours.cached),
        "fits_in_memory": None if memory_bytes is None else most_bytes <= memory_bytes,
        "online_fits_in_memory": None if memory_bytes is None else most_online_bytes <= memory_bytes,
        "curve": curve(rates, tokens, laws),
        "loss_by_hours": loss_by_hours(rates, at, laws, config.block_tokens),
        "laws": {way: None if law is None else law.facts() for way, law in laws.items()},
        "assumptions": assumptions,
    }


def _student(student: Any, described: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    hours = student_hours(student, tokens)
    seen = tokens * student.epochs
    return {
        "name": student.name,
        "parameters": student.parameters,
        "forward_flops_per_token": described["cost"].forward_flops,
        "settings": described["settings"],
        "epochs": student.epochs,
        "hours_per_epoch": tokens * student.token_s / 3600,
        "hours": hours.cached,
        "tokens_per_s": 1 / student.token_s,
        "tokens": seen,
        "fixed_s": student.fixed_s,
        "peak_bytes": student.peak_bytes,
        "online": {
            "hours": hours.online,
            "tokens_per_s": 1 / student.online_token_s,
            "peak_bytes": student.online_peak_bytes,
        },
        "cross_entropy": {"hours": hours.cross_entropy, "tokens_per_s": 1 / student.cross_entropy_token_s},
    }


def _budget(config: PlanConfig, rates: Rates, hours: float) -> dict[str, Any] | None:
    if config.budget_hours is None:
        return None
    return affordable(config, rates, config.budget_hours) | {"fits": hours <= config.budget_hours}


def describe(facts: Mapping[str, Any]) -> list[str]:
    """Lines for people."""
    cache, capture, device = facts["cache"], facts["capture"], facts["device"]
    where = (
        "this machine, measured" if facts["calibrated"] else f"{facts['num_devices']} x {device['name']}, by formula"
    )
    teacher = facts["teacher"]
    lines = [
        f"plan      {where}",
        f"teacher   {teacher['name']}: {teacher['model_type']}, {teacher['parameters']:,} parameters,"
        f" {teacher['forward_flops_per_token'] / 1e9:,.3f} GFLOPs a token",
        f"tokens    {cache['tokens']:,} ({cache['tokens_certainty']}) in {cache['shards']:,} shards",
        f"targets   {describe_encoding(cache['encoding'])}",
        f"cache     {_bytes(cache['bytes'])}, {cache['bytes_per_token']:.1f} bytes/token"
        + (f", {_bytes(cache['table_bytes'])} of it once" if cache["table_bytes"] else ""),
    ]
    arrays = cache["bytes_by_array"] | cache["bytes_by_table"]
    lines += [f"  {name:<22}{_bytes(size):>10}" for name, size in arrays.items()]
    lines += [
        f"capture   {_hours(capture['hours'])} at {capture['tokens_per_s']:,.0f} tokens/s,"
        f" {_bytes(capture['peak_bytes'])} of memory",
        "",
        *_table(
            [
                "student",
                "parameters",
                "epochs",
                "an epoch",
                "training",
                "online",
                "cross-entropy",
                "tokens/s",
                "memory",
            ],
            [
                [
                    one["name"],
                    f"{one['parameters']:,}",
                    f"{one['epochs']:,}",
                    _hours(one["hours_per_epoch"]),
                    _hours(one["hours"]),
                    _hours(one["online"]["hours"]),
                    _hours(one["cross_entropy"]["hours"]),
                    f"{one['tokens_per_s']:,.0f}",
                    _bytes(one["peak_bytes"]),
                ]
                for one in facts["students"]
            ],
        ),
        "",
        *_totals(facts),
    ]
    if len(facts.get("by_device", ())) > 1:
        lines += ["", *_devices(facts)]
    return [*lines, "", *_curve(facts), "", "assumptions", *_assumptions(facts["assumptions"])]


def _assumptions(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line each, but for what is said of many arrays."""
    ratios = [one for one in told if one["name"].startswith(_STORED)]
    lines = [
        f"  {one['name']}: {_number(one['value'])}{' ' + one['unit'] if one['unit'] else ''} ({one['source']})"
        for one in told
        if one not in ratios
    ]
    if ratios:
        shares = ", ".join(f"{one['name'].removeprefix(_STORED)} {one['value']:g}" for one in ratios)
        lines.append(f"  {_STORED.strip()} raw ones: {shares} ({ratios[0]['source']})")
    return lines


def _totals(facts: Mapping[str, Any]) -> list[str]:
    totals, even, budget = facts["totals"], facts["break_even"], facts["budget"]
    rows = [["hours", *(_hours(totals[f"{way}_hours"]) for way in WAYS)]]
    for name, heading, form in (("money", "money", ",.2f"), ("kwh", "kWh", ",.2f"), ("co2_kg", "kg of CO2", ",.2f")):
        if totals[name] is not None:
            rows.append([heading, *(format(totals[name][way], form) for way in WAYS)])
    lines = _table(["in all", *(_WORDS[way] for way in WAYS)], rows)
    students, epochs = even["words"]["students"], even["words"]["epochs"]
    lines += ["", f"break-even with online distillation: students {students}, epochs {epochs}"]
    if budget is not None:
        fits = "fits" if budget["fits"] else "does not fit"
        lines.append(
            f"budget    {budget['hours']:g} hours: this plan {fits}; tokens affordable"
            f" {budget['tokens_affordable']:,} cached, {budget['tokens_affordable_online']:,} online,"
            f" {budget['tokens_affordable_cross_entropy']:,} cross-entropy"
        )
    return [*lines, *_too_large(facts)]


def _too_large(facts: Mapping[str, Any]) -> list[str]:
    """What does not fit the device's memory."""
    device = facts["device"]
    if device is None or device["memory_gb"] is None:
        return []
    parts = {"the capture": facts["capture"]["peak_bytes"]}
    for one in facts["students"]:
        parts |= {one["name"]: one["peak_bytes"], f"{one['name']}, online": one["online"]["peak_bytes"]}
    above = [f"{name} ({_bytes(size)})" for name, size in parts.items() if size > 1e9 * device["memory_gb"]]
    if not above:
        return []
    most = f"more than the {device['memory_gb']:g} GB of {device['name']}"
    return [
        f"memory    {most}: {', '.join(above)}",
        "          smaller batches, or activation checkpointing, take less; weights and optimizer state stay",
    ]


def _devices(facts: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            one["device"],
            _hours(one["capture_hours"]),
            _hours(sum(one["student_hours"])),
            *(_hours(one["totals"][f"{way}_hours"]) for way in WAYS),
            {True: "yes", False: "no", None: "-"}[one["fits_in_memory"]],
        ]
        for one in facts["by_device"]
    ]
    return _table(["device", "capture", "students", *(f"all, {_WORDS[way]}" for way in WAYS), "fits memory"], rows)


def _curve(facts: Mapping[str, Any]) -> list[str]:
    laws = facts["laws"]
    rows = [
        [
            str(row["students"]),
            *(_hours(row["ways"][way]["hours"]) for way in WAYS),
            *(_loss(row["ways"][way]["loss"]) for way in WAYS),
        ]
        for row in facts["curve"]
    ]
    headings = ["students", *(f"hours, {_WORDS[way]}" for way in WAYS), *(f"loss, {_WORDS[way]}" for way in WAYS)]
    lines = ["held-out loss, a MODEL", *_table(headings, rows)]
    distinct: list[Mapping[str, Any]] = []
    for law in laws.values():
        if law is not None and law not in distinct:
            distinct.append(law)
    for law in distinct:
        ways = [way for way in WAYS if laws[way] == law]
        lines.append(f"{', '.join(_WORDS[way] for way in ways)}: {_law(law)}")
        if any(row["ways"][way]["loss"] is None for row in facts["curve"] for way in ways):
            most = "" if law["most_tokens"] is None else f" to {law['most_tokens']:,.0f}"
            lines.append(f"  -: outside the law, which holds from {law['least_tokens']:,.0f}{most} tokens")
    if missing := [_WORDS[way] for way in WAYS if laws[way] is None]:
        lines.append(f"-: no run of {', '.join(missing)} to fit a law to")
    if not any(law["runs"] for law in distinct):
        lines.append(
            "the law is of models trained from scratch on text; it says nothing of what a teacher adds: give --runs"
        )
    return lines


def _law(law: Mapping[str, Any]) -> str:
    terms = f"{law['a']:g} / N^{law['alpha']:g} + {law['b']:g} / D^{law['beta']:g}"
    formula = f"{law['shift']:.4f} + {law['scale']:.4g} x ({terms})"
    if not law["runs"]:
        return f"{formula}, a published law ({law['source']})"
    off = "too few runs to tell how far off" if law["rms_nats"] is None else f"off by {law['rms_nats']:.3f} nats"
    return f"{formula}, {law['source']}: {law['runs']} {'run' if law['runs'] == 1 else 'runs'}, {off}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in [header, *rows]
    ]


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _number(value: object) -> str:
    return (
        f"{value:,g}"
        if isinstance(value, float) and abs(value) < 1e6
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def _hours(hours: float) -> str:
    if hours * 3600 < 99.5:
        return f"{hours * 3600:.1f} s"
    return f"{hours * 60:.1f} min" if hours < 1.995 else f"{hours:,.1f} h"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:,.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError
