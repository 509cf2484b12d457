"""Held-out loss against hours, as a model of it: parameters and tokens come in, nats go out, with where they come from.

Without runs of one's own it is a published law of models trained from scratch on the text alone, with repeated epochs
counted for less. It knows nothing of what a teacher adds or of copied layers, so all ways have the loss of the tokens
that they see. With runs (``--runs``) the law's terms are scaled and shifted to fit them, for distilled students and for
those of the text alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.errors import BadInputError
from pipeline.plan.rates import Rates, StudentRates
from pipeline.plan.totals import WAYS, most_tokens, once_hours, student_hours

_SOURCE = "Besiroglu et al. 2024 (arXiv 2404.10102), fitted again to the runs of Hoffmann et al. 2022"
REPEATS = 15.39
"""Epochs after which repeated text has lost most of its worth: R*_D of Muennighoff et al. 2023 (arXiv 2305.16264)."""
_LEAST_TOKENS = 1e8
"""Runs that the law was fitted to saw more; below, it gives losses above those of guessing."""
_FITTED = 2
"""Figures of the law that runs give: level and scale."""
_GRID = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Hours of the curves, as shares of the plan's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """loss = shift + scale * (A / N^alpha + B / D^beta) in nats, N parameters, D tokens."""

    shift: float = 1.8172
    scale: float = 1.0
    a: float = 482.01
    alpha: float = 0.3478
    b: float = 2085.43
    beta: float = 0.3658
    least_tokens: float = _LEAST_TOKENS
    most_tokens: float = math.inf
    source: str = _SOURCE
    runs: int = 0
    rms_nats: float | None = None
    """How far the runs are from their fit; None of the published law, and of runs that any line would meet."""

    def term(self, parameters: int, tokens: float) -> float:
        """What is scaled."""
        return float(self.a * parameters**-self.alpha + self.b * tokens**-self.beta)

    def loss(self, parameters: int, tokens: int, epochs: int) -> float | None:
        """Nats on held-out text; None outside the tokens that the law was fitted to."""
        worth = effective_tokens(tokens, epochs)
        if not self.least_tokens <= worth <= self.most_tokens:
            return None
        return self.shift + self.scale * self.term(parameters, worth)

    def facts(self) -> dict[str, Any]:
        """The law as plain JSON values."""
        known = asdict(self)
        return known | {"most_tokens": None if math.isinf(self.most_tokens) else self.most_tokens}


PUBLISHED = Law()


def effective_tokens(tokens: float, epochs: float) -> float:
    """Fresh tokens that so many epochs of ``tokens`` are worth."""
    return tokens * (1 + REPEATS * -math.expm1(-(epochs - 1) / REPEATS))


def laws(runs: Sequence[Path]) -> dict[str, Law | None]:
    """The law of each way, fitted to ``runs`` where there are some; None of a way that no run went.

    Raises BadInputError ``not-a-family``, ``too-few-runs`` where they measured nothing, or ``other-held-out`` where
    they were measured on unlike text.
    """
    if not runs:
        return dict.fromkeys(WAYS, PUBLISHED)
    points = [point for run in runs for point in _points(run)]
    if not points:
        expected = "at least one finished student with a held-out loss"
        raise BadInputError("too-few-runs", ", ".join(map(str, runs)), expected=expected)
    _refuse_other_text(points)
    taught = [point for point in points if not point.is_control]
    alone = [point for point in points if point.is_control]
    source = "fitted to " + ", ".join(run.name for run in runs)
    from_teacher, from_text = (fitted(of, source) if of else None for of in (taught, alone))
    return {"cached": from_teacher, "online": from_teacher, "cross_entropy": from_text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One student's loss."""

    parameters: int
    tokens: float
    """Effective ones: those of repeated epochs count for what they are worth."""
    loss: float
    is_control: bool
    run: str = ""
    held_out: str = ""
    """What it was measured on; losses on unlike text are no points of one law."""


def _refuse_other_text(points: Sequence[Point]) -> None:
    first = points[0]
    for point in points:
        if point.held_out != first.held_out:
            expected, hint = (
                f"that of {first.run}: {first.held_out}",
                "give runs that were measured on one held-out text",
            )
            raise BadInputError("other-held-out", point.run, expected=expected, found=point.held_out, hint=hint)


def fitted(points: Sequence[Point], source: str) -> Law:
    """Shift and scale of the published terms by least squares; one kind of run gives the shift alone."""
    terms = np.array([PUBLISHED.term(point.parameters, point.tokens) for point in points])
    losses = np.array([point.loss for point in points])
    scale = 0.0
    if len(points) > 1 and np.ptp(terms) > 1e-6 * terms.mean():
        # More text and more parameters never hurt: where noise says so, only the mean is known.
        scale = max(0.0, float(np.polyfit(terms, losses, 1)[0]))
    shift = float(np.mean(losses - scale * terms))
    tokens = [point.tokens for point in points]
    return replace(
        PUBLISHED,
        shift=shift,
        scale=scale,
        # No further than a factor of four beyond what was run.
        least_tokens=min(tokens) / 4,
        most_tokens=4.0 * max(tokens),
        source=source,
        runs=len(points),
        rms_nats=float(np.sqrt(np.mean((shift + scale * terms - losses) ** 2))) if len(points) > _FITTED else None,
    )


def _points(run: Path) -> list[Point]:
    """The students of a family that are done and were measured."""
    path = run.expanduser() / "family.json"
    found = []
    try:
        rows = json.loads(path.read_bytes())["students"]
        for row in rows:
            evaluation = row["evaluation"] or {}
            measured = evaluation.get("cache") or next(iter(evaluation.get("texts") or ()), None)
            if row["status"] == "done" and measured:
                epochs = max(1.0, float(row["training_epochs"]))
                found.append(
                    Point(
                        parameters=int(row["parameters"]),
                        tokens=effective_tokens(int(row["training_tokens"]) / epochs, epochs),
                        loss=float(measured["loss_nats"]),
                        is_control=row["control_of"] is not None,
                        run=str(run),
                        held_out=_held_out(row["evaluation_of"], measured, of_cache=bool(evaluation.get("cache"))),
                    )
                )
    except OSError:
        raise BadInputError(
            "not-a-family", run, expected="family.json, as train-student --students leaves it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        hint = "the same train-student command writes a report anew, without training again what is done"
        raise BadInputError("not-a-family", path, expected="what train-student --students writes", hint=hint) from None
    return found


def _held_out(evaluation_of: Mapping[str, Any], measured: Mapping[str, Any], *, of_cache: bool) -> str:
    """The cache by its fingerprint, a text by its file's size and time and how it was cut."""
    if of_cache:
        return f"cache {str(evaluation_of['cache'])[:16]}"
    settings = evaluation_of["settings"]
    cut = [settings[name] for name in ("block_tokens", "limit_tokens", "limit_bytes")]
    state = [*evaluation_of["texts"][0], *cut, measured["num_tokens"]]
    return f"text {Path(measured['text']).name} {' '.join(map(str, state))}"


def curve(rates: Rates, tokens: int, by_way: Mapping[str, Law | None]) -> list[dict[str, Any]]:
    """Hours and mean loss of each way for the first 1 to n students, with what is planned for."""
    rows = []
    once = once_hours(rates, tokens)
    for count in range(1, len(rates.students) + 1):
        chosen = rates.students[:count]
        ways = {}
        for way in WAYS:
            hours = once.of(way) + sum(student_hours(student, tokens).of(way) for student in chosen)
            losses = [_loss(by_way[way], student, tokens) for student in chosen]
            ways[way] = {"hours": hours, "loss": _mean(losses)}
        rows.append({"students": count, "ways": ways})
    return rows


def loss_by_hours(
    rates: Rates, hours: float, by_way: Mapping[str, Law | None], block_tokens: int
) -> list[dict[str, Any]]:
    """For 1 to n students and a grid around ``hours``: tokens that fit in these hours, and the mean loss of them."""
    rows = []
    for count in range(1, len(rates.students) + 1):
        part = replace(rates, students=rates.students[:count])
        for share in _GRID:
            ways = {}
            for way in WAYS:
                fit = most_tokens(part, way, share * hours, block_tokens)
                losses = [_loss(by_way[way], student, fit) for student in part.students if fit]
                ways[way] = {"tokens": fit, "loss": _mean(losses)}
            rows.append({"students": count, "hours": share * hours, "ways": ways})
    return rows


def _loss(law: Law | None, student: StudentRates, tokens: int) -> float | None:
    return None if law is None else law.loss(student.parameters, tokens, student.epochs)


def _mean(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known and len(known) == len(losses) else None
