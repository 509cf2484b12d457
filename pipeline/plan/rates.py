"""What capture and training take for each token and once: by formula, for one device.

In: what models cost, a device, settings. Out: ``Rates``, which a probe gives as well, and the assumptions behind them.
Everything that follows from rates (hours, budgets, break-even) is the same, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.plan.config import PlanConfig
from pipeline.plan.devices import Device

_START_S = 15.0
"""Interpreter, libraries and checks, of each command."""
_STAGED_TOKENS_PER_S = 1e6
_ENCODING_PASSES = {"topk": 6.0, "prototype": 7.0, "hidden": 4.0, "sampled": 10.0, "sparsified": 11.0}
"""Times that a capture reads or writes the float32 logits; docs/RESULTS.md, "Encoding beside the teacher": microseconds
a token by 20, which 4 bytes of 49,152 tokens take at 10 GB/s."""
_PASSES_A_DRAW = 3.0
"""What each residual draw adds."""
_LOSS_PASSES = 12.0
"""Times that training reads or writes the student's float32 logits and their gradient."""
_DENSE_PASSES = 6.0
"""What the teacher's whole distribution adds where it is made beside the student."""
_ADAMW_BYTES = 28.0
"""Read and written for each parameter and step: weight, gradient, two moments."""
_STATE_BYTES = 16.0
"""float32 weight, gradient and two moments of each trained parameter."""
_CHUNK_BYTES = 64 << 20
"""Most of one array of logits; capture and training hold a few at a time."""
_CHUNKS = 4
_LIVE_SHARE = 2.0
"""Layers' worth of activations that live at once where no gradient is wanted."""
_RUNTIME_BYTES = 1 << 30
"""Interpreter, libraries and the device's context."""


class Cost(Protocol):
    """What is asked of a model's cost."""

    @property
    def parameters(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def kept_bytes(self) -> float: ...
    @property
    def forward_flops(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumption:
    """One figure that a plan rests on."""

    name: str
    value: float | int | str
    unit: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRates:
    """One student's seconds; of all ways that learn the same number of tokens."""

    name: str
    parameters: int
    token_s: float
    """From the cache."""
    online_token_s: float
    """With the teacher in memory."""
    cross_entropy_token_s: float
    """From the text alone."""
    fixed_s: float
    """Start, export and whatever else a run takes once."""
    peak_bytes: int
    online_peak_bytes: int
    epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What everything takes on one device, or as many as share the work."""

    capture_token_s: float
    learnt_tokens: int
    """Tokens that are read once more before, at most."""
    learning_s: float
    """What learning from them takes beside reading them."""
    capture_fixed_s: float
    capture_peak_bytes: int
    text_token_s: float
    """Of text into blocks, which cross-entropy and online distillation pay for as well."""
    students: tuple[StudentRates, ...]

    def capture_s(self, tokens: int) -> float:
        """Of a whole capture."""
        read = tokens + min(tokens, self.learnt_tokens)
        return self.capture_fixed_s + self.learning_s + read * self.capture_token_s + tokens * self.text_token_s


def formula_rates(
    config: PlanConfig,
    device: Device,
    teacher: Cost,
    students: Sequence[tuple[str, Cost, Any]],
    *,
    learnt_tokens: int,
    bytes_per_token: float,
    table_bytes: int,
    share: int,
) -> Rates:
    """Rates by FLOPs and bytes; ``students`` are a name, a cost and settings of training, ``share`` devices."""
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device.half_by_default else "float32"
    bandwidth, disk = 1e9 * device.gb_per_s, 1e6 * config.disk_mb_per_s
    weight_bytes = teacher.parameters * (4 if dtype == "float32" else 2)
    batch_tokens = config.capture_batch_blocks * config.block_tokens
    forward_s = teacher.forward_flops / (device.peak_flops(dtype) * device.capture_utilisation)
    forward_s += weight_bytes / batch_tokens / bandwidth
    passes = _ENCODING_PASSES[config.encoding]
    passes += config.residual_draws * _PASSES_A_DRAW if config.encoding == "prototype" else 0.0
    encode_s = passes * 4 * teacher.vocab_size / bandwidth
    activations = teacher.kept_bytes / teacher.layers * _LIVE_SHARE * (1 if dtype == "float32" else 0.5)
    raw_shard = config.shard_blocks * config.block_tokens * bytes_per_token * 2
    capture_peak = (
        weight_bytes
        + batch_tokens * activations
        + _CHUNKS * _CHUNK_BYTES
        + 2 * raw_shard
        + table_bytes
        + _RUNTIME_BYTES
    )
    # Shards are written while the teacher reads the next ones: the slower of both counts.
    token_s = max((forward_s + encode_s) / share, bytes_per_token / disk)
    return Rates(
        capture_token_s=token_s,
        learnt_tokens=learnt_tokens,
        learning_s=table_bytes / disk,
        capture_fixed_s=_START_S + weight_bytes / disk,
        capture_peak_bytes=round(capture_peak),
        text_token_s=1 / _STAGED_TOKENS_PER_S,
        students=tuple(
            _student(
                name,
                cost,
                train,
                device=device,
                teacher_s=forward_s,
                teacher_bytes=weight_bytes,
                bytes_per_token=bytes_per_token,
                block_tokens=config.block_tokens,
                bandwidth=bandwidth,
                disk=disk,
                share=share,
            )
            for name, cost, train in students
        ),
    )


def _student(
    name: str,
    cost: Cost,
    train: Any,
    *,
    device: Device,
    teacher_s: float,
    teacher_bytes: int,
    bytes_per_token: float,
    block_tokens: int,
    bandwidth: float,
    disk: float,
    share: int,
) -> StudentRates:
    precision = train.precision if train.precision != "auto" else "bf16" if device.half_by_default else "fp32"
    step_s = 3 * cost.forward_flops / (device.peak_flops(precision) * device.training_utilisation)
    step_s += _LOSS_PASSES * 4 * cost.vocab_size / bandwidth
    pass_tokens = train.batch_blocks * block_tokens
    step_s += _ADAMW_BYTES * cost.parameters / (pass_tokens * train.accumulate) / bandwidth
    online_s = step_s + teacher_s + _DENSE_PASSES * 4 * cost.vocab_size / bandwidth
    kept = cost.kept_bytes * (1 if precision == "fp32" else 0.5)
    if train.activation_checkpointing:
        kept /= cost.layers
    peak = _STATE_BYTES * cost.parameters + pass_tokens * kept + _CHUNKS * _CHUNK_BYTES + _RUNTIME_BYTES
    return StudentRates(
        name=name,
        parameters=cost.parameters,
        token_s=max(step_s / share, bytes_per_token / disk),
        online_token_s=online_s / share,
        cross_entropy_token_s=step_s / share,
        fixed_s=_START_S + 3 * 4 * cost.parameters / disk,
        peak_bytes=round(peak),
        online_peak_bytes=round(peak + teacher_bytes + _CHUNKS * _CHUNK_BYTES),
        epochs=train.epochs,
    )


def assumptions(config: PlanConfig, device: Device, share: int) -> list[Assumption]:
    """What ``formula_rates`` takes for granted."""
    ours = "docs/RESULTS.md"
    passes = _ENCODING_PASSES[config.encoding]
    return [
        Assumption(name="device", value=device.name, unit="", source=device.source),
        Assumption(name="devices", value=share, unit="sharing the work evenly", source="given, or this machine's"),
        Assumption(name="peak, float32", value=device.tflops, unit="TFLOPS", source=device.source),
        Assumption(name="peak, half precision", value=device.half_tflops, unit="TFLOPS", source=device.source),
        Assumption(name="memory bandwidth", value=device.gb_per_s, unit="GB/s", source=device.source),
        Assumption(name="utilisation, capture", value=device.capture_utilisation, unit="of the peak", source="assumed"),
        Assumption(
            name="utilisation, training", value=device.training_utilisation, unit="of the peak", source="assumed"
        ),
        Assumption(name="disk", value=config.disk_mb_per_s, unit="MB/s", source="--disk-mb-per-s"),
        Assumption(
            name="forward pass", value=2, unit="FLOPs a weight and token, and attention", source="counted by torch"
        ),
        Assumption(name="training step", value=3, unit="forward passes", source="backward is two of them"),
        Assumption(name="passes over logits, encoding", value=passes, unit="float32 reads or writes", source=ours),
        Assumption(name="passes over logits, loss", value=_LOSS_PASSES, unit="float32 reads or writes", source=ours),
        Assumption(name="optimizer", value=_ADAMW_BYTES, unit="bytes a parameter and step", source="AdamW in float32"),
        Assumption(name="start of a command", value=_START_S, unit="s", source="assumed"),
        Assumption(name="text into blocks", value=_STAGED_TOKENS_PER_S, unit="tokens/s", source="assumed"),
        Assumption(
            name="online distillation", value="a student's step and the teacher's forward pass", unit="", source="FLOPs"
        ),
        Assumption(
            name="left out", value="evaluation on the way, checkpoints between", unit="", source="asked for by flags"
        ),
    ]
