"""From what a probe timed on this machine to rates: measured figures in the formula's place.

In: the answers of ``pipeline.plan.probe`` and ``train.probe``. Out: ``Rates``, and what was timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.encoding_config import used_settings
from pipeline.plan.cache_size import CacheSize
from pipeline.plan.children import Answer
from pipeline.plan.config import PlanConfig
from pipeline.plan.rates import LEFT_OUT, ONLINE, Assumption, Cost, Rates, StudentRates, counted_by, online

STAND_IN_TEXT = "python-docs:train"
"""Text of a probe where only a number of tokens was given: the interpreter's own documentation, which is there."""
_MEASURED = "measured on this machine"
_BUSY_SHARE = 0.9
"""Below this share of its cores, a probe was not alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What was timed."""

    capture: dict[str, Any]
    capture_wall_s: float
    """Of the whole process."""
    students: tuple[Answer, ...]

    def facts(self) -> dict[str, Any]:
        """All of it, as plain JSON values."""
        return {
            "capture": self.capture | {"wall_s": self.capture_wall_s},
            "students": [answer.facts | {"wall_s": answer.wall_s} for answer in self.students],
            "seconds": self.capture_wall_s + sum(answer.wall_s for answer in self.students),
            "cpu_share": min(self.capture["cpu_share"], *(answer.facts["cpu_share"] for answer in self.students)),
        }


def capture_settings(config: PlanConfig, out: Path) -> dict[str, Any]:
    """Settings of the capture that is planned, for ``CaptureConfig``, as plain JSON values."""
    shared = ("temperatures", "block_tokens", "hidden_window", "shard_blocks", "dtype", "text_field", "split")
    settings = config.model_dump(mode="json", include={*shared, "encoding"})
    if config.hidden_window:
        settings["hidden_dtype"] = config.hidden_dtype
    given = used_settings(config.encoding) & config.model_fields_set
    settings |= config.model_dump(mode="json", include=given)
    return settings | {
        "teacher": config.teacher,
        "text": list(config.text or (STAND_IN_TEXT,)),
        "batch_blocks": config.capture_batch_blocks,
        "out": str(out),
    }


def measured_rates(
    config: PlanConfig,
    probed: Probed,
    teacher: Cost,
    students: Sequence[tuple[str, Cost, Any]],
    *,
    learnt_tokens: int,
    size: CacheSize,
) -> Rates:
    """Rates of this machine; ``students`` are a name, a cost and settings of training."""
    capture = probed.capture
    token_s = capture["token_s"]
    # The last shard's commit and all that is done once stay with what is done once.
    fixed_s = probed.capture_wall_s - capture["warm_up_s"] - sum(capture["batch_s"]) - capture["create_s"]
    learning_s = capture["create_s"] - capture["learnt_batch_tokens"] * token_s
    # What a real shard holds more than the probe's; two of them are in memory.
    missing_blocks = max(0, config.shard_blocks - capture["blocks"])
    raw_block = sum(size.raw_bytes_per_token.values()) * config.block_tokens
    kept_states = max(0, learnt_tokens - capture["learnt_batch_tokens"]) * 3 * 4 * size.width
    grows = 2 * missing_blocks * raw_block + kept_states if capture["device"] == "cpu" else 0.0
    # The output head's product, which hooks cannot see, in proportion.
    body = teacher.forward_flops - 2.0 * teacher.vocab_size * size.width
    forward_s = capture["forward_token_s"] * teacher.forward_flops / body
    text_s = 1 / capture["text_tokens_per_s"] if capture["text_tokens_per_s"] else 0.0
    weight_bytes = teacher.parameters * (4 if capture["dtype"] == "float32" else 2)
    return Rates(
        capture_token_s=token_s,
        learnt_tokens=learnt_tokens if capture["learnt_batch_tokens"] else 0,
        learning_s=max(0.0, learning_s),
        capture_fixed_s=max(0.0, fixed_s),
        capture_peak_bytes=round(capture["peak_bytes"] + grows),
        text_token_s=text_s,
        students=tuple(
            _student(name, train, answer, config.block_tokens, forward_s, weight_bytes, capture["teacher_load_s"])
            for (name, _, train), answer in zip(students, probed.students, strict=True)
        ),
    )


def _student(
    name: str, train: Any, answer: Answer, block_tokens: int, teacher_s: float, teacher_bytes: int, load_s: float
) -> StudentRates:
    told = answer.facts
    step_s, step_tokens, optimizer_s = told["step_s"], told["step_tokens"], told["optimizer_s"]
    # A first step also pays for what is set up once.
    later = list(zip(step_s, step_tokens, strict=True))[1:] or [(step_s[0], step_tokens[0])]
    pass_s = statistics.median([max(0.0, s - optimizer_s) / tokens for s, tokens in later])
    # One step of the optimizer, whatever a step holds.
    once_a_step = optimizer_s / (train.batch_blocks * train.accumulate * block_tokens)
    token_s = pass_s + once_a_step
    first_s = min(step_s[0], pass_s * step_tokens[0] + optimizer_s)
    fixed_s = max(0.0, answer.wall_s - told["extra_s"] - sum(step_s[1:]) - first_s)
    return StudentRates(
        name=name,
        parameters=told["parameters"],
        token_s=token_s,
        cross_entropy_token_s=told["cross_entropy_token_s"],
        fixed_s=fixed_s,
        peak_bytes=told["peak_bytes"],
        epochs=train.epochs,
        **online(
            step_token_s=token_s,
            teacher_token_s=teacher_s,
            fixed_s=fixed_s,
            load_s=load_s,
            peak_bytes=told["peak_bytes"],
            teacher_bytes=teacher_bytes,
        ),
    )


def measured_assumptions(config: PlanConfig, probed: Probed, teacher: Cost) -> list[Assumption]:
    """What was timed, and what a plan still takes for granted."""
    capture = probed.capture
    batches = f"{_MEASURED}: median of {len(capture['batch_s'])} batches of {capture['batch_tokens']:,} tokens"
    text = ", ".join(Path(name).name for name in config.text) or f"{STAND_IN_TEXT}, as no text was given"
    told = [
        Assumption(name="device", value=capture["device"], unit=capture["dtype"], source=_MEASURED),
        Assumption(name="threads", value=capture["threads"], unit="", source=_MEASURED),
        Assumption(name="text of the probe", value=text, unit="", source="given" if config.text else "stand-in"),
        Assumption(name="capture", value=round(1 / capture["token_s"], 1), unit="tokens/s", source=batches),
        Assumption(
            name="teacher's forward pass",
            value=round(1 / capture["forward_token_s"], 1),
            unit="tokens/s, without its output head",
            source=f"{_MEASURED}, by hooks",
        ),
        Assumption(
            name="bytes of arrays", value=capture["blocks"], unit="blocks", source=f"{_MEASURED}: files of real shards"
        ),
        Assumption(name="commits, synced", value=round(capture["commit_s"], 3), unit="s, all", source=_MEASURED),
    ]
    for number, answer in enumerate(probed.students, 1):
        steps = len(answer.facts["step_s"])
        source = f"{_MEASURED}: {steps} steps of train-student" + (", the first left out" if steps > 1 else "")
        rate = sum(answer.facts["step_tokens"]) / sum(answer.facts["step_s"])
        told.append(Assumption(name=f"student {number}", value=round(rate, 1), unit="tokens/s", source=source))
    share = probed.facts()["cpu_share"]
    told += [
        Assumption(
            name="share of its cores that the probe had",
            value=round(share, 2),
            unit="CPU time / (wall clock x threads)",
            source=_MEASURED + ("" if share >= _BUSY_SHARE else "; other work slows this machine, or threads wait"),
        ),
        Assumption(
            name="online distillation",
            value=ONLINE,
            unit="",
            source="sum of all as measured; the output head's product in proportion to its FLOPs, "
            + counted_by([("teacher", teacher)]),
        ),
        LEFT_OUT,
    ]
    return told
