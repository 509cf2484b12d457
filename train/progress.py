"""What a run tells while it goes on: outcomes of steps come in, a progress bar and lines of metrics go out.

Rank 0 alone tells.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from train.run import Run
from train.run_files import EVALUATION
from train.run_folder import Metrics
from train.steps import Outcome


class Progress:
    """The bar and the metrics of one run, from where it stands now; a context."""

    def __init__(self, run: Run, *, quiet: bool) -> None:
        self._run = run
        self._tokens = self._logged_tokens = run.position.tokens
        self._began = self._logged = time.perf_counter()
        self._metrics: Metrics | None = None
        first = run.ranks.is_first
        if first:
            config = run.config
            self._metrics = Metrics(
                config.out,
                last_step=run.position.step,
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                settings=run.identity[1],
            )
        self._bar: tqdm[Any] = tqdm(
            total=run.plan.total_steps,
            initial=run.position.step,
            unit="step",
            desc="train",
            disable=(quiet or None) if first else True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()
        if self._metrics is not None:
            self._metrics.close()

    def took_step(self, outcome: Outcome, *, last: bool) -> None:
        """Show a step that was taken, and write it down where a line is due."""
        position, now = self._run.position, time.perf_counter()
        speed = (position.tokens - self._tokens) / (now - self._began)
        self._bar.set_postfix_str(" ".join([f"{speed:,.0f} tokens/s", *outcome.words()]), refresh=False)
        self._bar.update()
        if self._metrics is not None and (position.step % self._run.config.log_every == 0 or last):
            speed = (position.tokens - self._logged_tokens) / (now - self._logged)
            self._metrics.write(outcome.line(position) | {"tokens_per_s": round(speed, 1)})
            self._logged, self._logged_tokens = now, position.tokens

    def evaluated(self, figures: dict[str, float]) -> None:
        """Write down figures on the held-out cache."""
        if self._metrics is not None:
            named = {f"{EVALUATION}/{name}": value for name, value in figures.items()}
            self._metrics.write({"step": self._run.position.step} | named)
            self._bar.write(
                f"step {self._run.position.step}, held out: "
                + ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            ) if not self._bar.disable else None

    def sync(self) -> None:
        """Make all lines durable."""
        if self._metrics is not None:
            self._metrics.sync()
