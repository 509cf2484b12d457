"""One optimizer step: a run and its micro-batches come in, moved weights and what the step measured go out.

All random numbers of a pass follow from the seed, the step and the micro-batch, so that neither an interruption nor the
number of ranks changes what dropout leaves out.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cache_spec.errors import KdpipeError
from train.batches import MicroBatch
from train.budget import schedule_step
from train.checkpoint import Position
from train.distil_batch import TermCounts
from train.distiller import Distiller
from train.interrupts import Interrupted, Interrupts
from train.order import IndexArray
from train.parallel import one_pass, whole
from train.ranks import Ranks
from train.run import Run, autocast
from train.schedule import rate_at, scheduled_weights, weights_at
from train.student_modes import compiling

_GO_ON, _STOP, _FAIL = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one optimizer step did."""

    epoch: int
    learning_rate: float
    loss: float
    terms: dict[str, float]
    """Mean of each term that has weight, over what it counts."""
    weights: dict[str, float]
    """Of those terms whose weight follows a schedule."""
    grad_norm: float
    tokens: int
    wait_s: float
    """Seconds that the step waited for its data."""

    def words(self) -> list[str]:
        """The loss and its terms, for the progress bar."""
        return [f"{name} {value:.3f}" for name, value in {"loss": self.loss, **self.terms}.items()]

    def line(self, position: Position) -> dict[str, float | int]:
        """The step's line of metrics."""
        return {
            "step": position.step,
            "epoch": self.epoch,
            "tokens": position.tokens,
            "lr": self.learning_rate,
            "loss": self.loss,
            **self.terms,
            **self.weights,
            "grad_norm": self.grad_norm,
            "wait_s": round(self.wait_s, 6),
        }


def take_step(run: Run, batches: Iterator[MicroBatch], interrupts: Interrupts, check: Callable[[], None]) -> Outcome:
    """Take one optimizer step over its micro-batches; raises Interrupted before anything is changed.

    ``check`` raises what went wrong behind the step's back.
    """
    config, ranks = run.config, run.ranks
    rate = set_schedules(run)
    seen: list[IndexArray] = []
    sums: list[Tensor] = []
    ended, wait_s = False, 0.0
    while not ended:
        began = time.perf_counter()
        micro = _next_micro(ranks, batches, interrupts, check)
        wait_s += time.perf_counter() - began
        assert micro.step == run.position.step
        torch.manual_seed(pass_seed(config.seed, micro.step, micro.number))
        with one_pass(run.model, last=micro.ends_step):
            with autocast(run.device, run.precision), compiling(config):
                output = run.model(micro.batch.to(run.device), micro.counts)
            # Gradients are averaged over ranks, and the losses of all ranks add up.
            (output.loss if ranks.is_alone else output.loss * ranks.num_ranks).backward()
        sums.append(torch.stack([tensor.detach().float() for tensor in output]))
        seen.append(micro.blocks)
        epoch, counts, ended = micro.epoch, micro.counts, micro.ends_step
    norm = whole(nn.utils.clip_grad_norm_(run.parameters(), config.max_grad_norm))
    per_micro = torch.stack(sums)
    # The step waits here for the device (as the loss does, for its rows): nothing may be applied before it is known
    # to be finite.
    values = torch.cat([ranks.sum(per_micro.sum(dim=0)), norm.detach().float().reshape(1)]).tolist()
    if not all(math.isfinite(value) for value in values):
        raise _non_finite(run, seen, per_micro, values)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return Outcome(
        epoch=epoch,
        learning_rate=rate,
        loss=values[0],
        terms=_terms(run.distiller, values[1:5], counts),
        weights=scheduled_weights(config, run.distiller.weights),
        grad_norm=values[-1],
        tokens=int(counts.tokens),
        wait_s=wait_s,
    )


def set_schedules(run: Run) -> float:
    """Set the step's learning rate and loss weights; returns the rate."""
    config = run.config
    total_steps = run.plan.total_steps
    step = schedule_step(run.position.step, total_steps, seconds=run.position.seconds, max_hours=config.max_hours)
    rate = rate_at(config, step, total_steps)
    run.distiller.weights = weights_at(config, run.distiller.peak_weights, step, total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    return rate


def pass_seed(seed: int, step: int, number: int) -> int:
    """Seed of the random numbers of micro-batch ``number`` of a step, whichever rank computes it."""
    digest = hashlib.sha256(f"pass\n{seed}\n{step}\n{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _next_micro(
    ranks: Ranks, batches: Iterator[MicroBatch], interrupts: Interrupts, check: Callable[[], None]
) -> MicroBatch:
    """The next micro-batch, where all ranks go on; all stop where one was asked to, and all fail where one did."""
    micro: MicroBatch | None = None
    failure: Exception | None = None
    try:
        check()
        micro = next(batches)
    except Exception as error:
        if ranks.is_alone:
            raise
        failure = error
    status = ranks.largest(_FAIL if failure else _STOP if interrupts.asked else _GO_ON)
    if status == _FAIL:
        ranks.agree(failure)
    if status == _STOP:
        raise Interrupted
    assert micro is not None
    return micro


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


def _non_finite(run: Run, seen: list[IndexArray], per_micro: Tensor, values: list[float]) -> KdpipeError:
    """Every rank's error, which rank 0 says; it names the blocks of all."""
    bad = [blocks for blocks, sums in zip(seen, per_micro, strict=True) if not bool(torch.isfinite(sums).all())]
    told = run.ranks.gather(([int(b) for piece in bad for b in piece], [int(b) for piece in seen for b in piece]))
    blocks = [b for of_rank, _ in told for b in of_rank] or [b for _, of_rank in told for b in of_rank]
    named = ", ".join(str(block) for block in blocks[:32]) + (", ..." if len(blocks) > 32 else "")
    error = KdpipeError(
        "non-finite-loss",
        f"step {run.position.step}",
        expected="a finite loss and gradient",
        found=f"loss {values[0]}, gradient norm {values[-1]} on blocks {named}",
        hint="nothing was applied; start again in another --out with a lower learning rate",
    )
    error.said_elsewhere = not run.ranks.is_first
    return error
