"""Settings of one training run: what a recipe or the command line says comes in, one checked `TrainConfig` goes out.

Nothing here imports torch: the command line builds its options and their help from these fields, fast.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from cache_spec.address import CacheAddress, CopySettings
from train.schedule import DEFAULT_COOLDOWN, Schedule, WeightSchedule

# These may change when a run goes on: where things lie, how often something is written, and what moves only the
# last bits of a float (the order of a sum). `precision` and `tail` are compared as what they resolve to, and of how a
# step's blocks are cut up (`batch_blocks`, `accumulate`, the number of ranks) their product. `max_hours` may be raised.
CHANGEABLE_ON_RESUME = frozenset(
    {
        "cache",
        "copy_folder",
        "copy_gb",
        "out",
        "teacher",
        "log_every",
        "checkpoint_every",
        "tensorboard",
        "device",
        "precision",
        "chunk_rows",
        "batch_blocks",
        "accumulate",
        "strategy",
        "compile",
        "activation_checkpointing",
        "read_ahead",
        "max_hours",
        "evaluate_cache",
        "evaluate_every",
        "async_checkpoint",
        "wandb",
    }
)


class TrainConfig(CopySettings):
    """One training run from one cache; raises pydantic's ValidationError for settings that make no sense."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    HEADINGS: ClassVar = {
        "cache": "Cache and run",
        "student": "The student",
        "temperature": "The loss",
        "epochs": "Length and order",
        "learning_rate": "The optimizer",
        "seed": "Device and speed",
        "evaluate_cache": "Measuring and logging",
    }

    cache: CacheAddress
    """Finished cache to learn from: its folder, or its address in a store, as s3://BUCKET/NAME."""
    out: Path
    """Folder of this run: checkpoints, metrics and, at the end, the student."""

    student: Literal["teacher-layers", "sliced", "config", "checkpoint"] = "teacher-layers"
    """How the student starts: some of the teacher's layers, these cut to smaller sizes (of student_config), a fresh
    model by config, or an existing model."""
    num_layers: int | None = Field(default=None, gt=0)
    """Number of layers of the student; with student = sliced by default all."""
    layers: Literal["spread", "first", "last"] = "spread"
    """Which of the teacher's layers num_layers takes: evenly spaced ones, first and last included, or an end."""
    layer_indices: tuple[int, ...] | None = None
    """The teacher's layers to copy, from 0, in order (in place of num_layers)."""
    student_config: dict[str, Any] | None = None
    """Changes to the teacher's model config for the student, by the model's own names."""
    checkpoint: str | None = Field(default=None, min_length=1)
    """Folder or hub name of the model to go on from (with student = checkpoint)."""
    teacher: str | None = Field(default=None, min_length=1)
    """Folder or hub name of the teacher where copied layers are read; default: the name in the cache."""
    initializer_range: float | None = Field(default=None, gt=0)
    """Standard deviation of freshly drawn weights; default: what the model's config says."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of every dropout of the student; default: what the model's config says."""
    freeze_position_embeddings: bool = False
    """Keep learnt position embeddings as they start."""
    freeze_token_type_embeddings: bool = False
    """Keep token type embeddings, which models as bert have, as they start."""

    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the distillation loss; one of those declared in the cache."""
    divergence: Literal["forward", "reverse", "js"] = "forward"
    """Divergence from the teacher: KL(teacher || student), KL(student || teacher) or Jensen-Shannon between them."""
    js_beta: float | None = Field(default=None, gt=0, lt=1)
    """Share of the teacher in the mixture of divergence = js; default: 0.5."""
    kl_weight: float = Field(default=0.9, ge=0)
    """Weight of the divergence from the teacher's distribution."""
    kl_positions: Literal["kept", "masked"] = "kept"
    """Where the divergence counts on masked text: at all positions that the cache kept, or at masked tokens alone."""
    ce_weight: float = Field(default=0.1, ge=0)
    """Weight of the cross-entropy of the text's own next token, or, on masked text, of its masked ones."""
    cosine_weight: float = Field(default=0.0, ge=0)
    """Weight of one minus the cosine between pooled hidden states."""
    mse_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared error between pooled hidden states."""
    kl_schedule: str = "constant"
    """What multiplies kl_weight: constant; linear:FROM:TO over the run, or linear:FROM:TO:FRACTION over the first
    fraction of it; first:FRACTION, and nothing after; wsd, a rise over warmup and a fall over cooldown."""
    ce_schedule: str = "constant"
    """What multiplies ce_weight, as kl_schedule."""
    hidden_centre: bool = False
    """Compare pooled hidden states less their mean over each block: what all tokens share is not taught."""
    hidden_schedule: str = "constant"
    """What multiplies cosine_weight and mse_weight, as kl_schedule."""
    tail: Literal["prototype", "bucket", "renormalise", "uniform", "gold"] | None = None
    """What the mass outside a cached head does: follow the cache's shared distributions, fill one bucket, be dropped
    and the head rescaled, spread evenly, or go to the text's next token; default: prototype where the cache has them,
    else bucket."""

    draws_per_step: int | None = Field(default=None, gt=0)
    """Of a cache of drawn tokens, use so many draws of each, others in every epoch; default: all of them."""

    epochs: int = Field(default=1, gt=0)
    """Passes over the cache."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps, with the learning rate decayed by then."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Stop with the step that reaches this many tokens, with the learning rate decayed by then."""
    max_hours: float | None = Field(default=None, gt=0)
    """Stop after this many hours of training, earlier runs of the same command included; the learning rate then follows
    the clock too, and has decayed by then."""
    batch_blocks: int = Field(default=8, gt=0)
    """Blocks in one forward and backward pass of one rank."""
    accumulate: int = Field(default=1, gt=0)
    """Passes of each rank whose gradients make one optimizer step."""
    window_shards: int = Field(default=16, gt=0)
    """Shards whose blocks are shuffled together."""
    shuffle: bool = True
    """Visit blocks in an order drawn from seed and epoch; without it, as they lie in the cache."""
    group_by_length: bool = False
    """Make each pass of blocks of like length, where a cache has a document a block."""

    learning_rate: float = Field(default=6e-4, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Schedule = "linear"
    """How the learning rate falls after the warm-up: to zero along a line or a cosine, not at all, or along a line over
    the cooldown alone."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Fraction of the steps over which the learning rate rises from zero."""
    cooldown: float = Field(default=DEFAULT_COOLDOWN, gt=0, le=1)
    """Fraction of the steps, the last ones, over which wsd falls to zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW; biases and norms are spared."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-6, gt=0)
    """What AdamW adds to the denominator."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of a larger norm are scaled down to it."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of fresh weights, of dropout and of the order of blocks."""
    device: str = Field(default="auto", min_length=1)
    """Where to train: auto, cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; auto is bf16 on a CUDA device that has it, else fp32."""
    chunk_rows: int | None = Field(default=None, gt=0)
    """Positions whose logits exist at once in the loss; default: what fits a modest device."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What the ranks of a launch share: ddp, gradients alone; fsdp, weights and optimizer state too."""
    read_ahead: int = Field(default=2, ge=0, le=64)
    """Batches made ready ahead by a thread of each rank; 0 reads in the training thread."""

    compile: bool = False
    """Compile the student with torch.compile: a slow start, then faster passes."""
    activation_checkpointing: bool = False
    """Keep less of the forward pass and compute it again on the way back: less memory, more time."""

    evaluate_cache: CacheAddress | None = None
    """Finished cache (folder or address) of held-out text, by the same teacher, to measure the student on while it
    learns."""
    evaluate_every: int | None = Field(default=None, gt=0)
    """Steps between two measurements on evaluate_cache; default: at the end alone."""
    async_checkpoint: bool = True
    """Write checkpoints from a copy in memory while training goes on."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between two checkpoints."""
    log_every: int = Field(default=10, gt=0)
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard logs beside the metrics."""
    wandb: str | None = Field(default=None, min_length=1)
    """Weights & Biases project to log to as well."""

    @field_validator("layer_indices")
    @classmethod
    def _layer_indices_make_sense(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is None:
            return value
        if not value:
            raise ValueError("name at least one layer")
        if min(value) < 0:
            raise ValueError("layers count from 0")
        if any(after <= before for before, after in pairwise(value)):
            raise ValueError("layers must be ascending, each named once")
        return value

    @field_validator("kl_schedule", "ce_schedule", "hidden_schedule")
    @classmethod
    def _weight_schedules_make_sense(cls, value: str) -> str:
        WeightSchedule.parse(value)
        return value

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        if self.kl_weight + self.ce_weight + self.cosine_weight + self.mse_weight == 0:
            raise ValueError("every loss weight is zero: nothing would be learnt")
        if self.compile and self.strategy == "fsdp":
            raise ValueError("compile means nothing with strategy = fsdp: its layers are gathered between kernels")
        if self.evaluate_every is not None and self.evaluate_cache is None:
            raise ValueError("evaluate_every needs evaluate_cache")
        if "wsd" in (self.schedule, self.kl_schedule, self.ce_schedule, self.hidden_schedule):
            if self.warmup + self.cooldown > 1:
                raise ValueError("warmup and cooldown overlap: of wsd they are at most 1 together")
        elif self.cooldown != DEFAULT_COOLDOWN:
            raise ValueError("cooldown means nothing where no schedule is wsd")
        if self.js_beta is not None and self.divergence != "js":
            raise ValueError(f"js_beta means nothing with divergence = {self.divergence}")
        if self.hidden_centre and self.cosine_weight + self.mse_weight == 0:
            raise ValueError("hidden_centre means nothing without cosine_weight or mse_weight")
        if self.num_layers is not None and self.layer_indices is not None:
            raise ValueError("give num_layers or layer_indices, not both")
        if self.student == "checkpoint" and self.checkpoint is None:
            raise ValueError("student = checkpoint needs checkpoint")
        if self.student != "checkpoint" and self.checkpoint is not None:
            raise ValueError(f"checkpoint means nothing with student = {self.student}")
        is_copied = self.student in ("teacher-layers", "sliced")
        if not is_copied and self.layer_indices is not None:
            raise ValueError(f"layer_indices means nothing with student = {self.student}")
        if self.layers != "spread" and (not is_copied or self.num_layers is None):
            raise ValueError(f"layers = {self.layers} needs num_layers and a student of the teacher's layers")
        if is_copied and self.initializer_range is not None:
            raise ValueError(f"initializer_range means nothing with student = {self.student}: its weights are copied")
        if self.student == "checkpoint":
            for name in ("num_layers", "student_config", "initializer_range"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} means nothing with student = checkpoint")
        return self

    def result_settings(self) -> dict[str, Any]:
        """Return, as plain JSON values, the settings that change the trained weights."""
        return self.model_dump(mode="json", exclude=set(CHANGEABLE_ON_RESUME))
