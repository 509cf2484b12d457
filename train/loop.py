"""One training run: a `TrainConfig` comes in, a run folder with checkpoints, metrics and the exported student goes out.

The same command goes on where a killed run stopped; on the CPU in fp32 it ends with bitwise the same weights.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cache_spec.errors import KdpipeError
from cache_spec.reader import CacheReader
from train.batches import MicroBatch, ahead, micro_batches
from train.checkpoint import Position, load_latest, refuse_another_run, rng_states, set_rng_states
from train.config import TrainConfig
from train.distil_batch import TermCounts
from train.distiller import Distiller
from train.export import export_student
from train.interrupts import Interrupted, Interrupts
from train.memory import out_of_memory_at
from train.order import IndexArray
from train.run import (
    Run,
    autocast,
    build_distiller,
    first_student,
    loss_weights,
    open_run,
    pick_device,
    pick_precision,
    run_identity,
    step_plan,
)
from train.run_folder import (
    CHECKPOINTS_NAME,
    STUDENT_NAME,
    Metrics,
    claimed,
    finished_result,
    published_run,
    read_metrics,
    rebuild_student,
    refuse_foreign,
    write_result,
)
from train.schedule import learning_rate
from train.student import quiet_transformers

logger = logging.getLogger("kdpipe")


def train(config: TrainConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Train one student from one cache, or go on with it, and return the figures of ``result.json``.

    Raises KdpipeError for what the user can mend. SIGINT and SIGTERM leave a checkpoint and raise KeyboardInterrupt.
    """
    reader = CacheReader.open(config.cache)
    weights = loss_weights(config, reader)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    identity = run_identity(config, reader, precision)
    # transformers gives advice on padding, of which blocks have none that a loss sees.
    with claimed(config.out), quiet_transformers():
        if _goes_on(config, identity):
            result = finished_result(config.out)
            if result is not None:
                logger.info("%s is finished already: nothing to do", config.out)
                return result
        with out_of_memory_at(f"start on {device}"):
            run = open_run(config, reader, weights, device, precision, identity)
        _take_steps(run, quiet=quiet)
        with out_of_memory_at("export of the student", hint="the same command goes on from the last checkpoint"):
            return _finish(run)


def plan(config: TrainConfig) -> dict[str, Any]:
    """Return what ``train`` would do and cost, by building the student and timing a pass; writes nothing."""
    device = pick_device(config.device)
    with quiet_transformers(), out_of_memory_at(f"plan on {device}"):
        return _plan(config, device)


def _plan(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    reader = CacheReader.open(config.cache)
    weights = loss_weights(config, reader)
    precision = pick_precision(config.precision, device)
    refuse_foreign(config.out)
    _goes_on(config, run_identity(config, reader, precision))
    steps = step_plan(config, reader)
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
    )
    micro = next(items)
    with torch.random.fork_rng(devices=[]):
        student = first_student(config, reader).model if checkpoint is None else rebuild_student(config.out)
        distiller = build_distiller(config, reader, weights, student, device)
        for _ in range(2):  # the first pass also pays for what is set up once
            began = time.perf_counter()
            with autocast(device, precision):
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
        "hours": round(pass_s * blocks / len(micro.blocks) / 3600, 3),
        # Weights and AdamW's two moments in float32; while a checkpoint replaces another, both are there.
        "checkpoint_bytes": 12 * trained,
        "out": str(config.out),
    }


def _goes_on(config: TrainConfig, identity: tuple[str, dict[str, Any]]) -> bool:
    """Whether there is something of this run to go on from; raises WouldLoseDataError for something of another."""
    record = published_run(config.out)
    if record is not None:
        refuse_another_run(config.out, saved=(record["fingerprint"], record["settings"]), asked=identity)
    return record is not None


def _take_steps(run: Run, *, quiet: bool) -> None:
    """Train until the last step is taken and kept."""
    config, plan, start = run.config, run.plan, run.position
    if start.step >= plan.total_steps:
        return
    items = micro_batches(
        run.reader,
        plan,
        first_step=start.step,
        temperature=config.temperature,
        seed=config.seed,
        window_shards=config.window_shards,
        draws_per_step=config.draws_per_step,
        with_hidden=run.distiller.weights.uses_hidden,
        pin_memory=run.device.type == "cuda",
    )
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(
            contextlib.closing(Metrics(config.out, last_step=start.step, tensorboard=config.tensorboard))
        )
        batches = stack.enter_context(contextlib.closing(ahead(items)))
        bar = stack.enter_context(
            tqdm(total=plan.total_steps, initial=start.step, unit="step", desc="train", disable=quiet or None)
        )
        interrupts = stack.enter_context(Interrupts())
        began = logged = time.perf_counter()
        logged_tokens = start.tokens
        while run.position.step < plan.total_steps:
            step = run.position.step
            rng = rng_states(run.device)
            try:
                with out_of_memory_at(f"step {step} on {run.device}"):
                    outcome = _step(run, batches, interrupts)
            except Interrupted:
                # The weights are those of the step before; dropout's state goes back to where it was then.
                run.optimizer.zero_grad(set_to_none=True)
                set_rng_states(rng, run.device)
                metrics.sync()
                run.save(rng)
                logger.info("stopped after step %d: the same command goes on from there", step)
                raise KeyboardInterrupt from None
            now = time.perf_counter()
            epoch, samples = plan.start_of(step + 1)
            run.position = Position(
                step=step + 1,
                epoch=epoch,
                samples=samples,
                tokens=run.position.tokens + outcome.tokens,
                seconds=start.seconds + now - began,
            )
            speed = (run.position.tokens - start.tokens) / (now - began)
            bar.set_postfix_str(" ".join([f"{speed:,.0f} tokens/s", *outcome.words()]), refresh=False)
            bar.update()
            last = run.position.step == plan.total_steps
            if run.position.step % config.log_every == 0 or last:
                speed = (run.position.tokens - logged_tokens) / (now - logged)
                metrics.write(outcome.line(run.position, outcome.epoch) | {"tokens_per_s": round(speed, 1)})
                logged, logged_tokens = now, run.position.tokens
            if run.position.step % config.checkpoint_every == 0 or last:
                metrics.sync()
                run.save(rng_states(run.device))
        if interrupts.asked:
            raise KeyboardInterrupt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What one optimizer step did."""

    epoch: int
    learning_rate: float
    loss: float
    terms: dict[str, float]
    """Mean of each term that has weight, over what it counts."""
    grad_norm: float
    tokens: int

    def words(self) -> list[str]:
        return [f"{name} {value:.3f}" for name, value in {"loss": self.loss, **self.terms}.items()]

    def line(self, position: Position, epoch: int) -> dict[str, float | int]:
        return {
            "step": position.step,
            "epoch": epoch,
            "tokens": position.tokens,
            "lr": self.learning_rate,
            "loss": self.loss,
            **self.terms,
            "grad_norm": self.grad_norm,
        }


def _step(run: Run, batches: Iterator[MicroBatch], interrupts: Interrupts) -> _Outcome:
    """Take one optimizer step over its micro-batches; raises Interrupted before anything is changed."""
    config = run.config
    rate = learning_rate(
        run.position.step,
        run.plan.total_steps,
        peak=config.learning_rate,
        schedule=config.schedule,
        warmup=config.warmup,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    seen: list[IndexArray] = []
    sums: list[Tensor] = []
    ended = False
    while not ended:
        if interrupts.asked:
            raise Interrupted
        micro = next(batches)
        assert micro.step == run.position.step
        with autocast(run.device, run.precision):
            output = run.distiller(micro.batch.to(run.device), micro.counts)
        output.loss.backward()
        sums.append(torch.stack([tensor.detach().float() for tensor in output]))
        seen.append(micro.blocks)
        epoch, counts, ended = micro.epoch, micro.counts, micro.ends_step
    norm = nn.utils.clip_grad_norm_(run.parameters(), config.max_grad_norm)
    per_micro = torch.stack(sums)
    # The step waits here for the device (as the loss does, for its rows): nothing may be applied before it is known
    # to be finite.
    values = torch.cat([per_micro.sum(dim=0), norm.detach().float().reshape(1)]).tolist()
    if not all(math.isfinite(value) for value in values):
        raise _non_finite(run.position.step, seen, per_micro, norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return _Outcome(
        epoch=epoch,
        learning_rate=rate,
        loss=values[0],
        terms=_terms(run.distiller, values[1:5], counts),
        grad_norm=values[5],
        tokens=int(counts.kl_tokens),
    )


def _terms(distiller: Distiller, sums: list[float], counts: TermCounts) -> dict[str, float]:
    weights = distiller.weights
    rows = {
        "kl": (weights.kl, distiller.kl_count(counts)),
        "ce": (weights.ce, counts.ce_tokens),
        "cosine": (weights.cosine, counts.hidden_windows),
        "mse": (weights.mse, counts.hidden_windows),
    }
    return {
        name: total / count
        for (name, (weight, count)), total in zip(rows.items(), sums, strict=True)
        if weight > 0 and count > 0
    }


def _non_finite(step: int, seen: list[IndexArray], per_micro: Tensor, norm: Tensor) -> KdpipeError:
    bad = [blocks for blocks, sums in zip(seen, per_micro, strict=True) if not bool(torch.isfinite(sums).all())]
    blocks = [int(block) for piece in bad or seen for block in piece]
    named = ", ".join(str(block) for block in blocks[:32]) + (", ..." if len(blocks) > 32 else "")
    return KdpipeError(
        "non-finite-loss",
        f"step {step}",
        expected="a finite loss and gradient",
        found=f"loss {float(per_micro[:, 0].sum())}, gradient norm {float(norm)} on blocks {named}",
        hint="nothing was applied; start again in another --out with a lower learning rate",
    )


def _finish(run: Run) -> dict[str, Any]:
    """Export the student and write the result."""
    config, student, position = run.config, run.distiller.student, run.position
    lines = read_metrics(config.out)
    last = lines[-1] if lines else {}
    # Of the last step alone, whose blocks are few; the divergence has its factor of the squared temperature.
    figures: dict[str, Any] = {name: last[name] for name in ("loss", "kl", "ce", "cosine", "mse") if name in last}
    result = {
        "steps": position.step,
        "epochs": config.epochs,
        "tokens": position.tokens,
        "seconds": round(position.seconds, 3),
        "tokens_per_s": round(position.tokens / position.seconds, 1) if position.seconds else None,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "last_step": figures,
        "student": STUDENT_NAME,
        "fingerprint": run.identity[0],
    }
    export_student(
        student,
        config.out / STUDENT_NAME,
        tokenizer_folder=run.reader.path / "tokenizer",
        manifest=run.reader.manifest,
        card={  # what is a mapping becomes a section
            "steps": position.step,
            "tokens": position.tokens,
            "last step": figures,
            "Settings": {name: value for name, value in run.identity[1].items() if value is not None},
        },
    )
    write_result(config.out, result)
    logger.info("%s: %d steps, %d tokens, %.1f s", config.out, position.step, position.tokens, position.seconds)
    return result
