"""What a run would do and cost: a `TrainConfig` comes in, figures go out, and nothing is written."""

from __future__ import annotations

import time
from typing import Any

import torch

from cache_spec.reader import CacheReader
from train.batches import micro_batches
from train.checkpoint import load_latest
from train.config import TrainConfig
from train.memory import out_of_memory_at
from train.ranks import ranks_of_environment
from train.run import (
    autocast,
    build_distiller,
    first_student,
    loss_weights,
    pick_device,
    pick_precision,
    run_identity,
    step_plan,
)
from train.run_files import CHECKPOINTS_NAME
from train.run_folder import goes_on, rebuild_student, refuse_foreign
from train.student import quiet_transformers
from train.student_modes import compiling


def plan(config: TrainConfig) -> dict[str, Any]:
    """Return what ``train`` would do and cost, by building the student and timing a pass; writes nothing."""
    device = pick_device(config.device)
    with quiet_transformers(), out_of_memory_at(f"plan on {device}"):
        return _plan(config, device)


def _plan(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    reader = CacheReader.open(config.cache, config)
    weights = loss_weights(config, reader)
    precision = pick_precision(config.precision, device)
    refuse_foreign(config.out)
    num_ranks = ranks_of_environment().num_ranks
    goes_on(config.out, run_identity(config, reader, precision, num_ranks))
    steps = step_plan(config, reader, num_ranks)
    checkpoint = load_latest(config.out / CHECKPOINTS_NAME)
    done = checkpoint.position.step if checkpoint else 0
    items = micro_batches(
        reader,
        steps,
        first_step=0,
        temperature=config.temperature,
        seed=config.seed,
        window_shards=config.window_shards,
        draws_per_step=config.draws_per_step,
        masked_only=config.kl_positions == "masked",
    )
    micro = next(items)
    with torch.random.fork_rng(devices=[]):
        student = first_student(config, reader).model if checkpoint is None else rebuild_student(config.out)
        distiller = build_distiller(config, reader, weights, student, device)
        for _ in range(2):  # the first pass also pays for what is set up once
            began = time.perf_counter()
            with autocast(device, precision), compiling(config):
                output = distiller(micro.batch.to(device), micro.counts)
            output.loss.backward()
            output.loss.item()
            pass_s = time.perf_counter() - began
    trained = sum(parameter.numel() for parameter in distiller.parameters() if parameter.requires_grad)
    blocks = sum(
        min(steps.step_blocks, steps.num_blocks - steps.start_of(step)[1]) for step in range(done, steps.total_steps)
    )
    return {
        "steps": steps.total_steps,
        "steps_done": done,
        # Real tokens, where a kept last block is a partial one: exact for whole epochs.
        "tokens_to_train": blocks * reader.manifest.corpus.num_tokens // steps.num_blocks,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "device": str(device),
        "precision": precision,
        "hours": round(pass_s * blocks / len(micro.blocks) / num_ranks / 3600, 3),
        # Weights and AdamW's two moments in float32; while a checkpoint replaces another, both are there.
        "checkpoint_bytes": 12 * trained,
        "out": str(config.out),
    }
