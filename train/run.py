"""A training run put together: settings, a cache and a run folder come in, all that takes part in a step goes out.

A run starts from what its settings describe, or goes on from its newest checkpoint; then the teacher's files and the
student's first weights are never looked at.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cache_spec.errors import BadInputError
from cache_spec.reader import CacheReader
from train.batches import StepPlan
from train.budget import steps_for_tokens
from train.checkpoint import (
    Checkpoint,
    Position,
    Snapshot,
    load_latest,
    refuse_another_run,
    restore_optimizer,
    restore_weights,
    take_snapshot,
)
from train.config import TrainConfig
from train.distiller import Distiller, LossWeights, check_centring, check_student_head
from train.loss_divergences import Divergence
from train.parallel import is_slice, whole, wrap
from train.ranks import Ranks
from train.redraw import check_draws
from train.run_files import CHECKPOINTS_NAME
from train.run_folder import rebuild_student, save_student_config, set_dropout, write_run
from train.student import StudentBuild, build_student
from train.student_modes import set_modes
from train.teacher_targets import check_divergence, pick_tail

logger = logging.getLogger("kdpipe")

Precision = Literal["fp32", "bf16"]
_POSITION_EMBEDDINGS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
_TOKEN_TYPE_EMBEDDINGS = ("token_type_embeddings",)


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that takes part in a run; ``position`` is what moves."""

    config: TrainConfig
    reader: CacheReader
    plan: StepPlan
    ranks: Ranks
    device: torch.device
    precision: Precision
    identity: tuple[str, dict[str, Any]]
    distiller: Distiller
    model: nn.Module
    """What a pass calls: the distiller, wrapped where there are several ranks."""
    optimizer: torch.optim.Optimizer
    position: Position

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def snapshot(self, *, copies: bool) -> Snapshot:
        """Return the run's state for a checkpoint, which rank 0 writes; all ranks call this."""
        fingerprint, settings = self.identity
        return take_snapshot(
            self.position,
            model=self.distiller,
            optimizer=self.optimizer,
            fingerprint=fingerprint,
            settings=settings,
            copies=copies,
            keep=self.ranks.is_first,
        )

    def whole_student(self) -> PreTrainedModel:
        """Return the student with all of its weights, on rank 0; all ranks call this."""
        student = self.distiller.student
        weights = student.state_dict()
        if not any(is_slice(tensor) for tensor in weights.values()):
            return student
        full = {name: whole(tensor) for name, tensor in weights.items()}
        if not self.ranks.is_first:
            return student
        with torch.random.fork_rng(devices=[]):
            copy: Any = rebuild_student(self.config.out)
        copy.load_state_dict(full)
        moved: PreTrainedModel = copy.to(self.device)
        return moved


def open_run(
    config: TrainConfig,
    reader: CacheReader,
    weights: LossWeights,
    ranks: Ranks,
    device: torch.device,
    precision: Precision,
    identity: tuple[str, dict[str, Any]],
) -> Run:
    """Put a run together: from its newest checkpoint, or else from the start."""
    first_weights: dict[str, Tensor] | None = None
    with ranks.together():
        checkpoint = load_latest(config.out / CHECKPOINTS_NAME)
        plan = step_plan(config, reader, ranks.num_ranks)
        if checkpoint is not None:
            saved = (checkpoint.state.fingerprint, checkpoint.state.settings)
            refuse_another_run(checkpoint.path, saved=saved, asked=identity)
        elif ranks.is_first:
            first_weights = _start(config, reader, plan, identity)
    with ranks.together():
        torch.manual_seed(config.seed)
        student = rebuild_student(config.out)
        if first_weights is not None:
            student.load_state_dict(first_weights)
        distiller = build_distiller(config, reader, weights, student, device)
        if checkpoint is not None:
            restore_weights(checkpoint, distiller)
    if checkpoint is None:
        ranks.copy_from_first(distiller)
    model = wrap(distiller, ranks, config.strategy, device)
    run = Run(
        config=config,
        reader=reader,
        plan=plan,
        ranks=ranks,
        device=device,
        precision=precision,
        identity=identity,
        distiller=distiller,
        model=model,
        optimizer=_optimizer(distiller, config),
        position=Position(step=0, epoch=0, samples=0, tokens=0, seconds=0.0),
    )
    if checkpoint is not None:
        _go_on(run, checkpoint)
    return run


def _go_on(run: Run, checkpoint: Checkpoint) -> None:
    with run.ranks.together():
        restore_optimizer(checkpoint, run.distiller, run.optimizer)
    run.position = checkpoint.position
    logger.info("going on from %s of %d steps", checkpoint.path.name, run.plan.total_steps)


def step_plan(config: TrainConfig, reader: CacheReader, num_ranks: int = 1) -> StepPlan:
    """Return how the run's steps tile the cache."""
    plan = StepPlan(
        num_blocks=reader.manifest.blocks.num_blocks,
        batch_blocks=config.batch_blocks,
        accumulate=config.accumulate,
        epochs=config.epochs,
        max_steps=config.max_steps,
        num_ranks=num_ranks,
        shuffle=config.shuffle,
        group_by_length=config.group_by_length,
    )
    if config.max_tokens is None:
        return plan
    steps = steps_for_tokens(reader, plan, config.max_tokens, seed=config.seed, window_shards=config.window_shards)
    return replace(plan, max_steps=steps)


def first_student(config: TrainConfig, reader: CacheReader) -> StudentBuild:
    """Build the student that the settings describe; BadInputError for one that cannot be trained from this cache."""
    built = build_student(
        teacher_folder_in_cache=reader.path / "teacher",
        manifest=reader.manifest,
        init=config.student,
        num_layers=config.num_layers,
        layer_indices=config.layer_indices,
        layers=config.layers,
        overrides=config.student_config or {},
        teacher=config.teacher,
        checkpoint=config.checkpoint,
        seed=config.seed,
        initializer_range=config.initializer_range,
    )
    check_student_head(built.model)
    if config.dropout is not None:
        set_dropout(built.model, config.dropout)
    _frozen(built.model, config)
    return built


def build_distiller(
    config: TrainConfig, reader: CacheReader, weights: LossWeights, student: PreTrainedModel, device: torch.device
) -> Distiller:
    """Return student and loss as one module on ``device``, in training mode, with frozen what stays as it is."""
    distiller = Distiller.of_cache(
        reader,
        student,
        weights=weights,
        temperature=config.temperature,
        tail=config.tail,
        divergence=Divergence(config.divergence, 0.5 if config.js_beta is None else config.js_beta),
        centre_hidden=config.hidden_centre,
        chunk_rows=config.chunk_rows,
    ).to(device)
    for embedding in _frozen(student, config):
        embedding.weight.requires_grad_(False)
    set_modes(student, config)
    return distiller.train()


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    """Return the context of a forward pass in ``precision``."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def _start(
    config: TrainConfig, reader: CacheReader, plan: StepPlan, identity: tuple[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """Build the student for the first time, write down what the run is, and return the student's weights."""
    built = first_student(config, reader)
    fingerprint, settings = identity
    write_run(
        config.out,
        {
            "format": "kdpipe-run",
            "format_version": 1,
            "fingerprint": fingerprint,
            "settings": settings,
            "config": config.model_dump(mode="json"),
            "student": built.summary,
            "total_steps": plan.total_steps,
        },
    )
    save_student_config(config.out, built.model)
    return dict(built.model.state_dict())


def pick_device(name: str) -> torch.device:
    """Return the device that ``name`` asks for; BadInputError("no-such-device") where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= available.get(device.type, 0):
        expected = "auto, or one of " + ", ".join(kind for kind, number in available.items() if number)
        raise BadInputError("no-such-device", f"device {name}", expected=expected)
    return device


def pick_precision(name: str, device: torch.device) -> Precision:
    """Return the arithmetic of the forward pass; BadInputError where the device lacks it."""
    if name == "auto":
        # Emulated, bf16 is slower than fp32.
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if fast else "fp32"
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu"
    if name == "bf16" and not has_bf16:
        raise BadInputError("no-bf16", f"device {device}", hint="use --precision fp32")
    return "bf16" if name == "bf16" else "fp32"


def run_identity(
    config: TrainConfig, reader: CacheReader, precision: Precision, num_ranks: int = 1
) -> tuple[str, dict[str, Any]]:
    """Return what a run goes on from and nothing else: the cache's fingerprint, and settings as they resolve."""
    resolved = {
        "precision": precision,
        "tail": pick_tail(config.tail, reader.manifest),
        # How a step's blocks are cut up moves the last bits of a sum; how many they are is another run.
        "step_blocks": config.batch_blocks * config.accumulate * num_ranks,
    }
    if config.group_by_length:
        resolved["group_blocks"] = config.batch_blocks
    return reader.manifest.fingerprint, config.result_settings() | resolved


def loss_weights(config: TrainConfig, reader: CacheReader) -> LossWeights:
    """Check that the cache has what the loss asks for."""
    reader.manifest.temperature_index(config.temperature)
    check_divergence(config.divergence, pick_tail(config.tail, reader.manifest), reader.manifest)
    check_draws(config.draws_per_step, reader.manifest)
    if config.kl_positions == "masked" and reader.manifest.masking is None:
        found, hint = "a teacher that predicts the next token", "leave kl_positions out"
        raise BadInputError("no-masking", config.cache, expected="a cache of masked text", found=found, hint=hint)
    check_centring(reader.manifest, config.hidden_centre)
    weights = LossWeights(kl=config.kl_weight, ce=config.ce_weight, cosine=config.cosine_weight, mse=config.mse_weight)
    if weights.uses_hidden and reader.manifest.hidden is None:
        raise BadInputError(
            "no-hidden-states",
            config.cache,
            expected="a cache with hidden states",
            hint="set cosine_weight and mse_weight to 0, or capture again with hidden states",
        )
    return weights


def _optimizer(distiller: Distiller, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; biases and norms are not decayed."""
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or "norm" in name.lower() or ".ln_" in name
            (spared if plain else decayed).append(parameter)
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def _frozen(student: PreTrainedModel, config: TrainConfig) -> list[nn.Embedding]:
    """What stays as it starts; BadInputError where there is no such thing."""
    frozen: list[nn.Embedding] = []
    if config.freeze_position_embeddings:
        hint = "only models with learnt positions, such as gpt2, have them: leave freeze_position_embeddings out"
        frozen += _embeddings(student, _POSITION_EMBEDDINGS, "no-position-embeddings", hint)
    if config.freeze_token_type_embeddings:
        hint = (
            "models such as bert have them, distilbert and causal ones do not: leave freeze_token_type_embeddings out"
        )
        frozen += _embeddings(student, _TOKEN_TYPE_EMBEDDINGS, "no-token-type-embeddings", hint)
    return frozen


def _embeddings(student: PreTrainedModel, names: tuple[str, ...], kind: str, hint: str) -> list[nn.Embedding]:
    found = [
        module
        for name, module in student.named_modules()
        if name.rpartition(".")[2] in names and isinstance(module, nn.Embedding)
    ]
    if not found:
        raise BadInputError(kind, f"student of type {student.config.model_type}", hint=hint)
    return found
