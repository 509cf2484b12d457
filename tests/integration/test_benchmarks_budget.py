"""The benchmark of a fixed time: its contenders learn alike but for where targets come from, and it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.budget import __main__ as budget
from benchmarks.budget import ways
from benchmarks.budget.text import ENCODING, make_text_cache
from benchmarks.budget.ways import CACHED, ONLINE, TEXT, tokens_for, train_online
from benchmarks.training.contenders import OnlineLoop, Task
from benchmarks.workers import Process
from cache_spec.reader import CacheReader
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from tests.integration.test_benchmarks import run
from tests.models import make_folder, write_words
from train.loop import train
from train.schedule import rate_at

T = 16


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("teacher"), "llama", std=0.3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "text.jsonl")


def capture_settings(teacher: Path, text: Path, out: Path) -> dict[str, Any]:
    return {"teacher": str(teacher), "text": [str(text)], "out": out, "block_tokens": T, "shard_blocks": 4}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, teacher: Path, text: Path) -> tuple[Path, Path]:
    """The text without a teacher, and with all that the teacher says of it."""
    folder = tmp_path_factory.mktemp("caches")
    make_text_cache(CaptureConfig(**capture_settings(teacher, text, folder / "text"), **ENCODING))
    exact = {"encoding": "hidden", "temperatures": (1.0,), "hidden_window": 0, "last_hidden_dtype": "float16"}
    capture(CaptureConfig(**capture_settings(teacher, text, folder / "exact"), **exact), quiet=True)
    return folder / "text", folder / "exact"


def loaded(task: Task) -> OnlineLoop:
    loop = OnlineLoop(task)
    loop.load()
    return loop


def test_a_text_cache_has_the_tokens_and_the_order_of_a_captured_one(caches: tuple[Path, Path]) -> None:
    ours, captured = (CacheReader.open(path) for path in caches)
    assert ours.manifest.corpus == captured.manifest.corpus
    blocks = np.arange(ours.manifest.blocks.num_blocks)
    assert len(blocks) > 4
    batch = ours.batch(blocks, 1.0)
    ids_BT = captured.read("input_ids", blocks)
    assert np.array_equal(batch.input_ids_BT, ids_BT)
    targets: Any = batch.targets
    assert np.array_equal(targets.ids_BTJ[:, :-1, 0], ids_BT[:, 1:])
    assert (targets.probs_BTJ == 1).all()


def test_the_online_loop_takes_the_steps_of_the_product_with_an_exact_cache(
    caches: tuple[Path, Path], teacher: Path, tmp_path: Path
) -> None:
    found = []
    for way, cache in ((ONLINE, caches[0]), (CACHED, caches[1])):
        student = {"num_layers": 1, "learning_rate": 0.01, "warmup": 0.5}
        task = Task(cache=str(cache), teacher=str(teacher), student=student, batch_blocks=2)
        config = task.config(tmp_path / way, distils=True, max_steps=4)
        result = train_online(loaded(task), config) if way == ONLINE else train(config, quiet=True)
        assert (result["steps"], result["tokens"]) == (4, 4 * 2 * T)
        found.append(load_file(tmp_path / way / "student" / "model.safetensors"))
    start = load_file(teacher / "model.safetensors")
    moved = max(float((tensor - start[name][: len(tensor)]).abs().max()) for name, tensor in found[1].items())
    assert moved > 0.01
    for name, tensor in found[0].items():
        # AdamW makes much of the last bits of a small gradient, and states are kept in 16 bits.
        assert torch.allclose(tensor, found[1][name], atol=0.02 * moved), name


def test_the_online_loop_stops_and_cools_down_with_its_hours(
    caches: tuple[Path, Path], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        seconds = 0.0

        def perf_counter(self) -> float:
            self.seconds += 3600.0
            return self.seconds

    rates = []

    def noted(*given: Any) -> float:
        rates.append(rate_at(*given))
        return rates[-1]

    monkeypatch.setattr("benchmarks.budget.ways.time", Clock())
    monkeypatch.setattr("benchmarks.budget.ways.rate_at", noted)
    student = {"num_layers": 1, "learning_rate": 1.0, "warmup": 0.0}
    task = Task(cache=str(caches[0]), teacher=str(teacher), student=student, batch_blocks=2)
    result = train_online(loaded(task), task.config(tmp_path, distils=True, max_hours=3.5))
    assert (result["steps"], result["seconds"]) == (4, 4 * 3600.0)
    assert rates == pytest.approx([1 - hours / 3.5 for hours in range(4)], abs=1e-4)


def test_the_students_are_those_of_the_shipped_file(monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--teacher", "t", "--text", "t", "--held-out", "h", "--minutes", "1", "--work", "w"]
    monkeypatch.setattr("sys.argv", ["budget", *common])
    students = budget._students(budget._options())
    assert len(students) == 3
    for student in students.values():
        task = Task(cache="c", teacher="t", student=student, batch_blocks=2)
        config = task.config(Path("out"), distils=True, max_hours=1.0)
        assert (config.kl_weight, config.batch_blocks, config.learning_rate) == (0.9, 2, 6e-4)
        assert config.num_layers in (4, 6)
    monkeypatch.setattr("sys.argv", ["budget", *common, "--students", "layers-99"])
    with pytest.raises(SystemExit, match="layers-99"):
        budget._students(budget._options())


@pytest.mark.parametrize(
    ("seconds", "expected"), [(100.0, 608), (20.0, 96), (0.0, 48)], ids=["long", "all for calibration", "spent"]
)
def test_a_capture_fits_its_time_with_the_pass_for_calibration(seconds: float, expected: int) -> None:
    assert tokens_for(seconds, 10.0, calibration_tokens=390, block_tokens=16, least=40) == expected


class Worker(Process):
    """Starts a process for its first order alone: the others are told as if they came through a pipe."""

    started = 0

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        Worker.started += 1
        if Worker.started > 1:
            answer: dict[str, Any] = getattr(ways.Worker(), do)(**json.loads(json.dumps(order)))
            return answer
        super().__init__(*self.arguments, **self.named)
        try:
            return super().ask(do, **order)
        finally:
            super().close()

    def __init__(self, *arguments: str, **named: Any) -> None:
        self.arguments, self.named = arguments, named

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_the_budget_benchmark_charges_the_first_student_and_goes_on(
    teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = tmp_path / "sizes.yaml"
    sizes.write_text("students: {one: {num_layers: 1}, two: {num_layers: 2}}\n")
    held_out = write_words(tmp_path / "held-out.jsonl", seed=1)
    common = ("--teacher", teacher, "--text", text, "--held-out", held_out, "--work", tmp_path / "work")
    sized = ("--sizes", sizes, "--students", "one", "two", "--block-tokens", T, "--held-out-tokens", 96)
    capture = ("--capture-settings", json.dumps({"k": 4, "prototypes": 3, "hidden_window": 4, "shard_blocks": 4}))
    monkeypatch.setattr(budget, "Process", Worker)
    # Less than anything needs to start: each contender has the one step that is always taken.
    arguments = (*common, *sized, *capture, "--minutes", 1e-6, "--threads", 1, "--text-tokens", 320)
    report = run(budget, capsys, monkeypatch, *arguments)
    results = {(result["student"], result["way"]): result for result in report["results"]}
    assert list(results) == [(student, way) for student in ("one", "two") for way in (TEXT, ONLINE, CACHED)]
    for (student, way), result in results.items():
        assert (result["steps"], result["tokens"], result["distinct_tokens"]) == (1, 2 * T, 2 * T)
        assert result["epochs"] == pytest.approx(2 * T / (320 if way != CACHED else result["data"]["tokens"]), abs=1e-3)
        paid = result["data"]["seconds"] if way != CACHED or student == "one" else 0.0
        assert (result["data_s"], result["spent_s"] - result["process_s"]) == (paid, pytest.approx(paid, abs=1e-2))
        assert (result["kl_to_teacher"] > 0.001) == (student == "one"), "the other is all of the teacher"
    assert results["one", CACHED]["data"]["tokens"] == 4 * T
    assert report["encoding"]["prototypes"] == 3
    # What is there is not done again, and other settings are another folder's.
    monkeypatch.setattr(budget, "Process", None)
    assert run(budget, capsys, monkeypatch, *arguments)["results"] == report["results"]
    with pytest.raises(SystemExit, match="minutes was 1e-06"):
        run(budget, capsys, monkeypatch, *arguments, "--minutes", 1)
