"""``kdpipe plan``: the report by formula and from a probe, its lines, and a refusal for each thing that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import planning
from cache_spec.errors import KdpipeError, WouldLoseDataError
from pipeline import cli
from pipeline.plan import probe as capture_probe
from pipeline.plan.children import ask
from pipeline.plan.config import PlanConfig
from pipeline.plan.measured import Probed, capture_settings, measured_rates
from pipeline.plan.presets import PRESETS, preset
from tests.integration.test_benchmarks import run
from tests.models import make_folder, write_words
from tests.unit.test_plan_curve import family
from train import probe as training_probe

SIZES = ["--block-tokens", "16", "--hidden-window", "4", "--capture-batch-blocks", "2", "--shard-blocks", "4"]
TOPK = ["--encoding", "topk", "--k", "4"]
KEYS = {"assumptions", "calibrated", "cache", "capture", "students", "totals", "break_even", "budget", "curve"}


def kdpipe(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run(["plan", *map(str, arguments)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "text.jsonl")


def test_the_papers_run_is_planned_from_names_alone(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--teacher", "gpt2", "--student", 6, "--tokens", 2_000_000_000, "--epochs", 4, "--device", "rtx3090"]
    rates = ["--watts", 350, "--price-per-kwh", 0.3, "--co2-per-kwh", 0.4]
    code, out, err = kdpipe(capsys, *flags, *rates, "--budget-hours", 30, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert set(facts) >= KEYS
    assert facts["teacher"]["parameters"] == 124_439_808
    (student,) = facts["students"]
    assert student["parameters"] == 81_912_576
    assert student["online"]["hours"] > student["hours"] >= student["cross_entropy"]["hours"]
    cache = facts["cache"]
    assert cache["bytes"] == pytest.approx(sum(cache["bytes_by_array"].values()) + cache["table_bytes"], abs=100)
    assert facts["totals"]["cached_hours"] == pytest.approx(facts["capture"]["hours"] + student["hours"])
    assert facts["totals"]["kwh"]["online"] == pytest.approx(0.35 * facts["totals"]["online_hours"])
    assert facts["break_even"]["epochs"] == 2
    assert facts["budget"]["tokens_affordable"] > facts["budget"]["tokens_affordable_online"]
    assert all(one.keys() == {"name", "value", "unit", "source"} and one["source"] for one in facts["assumptions"])
    assert not facts["calibrated"]
    code, out, _ = kdpipe(capsys, *flags, *rates, "--device", "h100")
    assert code == 0
    for words in ("gpt2, 124,439,808 parameters", "break-even", "a MODEL", "assumptions", "kWh", "h100"):
        assert words in out


def test_shipped_configs_are_the_published_models() -> None:
    millions = {
        "gpt2": 124,
        "gpt2-medium": 355,
        "gpt2-large": 774,
        "gpt2-xl": 1558,
        "llama-7b": 6738,
        "mistral-7b": 7242,
    }
    millions |= {"smollm2-135m": 135, "smollm2-360m": 362, "smollm2-1.7b": 1711, "llama-3-8b": 8030, "qwen2.5-7b": 7616}
    assert set(millions) == set(PRESETS)
    for name in PRESETS:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(preset(name))
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions[name]
    assert preset("abacus") is None


def test_text_is_counted_and_a_recipe_may_say_it_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: Path, text: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"plan:\n  teacher: {teacher}\n  student: [1, '{{\"n_embd\": 16}}']\n  text: {text}\n  block-tokens: 16\n"
        "  hidden-window: 4\n  device: h100\n"
    )
    code, out, err = kdpipe(capsys, "--config", recipe, "--epochs", 2, "--json")
    assert code == 0, err
    facts = json.loads(out)
    # 12 documents of 40 words, and what ends each; whole blocks of 16.
    assert facts["cache"]["tokens"] == 12 * 41 // 16 * 16
    assert [student["epochs"] for student in facts["students"]] == [2, 2]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--tokens", 1024], 2, "--teacher is required"),
        (["--teacher", "gpt2", "--tokens", 1024], 2, "--student is required"),
        (["--teacher", "gpt2", "--student", 1], 2, "give tokens or text"),
        (["--teacher", "gpt2", "--student", 1, "--tokens", 9], 2, "less than one block"),
        (["--teacher", "gpt2", "--student", 1, "--tokens", 1024, "--co2-per-kwh", 1], 2, "co2_per_kwh needs watts"),
        (["--teacher", "gpt2", "--student", 1, "--tokens", 1024, "--probe-seconds", 1], 2, "needs calibrate"),
        (
            ["--teacher", "gpt2", "--student", 1, "--tokens", 1024, "--calibrate", "--device", "h100"],
            2,
            "device means nothing with calibrate",
        ),
        (["--teacher", "./none", "--student", 1, "--tokens", 1024], 3, "unknown-model: teacher ./none"),
        (["--teacher", "gpt2", "--student", 13, "--tokens", 1024], 3, "bad-student-config: student layers-13"),
        (["--teacher", "gpt2", "--student", "smollm2-135m", "--tokens", 1024], 3, "student-vocabulary"),
        (["--teacher", "gpt2", "--student", 1, "--tokens", 4096, "--block-tokens", 2048], 3, "block-too-long"),
        (["--teacher", "gpt2", "--student", 1, "--text", "a.txt"], 3, "no-tokenizer: teacher gpt2"),
        (["--teacher", "gpt2", "--student", 1, "--tokens", 1024, "--device", "abacus"], 3, "unknown-device: abacus"),
        (["--teacher", "gpt2", "--student", "none.yaml", "--tokens", 1024], 3, "unknown-recipe: none.yaml"),
        (["--teacher", "gpt2", "--student", 1, "--tokens", 1024, "--runs", "none"], 3, "not-a-family: none"),
        (["--teacher", "gpt2", "--student", 1, "--tokens", 1024, "--k", 60_000], 3, "bad-encoding"),
        (
            ["--teacher", "gpt2", "--student", 1, "--tokens", 1024, "--calibrate", "--probe-folder", "none"],
            3,
            "no-such-folder: none",
        ),
    ],
)
def test_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str], flags: list[object], code: int, words: str) -> None:
    found, out, err = kdpipe(capsys, *flags)
    assert (found, out) == (code, "")
    last = err.strip().splitlines()[-1]
    assert words in last
    assert code == 2 or len(err.strip().splitlines()) == 1


def test_a_probe_times_what_the_commands_run_and_its_bytes_are_real(tmp_path: Path, teacher: Path, text: Path) -> None:
    settings = {"teacher": str(teacher), "student": ["1"], "tokens": 4096, "text": [str(text)], "calibrate": True}
    settings |= {"block_tokens": 16, "hidden_window": 4, "capture_batch_blocks": 2, "shard_blocks": 4}
    config = PlanConfig.model_validate({**settings, "k": 4, "prototypes": 3, "calibration_tokens": 64})
    order = {"settings": capture_settings(config, tmp_path / "cache"), "seconds": 0.01, "least_blocks": 6}
    told = capture_probe.probe(order) | {"peak_bytes": 1000}
    assert told["blocks"] % 2 == 0
    assert told["tokens"] == 16 * told["blocks"]
    assert len(told["batch_s"]) * 2 == told["blocks"]
    assert told["learnt_batch_tokens"] == 32
    assert 0 < told["forward_token_s"] < told["token_s"]
    assert set(told["table_bytes"]) == {"prototype_classifier", "prototypes"}
    train = {"cache": str(tmp_path / "cache"), "out": str(tmp_path / "run"), "teacher": str(teacher), "num_layers": 1}
    train |= {"batch_blocks": 2, "device": "cpu", "tensorboard": False, "epochs": 3, "evaluate_cache": "none"}
    answer = training_probe.probe({"settings": train, "steps": 4}) | {"peak_bytes": 1000}
    assert answer["step_tokens"][0] == 32
    assert len(answer["step_s"]) == 4
    assert 0 < answer["optimizer_s"] < max(answer["step_s"])
    assert answer["train_s"] >= sum(answer["step_s"])
    probed = Probed(capture=told, capture_wall_s=10.0, students=((answer, 20.0),))  # type: ignore[arg-type]
    assert probed.capture["device"] == "cpu"


def test_measured_rates_are_what_was_timed() -> None:
    capture = {
        "token_s": 1e-3,
        "forward_token_s": 8e-4,
        "batch_s": [1.0, 1.0],
        "teacher_load_s": 0.25,
        "warm_up_s": 0.5,
        "create_s": 3.0,
        "learnt_batch_tokens": 1000,
        "blocks": 4,
        "device": "cpu",
        "dtype": "float32",
        "text_tokens_per_s": 1e5,
        "peak_bytes": 10**9,
    }
    answer = {
        "parameters": 7,
        "step_s": [9.0, 2.0, 2.2],
        "step_tokens": [100, 100, 100],
        "optimizer_s": 0.2,
        "cross_entropy_token_s": 0.01,
        "extra_s": 5.0,
        "peak_bytes": 2 * 10**9,
    }
    from pipeline.plan.cache_size import TeacherSizes, cache_size
    from pipeline.plan.children import Answer
    from tests.unit.test_plan_size import Cost, Train

    settings = {"teacher": "t", "student": "1", "tokens": 10**6, "calibrate": True, "shard_blocks": 4}
    config = PlanConfig.model_validate(settings)
    size = cache_size(config, TeacherSizes("gpt2", 50_000, 768, 10, 10**9), 10**6)
    train = Train()
    train.accumulate = 4
    probed = Probed(capture=capture, capture_wall_s=12.0, students=(Answer(answer, 40.0),))
    rates = measured_rates(config, probed, Cost(), [("a", Cost(), train)], learnt_tokens=65_536, size=size)
    assert rates.capture_fixed_s == pytest.approx(12 - 0.5 - 2 - 3)
    assert rates.learning_s == pytest.approx(3 - 1)
    assert rates.capture_s(10**6) == pytest.approx(6.5 + 2 + 1e-3 * (10**6 + 65_536) + 10)
    (student,) = rates.students
    # Of steps after the first, without the optimizer, which four passes share.
    assert student.token_s == pytest.approx((1.8 + 2.0) / 2 / 100 + 0.2 / (8 * 4 * 1024))
    assert student.fixed_s == pytest.approx(40 - 5 - 2.0 - 2.2 - (1.9 + 0.2))
    head = 2 * 50_000 * 768
    assert student.online_token_s - student.token_s == pytest.approx(8e-4 * 2e9 / (2e9 - head))
    assert student.online_fixed_s - student.fixed_s == pytest.approx(0.25)
    assert student.online_peak_bytes == 2 * 10**9 + 4 * 10**9 + 4 * (64 << 20)


def test_a_probe_answers_from_a_process_of_its_own_or_its_refusal_comes_back() -> None:
    answer = ask("tests.probes", {"do": "answer", "told": [1, 2]})
    assert answer.facts.pop("peak_bytes") > 1 << 20
    assert answer.facts == {"told": [1, 2]}
    assert answer.wall_s > 0
    with pytest.raises(WouldLoseDataError) as raised:
        ask("tests.probes", {"do": "refuse"})
    assert str(raised.value) == "a-kind: a place, expected 1, found two (a hint)"
    with pytest.raises(KdpipeError, match=r"probe-failed: tests\.probes, found KeyError: 'told'"):
        ask("tests.probes", {"do": "answer"})
    with pytest.raises(KdpipeError, match=r"probe-failed: tests\.probes, found last words"):
        ask("tests.probes", {"do": "end"})


def test_hooks_wait_for_the_device_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: waits.append(device))
    with training_probe._optimizer_timed() as seconds:
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()
    assert (len(seconds), len(waits)) == (1, 2)
    waits.clear()
    model = torch.nn.Module()
    model.base_model = torch.nn.Linear(1, 1)
    teacher: Any = SimpleNamespace(device=torch.device("cuda"), model=model)
    with capture_probe._forward_timed(teacher) as seconds:
        model.base_model(torch.zeros(1))
    assert (len(seconds), len(waits)) == (1, 2)


def test_a_cpu_is_paid_for_once_and_a_gpu_each(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--teacher", "gpt2", "--student", 6, "--tokens", 1024, "--price-per-hour", 2, "--watts", 100, "--json"]
    for device, billed in (("cpu-core", 1), ("h100", 4)):
        code, out, err = kdpipe(capsys, *flags, "--device", device, "--num-devices", 4)
        assert code == 0, err
        totals = json.loads(out)["totals"]
        assert totals["money"]["cached"] == pytest.approx(2 * billed * totals["cached_hours"])
        assert totals["kwh"]["online"] == pytest.approx(0.1 * billed * totals["online_hours"])


def test_a_report_names_what_does_not_fit_and_each_law(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--teacher", "gpt2-xl", "--student", 1, "--tokens", 4096, "--device", "h100", "--device-memory-gb", 6]
    code, out, err = kdpipe(capsys, *flags, "--dtype", "bfloat16", "--capture-batch-blocks", 1, "--batch-blocks", 1)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("memory    ")]
    assert "layers-1, online" in line
    assert "or more of them" not in out
    run = family(tmp_path / "run", (10**8, 4096, 4.0, False))
    code, out, err = kdpipe(capsys, *flags, "--runs", run)
    assert code == 0, err
    assert "cached, online: " in out
    assert "1 run, too few runs to tell how far off" in out
    assert "no run of cross-entropy" in out


@pytest.mark.slow
def test_the_planning_benchmark_compares_plans_with_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path, text: Path
) -> None:
    """The plan is measured in processes of its own; what it is compared with runs here, to save their starts."""

    def here(command: str, *arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.run([command, *map(str, arguments), "--json"]) == 0
        facts: dict[str, Any] = json.loads(capsys.readouterr().out)
        return {**facts, "wall_s": 1.0}

    monkeypatch.setattr(planning, "kdpipe", here)
    sizes = (
        "--tokens",
        448,
        "--block-tokens",
        16,
        "--capture-batch-blocks",
        2,
        "--batch-blocks",
        4,
        "--shard-blocks",
        8,
    )
    flags = ("--capture-flags", "--encoding topk --k 4 --hidden-window 4", "--student", 1, "--probe-seconds", 1)
    work = ("--work", tmp_path / "work")
    report = run(planning, capsys, monkeypatch, "--teacher", teacher, "--text", text, *sizes, *flags, *work)
    found = {row["what"]: row for row in report["figures"]}
    assert {"capture", "training, layers-1", "all", "bytes", "bytes, head_ids"} <= set(found)
    # Of so short blocks, chunks differ by a few bytes; those of fixed content do not.
    assert abs(found["bytes"]["error"]) < 0.05
    assert found["all"]["met"] == (abs(found["all"]["error"]) <= planning.GOAL)
    assert found["all"]["real"] == 2.0
    assert found["all"]["predicted"] > 0
    assert sorted(path.name for path in (tmp_path / "work").iterdir() if path.name.startswith(".kdpipe")) == []
    # What is done already is not done again.
    monkeypatch.setattr(planning, "kdpipe", None)
    again = run(planning, capsys, monkeypatch, "--teacher", teacher, "--text", text, *sizes, *flags, *work)
    assert again["figures"] == report["figures"]
    with pytest.raises(SystemExit, match="epochs was 1"):
        run(planning, capsys, monkeypatch, "--teacher", teacher, "--text", text, *sizes, *flags, *work, "--epochs", 2)
