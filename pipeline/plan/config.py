"""Settings of ``plan``: what is to be captured and trained, on what, and at what rates.

In: values from flags and recipes. Out: one frozen, checked object. Nothing here imports torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from pipeline.encoding_config import EncodingConfig

_OF_FORMULAS = (
    "device",
    "num_devices",
    "devices",
    "device_tflops",
    "device_gb_per_s",
    "device_memory_gb",
    "capture_utilisation",
    "training_utilisation",
    "disk_mb_per_s",
)


class PlanConfig(EncodingConfig):
    """What to plan for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    HEADINGS: ClassVar = {
        "teacher": "Teacher, students and text",
        "block_tokens": "Blocks",
        "temperatures": "What is kept",
        "capture_batch_blocks": "Blocks",
        "epochs": "Training",
        "device": "Devices, for the formula",
        "budget_hours": "Budget and rates",
        "calibrate": "Measuring",
    }

    teacher: str
    """Teacher: a local folder (config.json is enough, but for --text and --calibrate), a shipped config (gpt2,
    gpt2-medium, gpt2-large, gpt2-xl, smollm2-135m, smollm2-360m, smollm2-1.7b, llama-7b, llama-3-8b, mistral-7b,
    qwen2.5-7b), or a hub name."""
    student: tuple[str, ...] = Field(min_length=1)
    """Student: a number of the teacher's layers, changes to its config or another one (JSON or a .json file), a model's
    folder or name, or a file of students (.yaml), as train-student --students takes it; may be given more than once."""
    text: tuple[str, ...] = ()
    """Text, as cache-teacher takes it; may be given more than once."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens to capture; default: those of the text, estimated from its first part."""
    text_field: str = "text"
    """Field or column that holds the text."""
    split: str = "train"
    """Split of a hub data set."""
    block_tokens: int = Field(default=1024, ge=2)
    """Tokens in a block."""
    temperatures: tuple[float, ...] = (1.0, 2.0)
    """Temperatures of the cache, ascending."""
    hidden_window: int = Field(default=32, ge=0)
    """Tokens averaged into one stored hidden state; 1 keeps each, 0 keeps none."""
    hidden_dtype: Literal["float16", "int8"] = "int8"
    """Type of the averaged hidden states."""
    capture_batch_blocks: int = Field(default=4, ge=1)
    """Blocks in one forward pass of the teacher: --batch-blocks of cache-teacher."""
    shard_blocks: int = Field(default=256, ge=1)
    """Blocks in a shard."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the teacher computes in; auto is bfloat16 on a GPU, float32 elsewhere."""

    epochs: int = Field(default=1, ge=1)
    """Passes of each student over the cache."""
    batch_blocks: int = Field(default=8, ge=1)
    """Blocks in one pass of a student."""
    accumulate: int = Field(default=1, ge=1)
    """Passes that make one optimizer step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the students; auto is bf16 on a GPU, fp32 elsewhere."""

    device: tuple[str, ...] = ()
    """Device to plan for: h200, h100, a100, a100-40gb, l4, t4, rtx4090, rtx3090, m2-max, cpu-core, or one of
    --devices; may be given more than once, to compare.  [default: this machine's]"""
    num_devices: int | None = Field(default=None, ge=1)
    """Devices that share the work; the plan divides by their number.  [default: 1, or this machine's threads]"""
    devices: Path | None = None
    """File (YAML) of further devices: name -> tflops, half_tflops, gb_per_s, memory_gb."""
    device_tflops: float | None = Field(default=None, gt=0)
    """Peak TFLOPS of the device in the arithmetic that is planned for, in place of the table's."""
    device_gb_per_s: float | None = Field(default=None, gt=0)
    """Peak memory bandwidth of the device in GB/s, in place of the table's."""
    device_memory_gb: float | None = Field(default=None, gt=0)
    """Memory of the device in GB, in place of the table's."""
    capture_utilisation: float | None = Field(default=None, gt=0, le=1)
    """Share of the peak that a forward pass reaches.  [default: the device's, 0.5]"""
    training_utilisation: float | None = Field(default=None, gt=0, le=1)
    """Share of the peak that a training step reaches.  [default: the device's, 0.4]"""
    disk_mb_per_s: float = Field(default=500.0, gt=0)
    """What the disk reads and writes in a second."""

    budget_hours: float | None = Field(default=None, gt=0)
    """Hours that capture and all students may take together."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Price of an hour of one device; of a CPU, of the whole machine, however many threads share the work."""
    watts: float | None = Field(default=None, ge=0)
    """Power that one device and its share of the machine draw; of a CPU, the whole machine."""
    price_per_kwh: float | None = Field(default=None, ge=0)
    """Price of a kWh, needs watts."""
    co2_per_kwh: float | None = Field(default=None, ge=0)
    """kg of CO2 for a kWh, needs watts."""

    calibrate: bool = False
    """Time the real teacher, students and disk on this machine, for about a minute, in place of the formula."""
    probe_seconds: float = Field(default=60.0, gt=0)
    """Seconds of timed work that the probe aims at; starts, loading and exports come on top. Each part of it does at
    least one piece of work."""
    probe_folder: Path = Path()
    """Folder on the disk that the cache will lie on; the probe's own folder in it is removed afterwards."""
    runs: tuple[Path, ...] = ()
    """Folder of a trained family (with family.json) to take the law of the loss from; may be given more than once."""

    @field_validator("student", "text", "device", "runs", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        # A number, where YAML reads one.
        return [str(part) for part in (value if isinstance(value, list | tuple) else [value])]

    @field_validator("text")
    @classmethod
    def _texts_at_home(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(os.path.expanduser, texts))

    @field_validator("probe_folder")
    @classmethod
    def _folder_at_home(cls, folder: Path) -> Path:
        return folder.expanduser()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tokens is None and not self.text:
            raise ValueError("give tokens or text: how much is to be captured")
        if self.tokens is not None and self.tokens < self.block_tokens:
            raise ValueError(f"tokens {self.tokens} is less than one block of {self.block_tokens}")
        if self.hidden_window and self.block_tokens % self.hidden_window:
            raise ValueError(f"hidden_window {self.hidden_window} does not divide block_tokens {self.block_tokens}")
        if not self.hidden_window and "hidden_dtype" in self.model_fields_set:
            raise ValueError("hidden_dtype means nothing without hidden_window")
        if self.capture_batch_blocks > self.shard_blocks:
            raise ValueError(
                f"capture_batch_blocks {self.capture_batch_blocks} is more than shard_blocks {self.shard_blocks}"
            )
        if self.prototypes_from is not None and not self.calibrate:
            raise ValueError("prototypes_from means something with calibrate alone")
        for name in ("price_per_kwh", "co2_per_kwh"):
            if getattr(self, name) is not None and self.watts is None:
                raise ValueError(f"{name} needs watts")
        if self.calibrate:
            if given := [name for name in _OF_FORMULAS if name in self.model_fields_set]:
                raise ValueError(f"{given[0]} means nothing with calibrate, which measures this machine")
        elif given := [name for name in ("probe_seconds", "probe_folder") if name in self.model_fields_set]:
            raise ValueError(f"{given[0]} needs calibrate")
        if len(self.device) > 1:
            for name in ("device_tflops", "device_gb_per_s", "device_memory_gb"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is of one device: give one")
        return self
