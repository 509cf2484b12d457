"""SIGKILL at each step that touches the disk: whatever was acknowledged stays, and a resume ends with equal arrays."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cache_spec.validate import verify_cache
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from tests.integration.test_capture import contents
from tests.models import make_folder, write_words

STEPS = ("fsync", "link", "replace", "unlink")


def capture_until_killed(config: CaptureConfig, kill_at: int) -> None:
    """Run in a forked child: die without warning just before the n-th of the calls that change the disk."""
    calls = 0

    def deadly(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, deadly(getattr(os, name)))
    capture(config, quiet=True)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("encoding", "every"),
    [({"encoding": "topk", "k": 4}, 11), ({"encoding": "prototype", "k": 4, "prototypes": 2, "residual_draws": 2}, 37)],
)
def test_a_kill_at_any_step_loses_nothing(tmp_path: Path, encoding: dict[str, Any], every: int) -> None:
    teacher = make_folder(tmp_path / "teacher", spread=4.0, n_layer=1)
    text = write_words(tmp_path / "text.jsonl", num_documents=4)

    def config(name: str) -> CaptureConfig:
        return CaptureConfig(
            teacher=str(teacher),
            text=(str(text),),
            out=tmp_path / name,
            block_tokens=16,
            **encoding,
            hidden_window=8,
            shard_blocks=5,
            device="cpu",
        )

    capture(config("clean"), quiet=True)
    expected = contents(tmp_path / "clean")
    fork = multiprocessing.get_context("fork")
    kills = 0
    for kill_at in range(1, 1000, every):
        child = fork.Process(target=capture_until_killed, args=(config(f"killed-{kill_at}"), kill_at))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        capture(config(f"killed-{kill_at}"), quiet=True)
        assert contents(tmp_path / f"killed-{kill_at}") == expected, f"killed at call {kill_at}"
    assert kills > 60 / every
    assert verify_cache(tmp_path / "killed-1") == []
