"""The command under real launchers: what the documentation says to type, with two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.runs import metric_lines, run_settings, save_run_cache, save_run_teacher
from train.config import TrainConfig
from train.loop import train

ROOT = Path(__file__).parents[2]


def launch(launcher: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *launcher, "-m", "pipeline.cli", "train-student", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_a_launcher_trains_on_two_ranks_and_an_error_is_one_line(tmp_path: Path, name: str) -> None:
    launcher = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                       "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())],
    }[name]  # fmt: skip
    teacher = save_run_teacher(tmp_path / "teacher")
    cache = save_run_cache(tmp_path / "cache", teacher)
    settings = run_settings(cache, teacher, tmp_path / "one") | {"max_steps": 2, "dropout": 0.0}
    train(TrainConfig(**settings), quiet=True)
    arguments = (
        f"--cache {cache} --teacher {teacher} --num-layers 2 --epochs 2 --batch-blocks 2 --accumulate 1 --dropout 0"
        " --window-shards 2 --cosine-weight 0.5 --max-steps 2 --log-every 1 --device cpu --no-tensorboard --json"
    ).split()
    done = launch(launcher, [*arguments, "--temperature", "2", "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"steps": 2') == 1
    for ours, theirs in zip(metric_lines(tmp_path / "two"), metric_lines(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    if name == "torchrun":
        refused = launch(launcher, [*arguments, "--temperature", "3", "--out", str(tmp_path / "never")])
        assert refused.returncode != 0
        ours_only = [line for line in refused.stderr.splitlines() if "undeclared-temperature" in line]
        assert len(ours_only) == 1
        assert ours_only[0].startswith("error: undeclared-temperature")
        assert "exitcode  : 3" in refused.stderr
