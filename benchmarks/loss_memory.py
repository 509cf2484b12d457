"""``python -m benchmarks.loss_memory``: memory and time of the head loss, forward and backward, on this machine.

In: sizes. Out: JSON with, for each form of target and temperature, what the loss adds to the resident memory of its
process at its peak, beyond its inputs and the gradient of the head, and the seconds it takes; and the same of the naive
loss, which makes all logits at once. Float32, random inputs; every case has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from train.distiller import default_chunk_rows
from train.loss_divergences import Divergence
from train.loss_targets import (
    DenseTargets,
    HeadLossTargets,
    HeadRows,
    bucket,
    shared_tails,
    spread,
)
from train.losses import head_loss

KEPT, PROTOTYPES, TEACHER_WIDTH = 16, 64, 576
CASES = {
    "prototype": ("prototype", "forward"),
    "bucket": ("bucket", "forward"),
    "hidden": ("hidden", "forward"),
    "bucket, reverse": ("bucket", "reverse"),
    "bucket, js": ("bucket", "js"),
}


def make_targets(form: str, rows: int, vocab: int, temperature: float) -> HeadLossTargets:
    """Random targets as a cache would give them."""
    if form == "hidden":
        return DenseTargets(
            hidden_ND=torch.randn(rows, TEACHER_WIDTH).half(), weight_VD=torch.randn(vocab, TEACHER_WIDTH), bias_V=None
        )
    ids_NK = torch.rand(rows, vocab // 64).topk(KEPT, dim=1).indices * 64
    logprobs_NK = torch.randn(rows, KEPT).log_softmax(dim=1).sort(dim=1, descending=True).values
    head = HeadRows(ids_NK, logprobs_NK, torch.full((rows,), -1.0))
    if form == "bucket":
        return bucket(head, temperature)
    tails = shared_tails(torch.randn(PROTOTYPES, vocab).softmax(dim=1))
    return spread(head, temperature, tails, torch.randint(PROTOTYPES, (rows,)))


def naive(hidden_ND: Tensor, weight_VD: Tensor, targets_NV: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    """KL and cross-entropy of logits that all exist at once."""
    logits_NV = F.linear(hidden_ND, weight_VD)
    kl = F.kl_div((logits_NV / temperature).log_softmax(dim=1), targets_NV, reduction="sum")
    return 0.9 * temperature**2 * kl + 0.1 * F.cross_entropy(logits_NV, labels_N, reduction="sum")


def peak_status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(step: Callable[[], None]) -> tuple[int, float]:
    """(bytes that a step adds at its peak, seconds that it takes)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_status("VmRSS")
    began = time.perf_counter()
    step()
    return peak_status("VmHWM") - before, time.perf_counter() - began


def run_case(options: argparse.Namespace) -> dict[str, float | int]:
    torch.manual_seed(0)
    rows, vocab, width = options.rows, options.vocab, options.width
    hidden_ND = torch.randn(rows, width, requires_grad=True)
    weight_VD = (0.02 * torch.randn(vocab, width)).requires_grad_()
    labels_N = torch.randint(vocab, (rows,))
    if options.case == "naive":
        targets_NV = torch.full((rows, vocab), 1 / vocab)

        def total(some: slice) -> Tensor:
            return naive(hidden_ND[some], weight_VD, targets_NV[some], labels_N[some], options.temperature)
    else:
        form, kind = CASES[options.case]
        targets = make_targets(form, rows, vocab, options.temperature)

        def total(some: slice) -> Tensor:
            return head_loss(
                hidden_ND[some],
                weight_VD,
                None,
                targets=targets.rows(torch.arange(rows)[some], torch.float32),
                labels_N=labels_N[some],
                kl_mask_N=torch.ones_like(labels_N, dtype=torch.bool)[some],
                temperature=options.temperature,
                kl_scale=0.9 / rows,
                ce_scale=0.1 / rows,
                chunk_rows=options.chunk_rows,
                divergence=Divergence(kind),  # type: ignore[arg-type]
            ).total

    def step(some: slice = slice(None)) -> None:
        hidden_ND.grad = weight_VD.grad = None
        total(some).backward()

    step(slice(8))  # what libraries set up once
    hidden_ND.grad = weight_VD.grad = None
    added, seconds = measure(step)
    head_bytes = weight_VD.numel() * weight_VD.element_size()
    return {"beyond_head_gradient_mb": round((added - head_bytes) / 1e6, 1), "seconds": round(seconds, 3)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--chunk-rows", type=int, help="default: the distiller's")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "naive"], default=[*CASES, "naive"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 2.0])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--temperature", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.chunk_rows = options.chunk_rows or default_chunk_rows(options.vocab, torch.device("cpu"))
    if options.case is not None:
        print(json.dumps(run_case(options)))
        return
    figures: dict[str, dict[str, float | int]] = {}
    for case in options.cases:
        for temperature in options.temperatures:
            command = [sys.executable, "-m", "benchmarks.loss_memory", "--case", case]
            command += ["--temperature", str(temperature)]
            command += ["--rows", str(options.rows), "--vocab", str(options.vocab), "--width", str(options.width)]
            command += ["--chunk-rows", str(options.chunk_rows)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures[f"{case}, T = {temperature:g}"] = json.loads(done.stdout)
    sizes = {name: getattr(options, name) for name in ("rows", "vocab", "width", "chunk_rows")}
    print(json.dumps({**sizes, "threads": torch.get_num_threads(), "cases": figures}, indent=2))


if __name__ == "__main__":
    main()
