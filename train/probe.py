"""A few steps of a student, timed: the code that ``train-student`` runs, from a small cache on the real disk.

In: settings of a run, and how many steps to take. Out: seconds of each step, from the cache and from the text alone. It
runs in a process of its own, which is timed from outside.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from train.config import TrainConfig
from train.family_config import CONTROL_SETTINGS
from train.loop import train
from train.run_files import read_metrics

_ENOUGH_EPOCHS = 1 << 16
# What a probe leaves out: it would be measured or written elsewhere.
_LEFT_OUT = ("evaluate_cache", "evaluate_every", "wandb", "max_tokens", "max_hours", "max_steps", "copy_folder")


def probe(order: dict[str, Any]) -> dict[str, Any]:
    """Train for some steps from the cache, then for fewer from its text, and say what they took.

    ``order``: ``settings`` of ``TrainConfig`` with a cache and a new folder, and ``steps``.
    """
    settings = {name: value for name, value in order["settings"].items() if name not in _LEFT_OUT}
    out, num_steps = Path(settings["out"]), order["steps"]
    common = {
        "epochs": _ENOUGH_EPOCHS,
        "accumulate": 1,
        "log_every": 1,
        "checkpoint_every": _ENOUGH_EPOCHS,
    }
    config = TrainConfig.model_validate({**settings, **common, "max_steps": num_steps})
    began, cpu_began = time.perf_counter(), time.process_time()
    with _optimizer_timed() as optimizer_s:
        result = train(config, quiet=True)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    steps = _steps(out)
    # The same without a teacher; its own start is no part of what a cached run takes.
    few = {"max_steps": max(2, num_steps // 2), "out": out.with_name("text")}
    alone = {**settings, **CONTROL_SETTINGS, **common, **few}
    began = time.perf_counter()
    train(TrainConfig.model_validate(alone), quiet=True)
    extra_s = time.perf_counter() - began
    # A process that is warm already has no slow first step.
    text = _steps(out.with_name("text"))
    return {
        "parameters": result["parameters"],
        "step_s": [seconds for seconds, _ in steps],
        "step_tokens": [tokens for _, tokens in steps],
        "optimizer_s": statistics.median(optimizer_s),
        "cross_entropy_token_s": statistics.median([s / tokens for s, tokens in text[1:] or text]),
        "train_s": wall_s,
        "extra_s": extra_s,
        "cpu_share": cpu_s / (wall_s * torch.get_num_threads()),
    }


def _steps(out: Path) -> list[tuple[float, int]]:
    """Seconds and tokens of each step of a run that wrote a line for each."""
    lines = read_metrics(out)
    tokens = [0, *(int(line["tokens"]) for line in lines)]
    counts = [after - before for before, after in itertools.pairwise(tokens)]
    return [(count / line["tokens_per_s"], count) for count, line in zip(counts, lines, strict=True)]


def _wait_for_device() -> None:
    """Kernels on CUDA run after the call that asks for them."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _optimizer_timed() -> Iterator[list[float]]:
    """Seconds of each step of any optimizer."""
    seconds: list[float] = []
    began = [0.0]

    def start(*_: Any) -> None:
        _wait_for_device()
        began[0] = time.perf_counter()

    def end(*_: Any) -> None:
        _wait_for_device()
        seconds.append(time.perf_counter() - began[0])

    hooks = [register_optimizer_step_pre_hook(start), register_optimizer_step_post_hook(end)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()
