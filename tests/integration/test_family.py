"""A family of students from one cache: trained one by one, resumable, measured together, and checked beforehand."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import train.family
from cache_spec.errors import BadInputError, KdpipeError, WouldLoseDataError
from pipeline import cli
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from tests.models import make_folder, write_words
from tests.refusals import refused
from train.family import check_family, plan_family, train_family
from train.family_config import Family, read_family
from train.family_plots import draw_family, require_matplotlib
from train.family_report import figures_of
from train.loop import train as train_one
from train.report.config import ReportConfig
from train.report.facts import report_facts

RECIPE = Path(__file__).parent.parent / "family.yaml"
NAMES = ["one-layer", "two-layers", "fresh"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a cache of it and one of other text."""
    folder = tmp_path_factory.mktemp("family")
    make_folder(folder / "teacher", spread=4.0, num_hidden_layers=3)
    for name, seed in (("cache", 0), ("held-out", 1)):
        text = write_words(folder / f"{name}.jsonl", num_documents=20, seed=seed)
        settings = {"teacher": str(folder / "teacher"), "text": (str(text),), "out": folder / name, "device": "cpu"}
        sizes = {
            "encoding": "topk",
            "k": 8,
            "block_tokens": 16,
            "batch_blocks": 4,
            "shard_blocks": 16,
            "hidden_window": 0,
        }
        capture(CaptureConfig.model_validate(settings | sizes), quiet=True)
    (folder / "ptb").write_text(" w5 w6 <unk> w7 \n w8 N w9 \n")
    return folder


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a whole family, and the report of it; tests leave it as it is."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, train_family(family(made, out), quiet=True)


@pytest.fixture(scope="module")
def controlled(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a family of two steps and its controls, and the report of it."""
    out = tmp_path_factory.mktemp("controlled") / "out"
    return out, train_family(family(made, out, control=True, max_steps=2), quiet=True)


def family(made: Path, out: Path, recipe: Path = RECIPE, *, control: bool = False, **given: Any) -> Family:
    evaluate = {"cache": made / "held-out", "text": (str(made / "held-out.jsonl"),), "block_tokens": 16}
    evaluate |= {"corpus": (f"ptb={made / 'ptb'}",), "window": 16}
    return read_family(
        recipe,
        cache=made / "cache",
        out=out,
        given={"teacher": str(made / "teacher"), **given},
        evaluate=evaluate | {"device": "cpu"},
        control=control,
    )


def recipe_with(tmp_path: Path, **changes: Any) -> Path:
    body = yaml.safe_load(RECIPE.read_text()) | changes
    path = tmp_path / "students.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / name / "student" / "model.safetensors")


# --- training all of them


def test_a_family_is_trained_measured_and_left_alone_when_done(
    made: Path, trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = trained
    rows = report["students"]
    assert [row["name"] for row in rows] == NAMES
    assert {row["status"] for row in rows} == {"done"}
    assert rows[0]["parameters"] < rows[1]["parameters"]
    assert rows[2]["parameters"] < rows[0]["parameters"]
    for row in rows:
        figures = row["evaluation"]["cache"]
        assert figures["kl_to_teacher"] > 0
        assert 0 <= figures["overlap"] <= 1
        assert row["speed"]["decode_tokens_per_s"] > 0
        assert row["training_tokens"] == 51 * 16
        assert row["training_epochs"] == 1
    assert json.loads((out / "family.json").read_text()) == report
    table = list(csv.DictReader((out / "family.csv").read_text().splitlines()))
    assert [row["student"] for row in table] == NAMES
    assert float(table[1]["loss"]) == rows[1]["evaluation"]["cache"]["loss_nats"]
    assert float(table[1]["perplexity_held-out.jsonl"]) == rows[1]["evaluation"]["texts"][0]["perplexity"]
    assert float(table[1]["ptb_word_perplexity"]) == rows[1]["evaluation"]["corpora"][0]["word_perplexity"]
    assert (out / "family.md").read_text().count("\n| ") == 2 + len(NAMES)
    shown = report_facts(ReportConfig(out=out / "report.html", family=out))
    assert [run["name"] for run in shown["runs"]] == NAMES
    for row, student in zip(rows, shown["family"]["students"], strict=True):
        assert figures_of(student) == figures_of(row)

    def unexpected(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is new")

    monkeypatch.setattr(train.family, "evaluate_models", unexpected)
    monkeypatch.setattr(train.family, "measure_speeds", unexpected)
    monkeypatch.setattr(train.family, "first_student", unexpected)
    assert train_family(family(made, out), quiet=True) == report


def test_a_student_of_a_family_is_the_one_that_is_trained_alone(
    made: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = trained
    alone = family(made, out).students[2].config.model_copy(update={"out": tmp_path / "alone"})
    train_one(alone, quiet=True)
    ours, theirs = weights(out, "fresh"), load_file(tmp_path / "alone/student/model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_control_starts_alike_and_learns_from_the_text_alone(
    made: Path, controlled: tuple[Path, dict[str, Any]]
) -> None:
    out, report = controlled
    described = family(made, out, control=True, max_steps=2)
    names = [student.name for student in described.students]
    assert names == [name for student in NAMES for name in (student, f"{student}-control")]
    student, control = described.students[2:4]
    different = {"kl_weight": 0.0, "ce_weight": 1.0, "out": out / "two-layers-control"}
    assert control.config == student.config.model_copy(update=different)
    assert [row["control_of"] for row in report["students"][:2]] == [None, "one-layer"]
    first, twin = (
        json.loads((out / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("two-layers", "two-layers-control")
    )
    assert (first["tokens"], "kl" in first, "kl" in twin) == (twin["tokens"], True, False)
    # The same first weights on the same first blocks.
    starts = [json.loads((out / n / "run.json").read_text()) for n in ("two-layers", "two-layers-control")]
    assert starts[0]["student"] == starts[1]["student"]


def test_the_control_of_a_student_of_the_text_alone_is_itself(made: Path, tmp_path: Path) -> None:
    described = family(made, tmp_path / "out", control=True, kl_weight=0.0, ce_weight=1.0)
    assert [student.name for student in described.students] == [
        "one-layer",
        "two-layers",
        "two-layers-control",
        "fresh",
    ]


def test_a_control_has_no_schedule_of_what_it_does_not_learn_from(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "control: true\ncommon: {num_layers: 1, kl_schedule: wsd, ce_schedule: 'first:0.5', cooldown: 0.3}\n"
        "students: {a: {divergence: js, js_beta: 0.3}, b: {schedule: wsd, cosine_weight: 1.0, hidden_centre: true}}"
    )
    found = read_family(path, cache=tmp_path, out=tmp_path, given={}, evaluate={}, control=False)
    _, a, _, b = (student.config for student in found.students)
    assert (a.ce_schedule, a.kl_schedule, a.divergence, a.cooldown) == ("constant", "constant", "forward", 0.1)
    assert (b.schedule, b.cooldown, b.hidden_centre) == ("wsd", 0.3, False)


def test_a_failing_student_does_not_stop_the_others(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sometimes(config: Any, **kwargs: Any) -> Any:
        if config.out.name == "two-layers":
            raise KdpipeError("non-finite-loss", "step 3")
        if config.out.name == "one-layer":
            raise RuntimeError("a bug\nin two lines")
        return train_one(config, **kwargs)

    monkeypatch.setattr(train.family, "train", sometimes)
    flags = ["--students", RECIPE, "--cache", made / "cache", "--out", tmp_path / "o", "--teacher", made / "teacher"]
    arguments = ["train-student", *map(str, flags), "--evaluate-cache", str(made / "held-out")]
    code = cli.run(arguments)
    out = capsys.readouterr().out
    assert code == 1
    assert "two-layers failed: non-finite-loss: step 3" in out
    assert "one-layer failed: RuntimeError: a bug" in out
    rows = {row["name"]: row for row in json.loads((tmp_path / "o" / "family.json").read_text())["students"]}
    assert [rows[name]["status"] for name in NAMES] == ["failed", "failed", "done"]
    assert rows["fresh"]["evaluation"]["cache"]["loss_nats"] > 0
    monkeypatch.setattr(train.family, "train", train_one)
    assert cli.run([*arguments, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["students"]}
    assert all(row["evaluation"] and row["speed"] for row in rows.values())


def test_an_interrupt_stops_the_family_and_the_same_call_goes_on(
    made: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = trained[0], tmp_path / "stopped"
    started: list[str] = []

    def interrupted(config: Any, **kwargs: Any) -> Any:
        started.append(config.out.name)
        if config.out.name == "two-layers":
            timer = threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT))
            monkeypatch.setattr("train.loop.Interrupts.__enter__", entering(timer))
        return train_one(config, **kwargs)

    from train.interrupts import Interrupts

    enter = Interrupts.__enter__

    def entering(timer: threading.Timer) -> Any:
        def entered(self: Interrupts) -> Interrupts:
            enter(self)
            timer.start()
            timer.join()
            return self

        return entered

    with monkeypatch.context() as patched:
        patched.setattr(train.family, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_family(family(made, stopped), plots=False, quiet=True)
    monkeypatch.setattr("train.loop.Interrupts.__enter__", enter)
    assert started == NAMES[:2]
    statuses = [row["status"] for row in json.loads((stopped / "family.json").read_text())["students"]]
    assert statuses == ["done", "waiting", "waiting"]
    train_family(family(made, stopped), plots=False, quiet=True)
    for name in NAMES:
        ours, theirs = weights(whole, name), weights(stopped, name)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_a_dry_run_tells_every_students_cost_and_writes_nothing(
    made: Path, trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--students", RECIPE, "--cache", made / "cache", "--out", out, "--teacher", made / "teacher", "--dry-run"]
    assert cli.run(["train-student", *map(str, flags), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in facts["students"]] == NAMES
    assert {row["steps"] for row in facts["students"]} == {7}
    assert not out.exists()
    assert cli.run(["train-student", *map(str, flags)]) == 0
    assert "hours of training in all" in capsys.readouterr().out
    assert {row["status"] for row in plan_family(family(made, trained[0]))["students"]} == {"done"}


# --- plots


def test_plots_are_drawn_where_there_is_something_to_draw(
    controlled: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out, report = controlled
    assert (out / "family.png").read_bytes()[1:4] == b"PNG"
    unmeasured = {**report, "students": [{**row, "evaluation": None} for row in report["students"]]}
    assert not draw_family(unmeasured, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_plots_without_matplotlib_are_refused_before_training(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused("no-matplotlib", train_family, family(made, tmp_path / "out"), plots=True)
    assert "kdpipe[plots]" in message
    assert not (tmp_path / "out").exists()
    assert not require_matplotlib(asked=False)


# --- what is refused before the first student starts


@pytest.mark.parametrize(
    ("text", "kind", "place"),
    [
        ("students: {a: {num_layerz: 1}}", "unknown-key", "students: a: num_layerz"),
        ("students: {a: {num_layers: 0}}", "bad-students", "students: a: num_layers"),
        ("students: {a: {num_layers: 1, layer_indices: [0]}}", "bad-students", "students: a"),
        ("students: {a: {}, b: {}, a: {}}", "bad-students", "line 1: a"),
        ("students: {a: {}, A: {}}", "bad-student-name", "students: A"),
        ("students: {a: {}, a-control: {}}\ncontrol: true", "bad-student-name", "students: a-control"),
        ("students: {../a: {}}", "bad-student-name", "students: ../a"),
        ("students: {.a: {}}", "bad-student-name", "students: .a"),
        ("students: {a/b: {}}", "bad-student-name", "students: a/b"),
        ("students: {family.json: {}}", "bad-student-name", "students: family.json"),
        ("students: {1: {}}", "bad-student-name", "students: 1"),
        ("students: {a: {out: x}}", "unknown-key", "students: a: out"),
        ("students: {a: [1]}", "bad-students", "students: a"),
        ("students: {a: {num-layers: 1, num_layers: 2}}", "bad-students", "students: a"),
        ("students: {}", "bad-students", "students"),
        ("common: {cache: x}\nstudents: {a: {}}", "unknown-key", "common: cache"),
        ("common: {nonsense: x}\nstudents: {a: {}}", "unknown-key", "common: nonsense"),
        ("student: {a: {}}", "unknown-key", "student"),
        ("control: maybe\nstudents: {a: {}}", "bad-students", "control"),
        ("evaluate: {block_tokens: 1}\nstudents: {a: {}}", "bad-students", "evaluate: block_tokens"),
        ("evaluate: {models: [x]}\nstudents: {a: {}}", "unknown-key", "evaluate: models"),
        ("evaluate: {speed: true}\nstudents: {a: {}}", "unknown-key", "evaluate: speed"),
        ("speed: {rounds: 0}\nstudents: {a: {}}", "bad-students", "speed: rounds"),
        ("students: [", "bad-students", "s.yaml"),
        ("[]", "bad-students", "s.yaml"),
    ],
)
def test_what_is_wrong_in_a_file_of_students_is_named(tmp_path: Path, text: str, kind: str, place: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    message = refused(
        kind, read_family, path, cache=tmp_path, out=tmp_path / "out", given={}, evaluate={}, control=False
    )
    assert place in message


def test_null_takes_a_common_setting_back_and_flags_replace_common_ones(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "common: {num_layers: 2, seed: 1}\nstudents: {a: {num_layers: null, layer-indices: [0]}, b: {seed: 4}}"
    )
    found = read_family(path, cache=tmp_path, out=tmp_path, given={"seed": 9}, evaluate={}, control=False)
    a, b = (student.config for student in found.students)
    assert (a.num_layers, a.layer_indices, a.seed) == (None, (0,), 9)
    assert (b.num_layers, b.seed, b.out) == (2, 4, tmp_path / "b")
    assert found.evaluate is None


def test_students_that_cannot_be_built_are_refused_before_the_first_is_trained(made: Path, tmp_path: Path) -> None:
    students = {"good": {"num_layers": 1}, "deep": {"num_layers": 9}}
    described = family(made, tmp_path / "out", recipe_with(tmp_path, students=students))
    message = refused("bad-student-config", train_family, described, quiet=True)
    assert "student deep: num_layers" in message
    assert not (tmp_path / "out" / "good").exists()
    hot: dict[str, dict[str, float]] = {"good": {"num_layers": 1}, "hot": {"num_layers": 1, "temperature": 3.0}}
    described = family(made, tmp_path / "out", recipe_with(tmp_path, students=hot))
    with pytest.raises(BadInputError, match="student hot: "):
        check_family(described)


def test_folders_of_something_else_are_refused(made: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    out, _ = trained
    with pytest.raises(WouldLoseDataError, match="student one-layer: "):
        train_family(family(made, out, max_steps=2), quiet=True)
    with pytest.raises(WouldLoseDataError, match="not-a-family"):
        train_family(family(made, out / "fresh"), quiet=True)


def test_a_family_has_one_process(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "found 2" in refused("family-of-ranks", train_family, family(made, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", [["--control"], ["--evaluate-text", "t"], ["--plots"]])
def test_flags_of_a_family_need_one(capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: list[str]) -> None:
    assert cli.run(["train-student", "--cache", str(tmp_path), "--out", str(tmp_path / "o"), *flag]) == 2
    assert "needs --students" in capsys.readouterr().err
