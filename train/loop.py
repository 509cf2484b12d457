"""One training run: a `TrainConfig` comes in, a run folder with checkpoints, metrics and the exported student goes out.

The same command goes on where a killed run stopped; on the CPU in fp32 it ends with bitwise the same weights.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from cache_spec.reader import CacheReader
from train.batches import ahead, micro_batches
from train.budget import is_spent
from train.checkpoint import Position
from train.config import TrainConfig
from train.evaluation.held_out import HeldOut
from train.export import export_student
from train.inheritance import inheritance
from train.interrupts import Interrupted, Interrupts
from train.memory import out_of_memory_at
from train.progress import Progress
from train.ranks import Ranks, joined
from train.run import Run, loss_weights, open_run, pick_device, pick_precision, run_identity
from train.run_files import CHECKPOINTS_NAME, EVALUATION, STUDENT_NAME, read_metrics
from train.run_folder import claimed, finished_result, goes_on, write_result
from train.steps import take_step
from train.student import quiet_transformers
from train.writer import CheckpointWriter

logger = logging.getLogger("kdpipe")

_TERMS = ("loss", "kl", "ce", "cosine", "mse")
# Of Ctrl-C both the terminal and the launcher tell every rank.
_SAME_INTERRUPT_S = 5.0


def train(config: TrainConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Train one student from one cache, or go on with it, and return the figures of ``result.json``.

    Started by ``torchrun`` or ``accelerate launch``, each process calls this, and all return the same. Raises
    KdpipeError for what the user can mend. SIGINT and SIGTERM leave a checkpoint and raise KeyboardInterrupt.
    """
    # transformers gives advice on padding, of which blocks have none that a loss sees.
    with joined(pick_device(config.device).type) as ranks, quiet_transformers():
        return _train(config, ranks, quiet=quiet)


def _train(config: TrainConfig, ranks: Ranks, *, quiet: bool) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        result: dict[str, Any] | None = None
        held_out: HeldOut | None = None
        with ranks.together():
            reader = CacheReader.open(config.cache, config)
            weights = loss_weights(config, reader)
            device = ranks.device(pick_device(config.device))
            precision = pick_precision(config.precision, device)
            identity = run_identity(config, reader, precision, ranks.num_ranks)
            if config.evaluate_cache is not None:
                held_out = HeldOut(config.evaluate_cache, reader=reader, config=config)
            if ranks.is_first:
                stack.enter_context(claimed(config.out))
                if goes_on(config.out, identity):
                    result = _final_result(config)
        result = ranks.share(result)
        if result is not None:
            logger.info("%s is finished already: nothing to do", config.out)
            return result
        with out_of_memory_at(f"start on {device}"):
            run = open_run(config, reader, weights, ranks, device, precision, identity)
        _take_steps(run, held_out, quiet=quiet)
        with out_of_memory_at("export of the student", hint="the same command goes on from the last checkpoint"):
            return _finish(run)


def _final_result(config: TrainConfig) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do; a larger budget of hours is something to do."""
    result = finished_result(config.out)
    if result is None or result.get("stopped_by") != "max_hours" or is_spent(result["seconds"], config.max_hours):
        return result
    return None


def _take_steps(run: Run, held_out: HeldOut | None, *, quiet: bool) -> None:
    """Train until the last step is taken, or the budget of hours is spent, and kept."""
    config, plan, start = run.config, run.plan, run.position
    if start.step >= plan.total_steps or is_spent(start.seconds, config.max_hours):
        return
    items = micro_batches(
        run.reader,
        plan,
        first_step=start.step,
        temperature=config.temperature,
        seed=config.seed,
        window_shards=config.window_shards,
        rank=run.ranks.rank,
        draws_per_step=config.draws_per_step,
        with_hidden=run.distiller.peak_weights.uses_hidden,
        masked_only=config.kl_positions == "masked",
        pin_memory=run.device.type == "cuda",
    )
    with contextlib.ExitStack() as stack:
        writer = CheckpointWriter(config.out / CHECKPOINTS_NAME, in_background=config.async_checkpoint)
        stack.callback(writer.close)
        progress = stack.enter_context(Progress(run, quiet=quiet))
        batches = stack.enter_context(contextlib.closing(ahead(items, config.read_ahead)))
        interrupts = stack.enter_context(Interrupts(0.0 if run.ranks.is_alone else _SAME_INTERRUPT_S))
        began = time.perf_counter()
        last = False
        while not last:
            step = run.position.step
            try:
                with out_of_memory_at(f"step {step} on {run.device}"):
                    outcome = take_step(run, batches, interrupts, writer.check)
            except Interrupted:
                # The weights are those of the step before.
                run.optimizer.zero_grad(set_to_none=True)
                _keep(run, writer, progress)
                writer.wait()
                logger.info("stopped after step %d: the same command goes on from there", step)
                raise KeyboardInterrupt from None
            epoch, samples = plan.start_of(step + 1)
            run.position = Position(
                step=step + 1,
                epoch=epoch,
                samples=samples,
                tokens=run.position.tokens + outcome.tokens,
                seconds=run.ranks.of_first(start.seconds + time.perf_counter() - began),
            )
            last = step + 1 == plan.total_steps or is_spent(run.position.seconds, config.max_hours)
            progress.took_step(outcome, last=last)
            if held_out is not None and (last or (step + 1) % (config.evaluate_every or plan.total_steps) == 0):
                with out_of_memory_at(f"evaluation on {run.device}"):
                    _evaluate(run, held_out, progress)
            if (step + 1) % config.checkpoint_every == 0 or last:
                _keep(run, writer, progress)
        writer.wait()
        if interrupts.asked:
            raise KeyboardInterrupt


def _keep(run: Run, writer: CheckpointWriter, progress: Progress) -> None:
    """Write a checkpoint of where the run stands, after the metrics that it knows of."""
    snapshot = run.snapshot(copies=run.config.async_checkpoint)
    with run.ranks.together():
        if run.ranks.is_first:
            progress.sync()
            writer.write(snapshot)


def _evaluate(run: Run, held_out: HeldOut, progress: Progress) -> None:
    student = run.whole_student()
    with run.ranks.together():
        if run.ranks.is_first:
            progress.evaluated(held_out.figures(student))


def _finish(run: Run) -> dict[str, Any]:
    """Export the student and write the result."""
    student = run.whole_student()
    result: dict[str, Any] = {}
    with run.ranks.together():
        if run.ranks.is_first:
            result = _result(run)
            manifest, tokenizer_folder = run.reader.manifest, run.reader.path / "tokenizer"
            card = _card(run, result) | {"What it inherits": inheritance(manifest, run.reader.path)}
            export_student(
                student, run.config.out / STUDENT_NAME, tokenizer_folder=tokenizer_folder, manifest=manifest, card=card
            )
            write_result(run.config.out, result)
    position = run.position
    logger.info("%s: %d steps, %d tokens, %.1f s", run.config.out, position.step, position.tokens, position.seconds)
    return run.ranks.share(result)


def _result(run: Run) -> dict[str, Any]:
    config, position = run.config, run.position
    last, evaluation = _last_figures(config.out)
    result = {
        "steps": position.step,
        "stopped_by": _stopped_by(run),
        "epochs": config.epochs,
        "tokens": position.tokens,
        "seconds": round(position.seconds, 3),
        "tokens_per_s": round(position.tokens / position.seconds, 1) if position.seconds else None,
        "parameters": sum(parameter.numel() for parameter in run.distiller.student.parameters()),
        # Of the last step alone, whose blocks are few; the divergence has its factor of the squared temperature.
        "last_step": last,
        "student": STUDENT_NAME,
        "fingerprint": run.identity[0],
    }
    return result | ({"evaluation": evaluation} if evaluation else {})


def _stopped_by(run: Run) -> str:
    """Why there are no more steps."""
    config, plan = run.config, run.plan
    if run.position.step < plan.total_steps:
        return "max_hours"
    if plan.total_steps == config.epochs * plan.steps_per_epoch:
        return "epochs"
    return "max_steps" if plan.total_steps == config.max_steps else "max_tokens"


def _last_figures(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of the last step that has a line, and of the last evaluation."""
    lines = read_metrics(out)
    last: dict[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
    prefix = f"{EVALUATION}/"
    found: dict[str, Any] = next((line for line in reversed(lines) if f"{prefix}loss" in line), {})
    evaluation = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    return {name: last[name] for name in _TERMS if name in last}, evaluation


def _card(run: Run, result: dict[str, Any]) -> dict[str, object]:
    """What the student's model card says of its training; what is a mapping becomes a section."""
    return {
        "steps": result["steps"],
        "stopped by": result["stopped_by"],
        "tokens": result["tokens"],
        "last step": result["last_step"],
        "Evaluation on held-out text": result.get("evaluation", {}),
        "Settings": {name: value for name, value in run.identity[1].items() if value is not None},
    }
