"""From rates to what is decided by: hours of each way, money, the break-even, and what a budget affords.

In: ``Rates`` and an amount of text. Out: hours of three ways to the same students: from a cache, with the teacher in
memory (online), and from the text alone (cross-entropy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pipeline.plan.config import PlanConfig
from pipeline.plan.rates import Rates, StudentRates

WAYS = ("cached", "online", "cross_entropy")
FROM_THE_FIRST, NEVER = "from the first", "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Hours of each way."""

    cached: float
    online: float
    cross_entropy: float

    def of(self, way: str) -> float:
        """Hours of the way of that name."""
        hours: float = getattr(self, way)
        return hours


def student_hours(student: StudentRates, tokens: int, epochs: int | None = None) -> Hours:
    """Of one student, its command's start and export included; the cache is there already."""
    seen = tokens * (student.epochs if epochs is None else epochs)
    return Hours(
        cached=(student.fixed_s + seen * student.token_s) / 3600,
        online=(student.online_fixed_s + seen * student.online_token_s) / 3600,
        cross_entropy=(student.fixed_s + seen * student.cross_entropy_token_s) / 3600,
    )


def once_hours(rates: Rates, tokens: int) -> Hours:
    """What is done before the first student: the capture, or text into blocks."""
    text = tokens * rates.text_token_s / 3600
    return Hours(cached=rates.capture_s(tokens) / 3600, online=text, cross_entropy=text)


def total_hours(rates: Rates, tokens: int) -> Hours:
    """Of all students, and of what is done before."""
    parts = [once_hours(rates, tokens), *(student_hours(student, tokens) for student in rates.students)]
    return Hours(**{way: sum(part.of(way) for part in parts) for way in WAYS})


def break_even(rates: Rates, tokens: int) -> dict[str, Any]:
    """From how many students (alike to the mean of these), and from how many epochs of these, a cache takes less time
    than the teacher in memory; None where it never does."""
    once, students = once_hours(rates, tokens), rates.students
    paid = Fraction(once.cached) - Fraction(once.online)
    of_each = [student_hours(student, tokens) for student in students]
    unread = _saved([student_hours(student, tokens, epochs=0) for student in students])
    by_epoch = _saved([student_hours(student, tokens, epochs=1) for student in students]) - unread
    counts = {
        "students": _first_above(paid, _saved(of_each) / len(students)),
        "epochs": _first_above(paid - unread, by_epoch),
    }
    words = {name: NEVER if n is None else FROM_THE_FIRST if n == 1 else f"from {n:,}" for name, n in counts.items()}
    return {**counts, "words": words, "against": "online"}


def _saved(students: Sequence[Hours]) -> Fraction:
    """Hours by which online distillation of all of them takes longer."""
    return sum((Fraction(hours.online) - Fraction(hours.cached) for hours in students), Fraction())


def _first_above(paid: Fraction, saved: Fraction) -> int | None:
    """The smallest n >= 1 with n * saved > paid."""
    if saved <= 0:
        # Nothing is saved by more of them: what one does not bring, none will.
        return 1 if saved > paid else None
    return max(1, math.floor(paid / saved) + 1)


def affordable(config: PlanConfig, rates: Rates, hours: float) -> dict[str, Any]:
    """Tokens, in whole blocks, that each way can learn from within so many hours, and whether what is planned fits."""
    tokens = {way: most_tokens(rates, way, hours, config.block_tokens) for way in WAYS}
    return {
        "hours": hours,
        "tokens_affordable": tokens["cached"],
        "tokens_affordable_online": tokens["online"],
        "tokens_affordable_cross_entropy": tokens["cross_entropy"],
    }


def most_tokens(rates: Rates, way: str, hours: float, block_tokens: int) -> int:
    """The most whole blocks' tokens that all students of one way can learn from within ``hours``, found by halving; 0
    where not even one block is."""

    def fits(blocks: int) -> bool:
        return total_hours(rates, blocks * block_tokens).of(way) <= hours

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * block_tokens


def costs(config: PlanConfig, hours: Hours, num_devices: int) -> dict[str, Any]:
    """Money, kWh and kg of CO2 of each way, each device paid for; None without the rates that they need."""
    kwh = money = co2_kg = None
    if config.watts is not None:
        kwh = {way: config.watts * num_devices * hours.of(way) / 1000 for way in WAYS}
    if config.price_per_hour is not None or config.price_per_kwh is not None:
        money = {way: (config.price_per_hour or 0.0) * num_devices * hours.of(way) for way in WAYS}
        if config.price_per_kwh is not None and kwh is not None:
            money = {way: money[way] + kwh[way] * config.price_per_kwh for way in WAYS}
    if config.co2_per_kwh is not None and kwh is not None:
        co2_kg = {way: kwh[way] * config.co2_per_kwh for way in WAYS}
    return {"money": money, "kwh": kwh, "co2_kg": co2_kg}
