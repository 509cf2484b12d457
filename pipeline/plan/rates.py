"""What capture and training take for each token and once: by formula, for one device.

In: what models cost, a device, settings. Out: ``Rates``, which a probe gives as well, and the assumptions behind them.
Everything that follows from rates (hours, budgets, break-even) is the same, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

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
_ADAMW_BYTES = 28.0
"""Read and written for each parameter and step: weight, gradient, two moments."""
_STATE_BYTES = 16.0
"""float32 weight, gradient and two moments of each trained parameter."""
_CHUNK_BYTES = 64 << 20
"""Most of one array of logits; capture and training hold a few at a time."""
_CHUNKS = 4
_LIVE_SHARE = 2.0
"""Layers' worth of activations that live at once where no gradient is wanted."""
_RAW_OF_STORED = 2.0
"""Bytes of a shard's arrays before they are compressed."""
_SHARDS_HELD = 2
"""One is packed and written while the next is made."""
_SAVED_BYTES = 12.0
"""Written for each parameter at the end of a run: the last checkpoint's weights and moments."""
_RUNTIME_BYTES = 1 << 30
"""Interpreter, libraries and the device's context."""


class Cost(Protocol):
    """What is asked of a model's cost."""

    @property
    def parameters(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def kept_bytes(self) -> float: ...
    @property
    def forward_flops(self) -> float: ...
    @property
    def is_counted(self) -> bool: ...


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
    online_fixed_s: float
    """The same, and the teacher's load."""
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


class Online(TypedDict):
    """What online distillation takes, in fields of ``StudentRates``."""

    online_token_s: float
    online_fixed_s: float
    online_peak_bytes: int


def online(
    *, step_token_s: float, teacher_token_s: float, fixed_s: float, load_s: float, peak_bytes: float, teacher_bytes: int
) -> Online:
    """The one definition, by formula and by probe: a student's step and the teacher's forward pass, the teacher loaded
    in each run, its weights and its logits of a few chunks in memory."""
    return {
        "online_token_s": step_token_s + teacher_token_s,
        "online_fixed_s": fixed_s + load_s,
        "online_peak_bytes": round(peak_bytes + teacher_bytes + _CHUNKS * _CHUNK_BYTES),
    }


def forward_passes(train: Any) -> int:
    """What a training step costs: backward is two forward passes, and checkpointed activations are made once more."""
    return 4 if train.activation_checkpointing else 3


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
    raw_shard = config.shard_blocks * config.block_tokens * bytes_per_token * _RAW_OF_STORED
    capture_peak = (
        weight_bytes
        + batch_tokens * activations
        + _CHUNKS * _CHUNK_BYTES
        + _SHARDS_HELD * raw_shard
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
                load_s=weight_bytes / disk,
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
    load_s: float,
    bytes_per_token: float,
    block_tokens: int,
    bandwidth: float,
    disk: float,
    share: int,
) -> StudentRates:
    precision = train.precision if train.precision != "auto" else "bf16" if device.half_by_default else "fp32"
    step_s = forward_passes(train) * cost.forward_flops / (device.peak_flops(precision) * device.training_utilisation)
    step_s += _LOSS_PASSES * 4 * cost.vocab_size / bandwidth
    pass_tokens = train.batch_blocks * block_tokens
    step_s += _ADAMW_BYTES * cost.parameters / (pass_tokens * train.accumulate) / bandwidth
    kept = cost.kept_bytes
    if train.activation_checkpointing:
        # Every layer's input, and one layer made again.
        kept = 4.0 * cost.width * cost.layers + kept / cost.layers
    kept *= 1 if precision == "fp32" else 0.5
    fixed_s = _START_S + _SAVED_BYTES * cost.parameters / disk
    peak = _STATE_BYTES * cost.parameters + pass_tokens * kept + _CHUNKS * _CHUNK_BYTES + _RUNTIME_BYTES
    return StudentRates(
        name=name,
        parameters=cost.parameters,
        token_s=max(step_s / share, bytes_per_token / disk),
        cross_entropy_token_s=step_s / share,
        fixed_s=fixed_s,
        peak_bytes=round(peak),
        epochs=train.epochs,
        **online(
            step_token_s=step_s / share,
            teacher_token_s=teacher_s / share,
            fixed_s=fixed_s,
            load_s=load_s,
            peak_bytes=peak,
            teacher_bytes=teacher_bytes,
        ),
    )


def counted_by(models: Sequence[tuple[str, Cost]]) -> str:
    """Where FLOPs and kept activations of models are from."""
    if not (others := [name for name, cost in models if not cost.is_counted]):
        return "counted by torch"
    by_shapes = f"by the shapes of weights: {', '.join(others)}"
    return by_shapes if len(others) == len(models) else f"counted by torch; {by_shapes}"


ONLINE = "a student's step and the teacher's forward pass; the teacher loaded once a run"
LEFT_OUT = Assumption(
    name="left out", value="evaluation on the way, checkpoints between", unit="", source="asked for by flags"
)


def assumptions(
    config: PlanConfig, device: Device, share: int, counted: str, checkpointing: Sequence[str]
) -> list[Assumption]:
    """What ``formula_rates`` takes for granted; ``checkpointing`` are students that make activations once more."""
    ours, given = "docs/RESULTS.md", config.model_fields_set
    passes = _ENCODING_PASSES[config.encoding]
    draws = config.residual_draws * _PASSES_A_DRAW if config.encoding == "prototype" else 0.0

    def told(name: str, value: float | int | str, unit: str, source: str) -> Assumption:
        return Assumption(name=name, value=value, unit=unit, source=source)

    rows = [
        told("device", device.name, "", device.source),
        told(
            "devices", share, "sharing the work evenly", "given" if "num_devices" in given else "this machine's, or 1"
        ),
        told("peak, float32", device.tflops, "TFLOPS", device.source_of("tflops")),
        told("peak, half precision", device.half_tflops, "TFLOPS", device.source_of("half_tflops")),
        told("memory bandwidth", device.gb_per_s, "GB/s", device.source_of("gb_per_s")),
        told(
            "memory", device.memory_gb or "not known", "GB" if device.memory_gb else "", device.source_of("memory_gb")
        ),
        told(
            "utilisation, capture", device.capture_utilisation, "of the peak", device.source_of("capture_utilisation")
        ),
        told(
            "utilisation, training",
            device.training_utilisation,
            "of the peak",
            device.source_of("training_utilisation"),
        ),
        told("disk", config.disk_mb_per_s, "MB/s", "given" if "disk_mb_per_s" in given else "assumed"),
        told("forward pass", 2, "FLOPs a weight and token, and attention", counted),
        told("activations kept for the backward pass", "float32, halved in half precision", "", counted),
        told("training step", 3, "forward passes", "backward is two of them"),
        told("passes over logits, encoding", passes, "float32 reads or writes", ours),
        told("passes over logits, loss", _LOSS_PASSES, "float32 reads or writes", ours),
        told("optimizer", _ADAMW_BYTES, "bytes a parameter and step", "AdamW in float32"),
        told("weights, gradients and moments", _STATE_BYTES, "bytes a parameter in memory", "AdamW in float32"),
        told("written at the end of a run", _SAVED_BYTES, "bytes a parameter", "weights and moments in float32"),
        told("logits in memory", _CHUNKS * _CHUNK_BYTES / 1e6, "MB", "the code's chunks"),
        told("activations of a forward pass", _LIVE_SHARE, "layers' worth at once", "assumed"),
        told("shards in memory", _SHARDS_HELD, "at once", "the code's"),
        told("shards before compression", _RAW_OF_STORED, "times what is stored", "assumed"),
        told("runtime", _RUNTIME_BYTES / 1e6, "MB of memory", "assumed"),
        told("start of a command", _START_S, "s", "assumed"),
        told("text into blocks", _STAGED_TOKENS_PER_S, "tokens/s", "assumed"),
        told("online distillation", ONLINE, "", counted),
        LEFT_OUT,
    ]
    if draws:
        rows.append(told("passes over logits, residual draws", draws, "float32 reads or writes", ours))
    if checkpointing:
        source = f"activations are made once more: {', '.join(checkpointing)}"
        rows.append(told("training step with checkpointed activations", 4, "forward passes", source))
    return rows
