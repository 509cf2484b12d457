"""The command line: stable exit codes, one-line errors, flags on top of recipes, nothing heavy imported early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_spec.commit import pack_shard
from pipeline import cli, completion, settings
from pipeline.config import CaptureConfig, TranscodeConfig
from tests.models import make_folder, write_words

SMALL = [
    "--encoding",
    "topk",
    "--block-tokens",
    "16",
    "--k",
    "8",
    "--hidden-window",
    "4",
    "--batch-blocks",
    "2",
    "--shard-blocks",
    "5",
    "--device",
    "cpu",
]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "teacher", spread=4.0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_words(tmp_path / "text.jsonl")


def kdpipe(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    capsys.readouterr()
    code = cli.run([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_the_whole_job_from_text_to_evaluated_student(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: Path, text: Path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    capture = ["cache-teacher", "--teacher", teacher, "--text", text, "--out", cache, *SMALL, "--json"]
    code, out, _ = kdpipe(capsys, *capture)
    assert (code, json.loads(out)["shards_captured_now"]) == (0, json.loads(out)["shards"])
    assert json.loads(kdpipe(capsys, *capture)[1])["shards_captured_now"] == 0
    for flags in ([], ["--shallow"]):
        assert kdpipe(capsys, "verify", cache, *flags)[:2] == (0, f"{cache}: 0 problem(s)\n")
    assert json.loads(kdpipe(capsys, "inspect", cache, "--json")[1])["finished"]
    train = ["train-student", "--cache", cache, "--out", run, "--teacher", teacher, "--num-layers", 1]
    train += ["--batch-blocks", 4, "--device", "cpu", "--cosine-weight", 0.5, "--temperature", 2, "--json"]
    code, out, err = kdpipe(capsys, *train)
    assert code == 0, err
    assert json.loads(out)["steps"] == 8
    code, out, err = kdpipe(
        capsys, "evaluate", "--models", run / "student", "--cache", cache, "--device", "cpu", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["models"][0]["cache"]["kl_to_teacher"] > 0
    (tmp_path / "evaluation.json").write_text(out)
    shown = ["--cache", cache, "--run", run, "--evaluation", tmp_path / "evaluation.json"]
    code, out, err = kdpipe(capsys, "report", *shown, "--out", tmp_path / "report.html", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["cache"]["fingerprint"] == facts["runs"][0]["fingerprint"]
    assert facts["runs"][0]["steps"] == 8


def test_flags_go_on_top_of_a_recipe(tmp_path: Path, teacher: Path, text: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"cache-teacher:\n  teacher: {teacher}\n  text: [{text}]\n  out: cache\n  block-tokens: 64\n  k: 4\n"
    )
    config = settings.build(CaptureConfig, "cache-teacher", str(recipe), {"k": "8", "temperatures": "1,1.5"})
    assert (config.block_tokens, config.k, config.temperatures) == (64, 8, (1.0, 1.5))
    config = settings.build(CaptureConfig, "cache-teacher", str(recipe), {"encoding": "sampled", "draws": "9"})
    assert (config.block_tokens, config.encoding, config.draws) == (64, "sampled", 9)


def test_every_shipped_recipe_is_valid() -> None:
    from pipeline.plan.config import PlanConfig
    from train.config import TrainConfig
    from train.evaluation.config import EvaluateConfig
    from train.family_config import read_family

    models: dict[str, Any] = {"cache-teacher": CaptureConfig, "transcode": TranscodeConfig}
    models |= {"train-student": TrainConfig, "evaluate": EvaluateConfig, "plan": PlanConfig}
    needed = {"teacher": "t", "text": ("x",), "out": "o", "cache": "c", "models": ("m",)}
    recipes = sorted(completion.RECIPE_FOLDERS[1].glob("*.yaml"))
    assert {p.stem for p in recipes} >= {"demo", "distilgpt2", "smollm2"}
    families = [path for path in recipes if "\nstudents:" in path.read_text()]
    assert [path.stem for path in families] == ["sizes"]
    for path in families:
        read_family(path, cache=Path("c"), out=Path("o"), given={}, evaluate={"cache": "h"}, control=False)
    for path in (path for path in recipes if path not in families):
        for section, values in settings.read_recipe(path.stem).items():
            model = models[section]
            missing = {k: v for k, v in needed.items() if k in model.model_fields and k not in values}
            settings.build(model, section, path.stem, missing)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("cache-teacher: {teecher: x}", "unknown-key: .*: cache-teacher: teecher, expected one of teacher"),
        ("cache-student: {}", "unknown-key: .*: cache-student"),
        ("students: {}", "unknown-key: .*: students, .*train-student --students"),
        ("cache-teacher: {k: many}", "bad-recipe: .*: cache-teacher: k, found Input should be a valid integer"),
        ("cache-teacher: {1: 2}", "unknown-key: .*: cache-teacher: 1, expected one of teacher"),
        ("cache-teacher: {out: 2020-99-99}", "bad-recipe"),
        ("[" * 5000, "bad-recipe"),
        ("cache-teacher: {batch_blocks: 9, shard_blocks: 8}", "bad-recipe: .*batch_blocks 9 is more than shard_blocks"),
        ("cache-teacher: {temperatures: [1.0e-40, 1.0]}", "bad-recipe: .*temperatures must be from 0.05 to 100"),
        ("cache-teacher: {hidden_window: 7}", "bad-recipe: .*found hidden_window 7 does not divide"),
        ("cache-teacher: [", "bad-recipe"),
        ("- a list", "bad-recipe: .*expected one mapping per command"),
    ],
)
def test_a_bad_recipe_is_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    arguments = ["cache-teacher", "--config", path, "--teacher", "t", "--text", "x.txt", "--out", tmp_path / "o"]
    code, _, err = kdpipe(capsys, *arguments)
    assert code == 3
    assert_one_line(err, message)


def assert_one_line(err: str, message: str) -> None:
    import re

    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_an_unknown_recipe_names_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = kdpipe(capsys, "cache-teacher", "--config", "nonsense")
    assert code == 3
    assert_one_line(err, "unknown-recipe: nonsense, expected a YAML file or one of .*demo")


@pytest.mark.parametrize(
    "arguments",
    [
        ["cache-teacher"],
        ["cache-teacher", "--nonsense"],
        ["nonsense"],
        ["cache-teacher", "--teacher", "t", "--text", "x", "--out", "o", "--k", "many"],
        ["cache-teacher", "--teacher", "t", "--text", "x", "--out", "o", "--temperatures", "2,1"],
        ["train-student", "--cache", "c", "--out", "o", "--student-config", "{not json"],
        *(
            ["cache-teacher", "--teacher", "t", "--text", "x", "--out", "o", flag, value]
            for flag in ("--teacher", "--text", "--out", "--split")
            for value in ("", " ")
        ),
        ["cache-teacher", "--teacher", "t", "--text", "x", "--out", "~nouser-of-ours/o"],
        ["cache-teacher", "--teacher", "t", "--text", "x", "--out", "o\udce9"],
        ["cache-teacher", "--teacher", "t\udce9", "--text", "x", "--out", "o"],
        ["cache-teacher", "--teacher", "t", "--text", "x", "--out", "o", "--draws", "9"],
        ["cache-teacher", "--teacher", "t", "--text", "x", "--out", "o", "--encoding", "hidden", "--k", "9"],
        ["cache-teacher", "--teacher", "t", "--text", "x", "--out", "o", "--encoding", "nonsense"],
        [
            "cache-teacher",
            "--teacher",
            "t",
            "--text",
            "x",
            "--out",
            "o",
            "--hidden-window",
            "0",
            "--hidden-dtype",
            "int8",
        ],
        ["cache-teacher", "--teacher", "t", "--text", "x", "--out", "o", "--encoding", "prototype"]
        + ["--prototypes-from", "c", "--calibration-tokens", "9"],
        ["transcode", "--out", "o"],
        ["transcode", "c", "--out", "o", "--encoding", "topk", "--draws", "9"],
        ["transcode", "c", "--out", "o", "--temperatures", "2,1"],
        ["verify", "c", "--teacher", "t"],
        ["verify", "c", "--gguf-file", "t"],
        ["verify", "c", "--batches", "4"],
        ["verify", "c", "--shallow", "--deep"],
    ],
)
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, _, err = kdpipe(capsys, *arguments)
    assert code == 2
    assert_one_line(err, "^error: usage: .*; see kdpipe( [a-z-]+)? --help$")


def test_home_is_expanded_and_one_text_needs_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("cache-teacher: {text: ~/text.txt, out: ~/cache}")
    config = settings.build(CaptureConfig, "cache-teacher", str(tmp_path / "recipe.yaml"), {"teacher": "t"})
    assert (config.text, config.out) == ((str(tmp_path / "text.txt"),), tmp_path / "cache")


@pytest.mark.parametrize("flag", ["--teacher", "--text", "--config", "--out"])
@pytest.mark.parametrize("name", ["n" * 300, "n/" + "m" * 300 + ".txt"])
def test_a_name_too_long_for_a_file_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    teacher: Path,
    text: Path,
    flag: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"--teacher": teacher, "--text": text, "--out": tmp_path / "cache"} | {flag: name}
    code, _, err = kdpipe(capsys, "cache-teacher", *(part for pair in flags.items() for part in pair), *SMALL)
    assert code == 3
    assert_one_line(err, "unknown-|[Nn]ame.too.long")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device", "/full/disk"),
            "error: system-error: .*/full/disk, found No space left",
        ),
        (MemoryError(), "error: out-of-memory: cache-teacher.*smaller --batch-blocks"),
        (RuntimeError("CUDA out of memory. Tried\nmore"), "error: out-of-memory: .*CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out-of-memory: .*--batch-blocks"),
        (EOFError("ran out of input"), "error: early-end: cache-teacher, found ran out of input"),
    ],
)
def test_failures_of_the_machine_exit_with_1_and_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.capture.capture", fails)
    code, _, err = kdpipe(capsys, "cache-teacher", "--teacher", "t", "--text", "x", "--out", "o")
    assert code == 1
    assert_one_line(err, message)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pipeline.capture.capture", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(["cache-teacher", "--teacher", "t", "--text", "x", "--out", "o"])


def test_bad_input_exits_with_3_and_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: Path, text: Path
) -> None:
    def capture(**changes: object) -> tuple[int, str, str]:
        flags = {"teacher": teacher, "text": text, "out": tmp_path / "cache", **changes}
        return kdpipe(capsys, "cache-teacher", *(p for k, v in flags.items() for p in (f"--{k}", v)), *SMALL)

    (tmp_path / "blank.txt").write_text(" \n\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    for changes, message in [
        ({"teacher": tmp_path / "nobody"}, "unknown-teacher"),
        ({"text": tmp_path / "nothing.txt"}, "unknown-text"),
        ({"text": tmp_path / "blank.txt"}, "no-text"),
        ({"text": tmp_path / "latin.txt"}, "invalid-utf8"),
    ]:
        code, _, err = capture(**changes)
        assert code == 3, err
        assert_one_line(err.splitlines(keepends=True)[-1], message)
    for command in ("verify", "inspect"):
        code, out, err = kdpipe(capsys, command, tmp_path / "no-cache")
        assert code == 3
        assert "not-a-cache" in out + err


def test_what_would_lose_data_exits_with_4(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: Path, text: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    code, _, err = kdpipe(
        capsys, "cache-teacher", "--teacher", teacher, "--text", text, "--out", tmp_path / "full", *SMALL
    )
    assert code == 4
    assert_one_line(err, "not-a-cache")


def test_an_unfinished_cache_cannot_be_trained_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: Path, text: Path
) -> None:
    cache = tmp_path / "cache"
    kdpipe(capsys, "cache-teacher", "--teacher", teacher, "--text", text, "--out", cache, *SMALL)
    (cache / "seal.json").unlink()
    code, _, err = kdpipe(capsys, "train-student", "--cache", cache, "--out", tmp_path / "run", "--num-layers", 1)
    assert code == 3
    assert_one_line(err, "unfinished-cache.*run the command that began it again")


def test_inspect_says_nothing_of_means_that_are_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path, text: Path
) -> None:
    def full(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.place.publish_shard", full)
    flags = ["--teacher", teacher, "--text", text, "--out", tmp_path / "cache", *SMALL]
    assert kdpipe(capsys, "cache-teacher", *flags)[0] == 130
    code, out, err = kdpipe(capsys, "inspect", tmp_path / "cache", "--json")
    assert code == 0, err
    facts = json.loads(out)
    unknown = ("teacher_loss_nats", "teacher_perplexity", "teacher_entropy_nats", "bytes_per_token")
    assert [facts[name] for name in unknown] == [None] * 4
    assert set(facts["mean_tail_mass"].values()) == {None}
    code, out, err = kdpipe(capsys, "inspect", tmp_path / "cache")
    assert (code, err) == (0, "")
    assert "loss" not in out
    assert "0 of 6 done" in out


@pytest.mark.parametrize(("loss", "perplexity"), [(709.0, "number"), (710.0, None), (1e30, None)])
def test_inspect_survives_a_loss_whose_exponential_overflows(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    teacher: Path,
    text: Path,
    loss: float,
    perplexity: str | None,
) -> None:
    def lossy(manifest: Any, shard: int, rows: Any) -> Any:
        rows["block_loss"][:] = loss
        return pack_shard(manifest, shard, rows)

    monkeypatch.setattr("pipeline.shard.pack_shard", lossy)
    flags = ["--teacher", teacher, "--text", text, "--out", tmp_path / "cache", *SMALL, "--json"]
    assert kdpipe(capsys, "cache-teacher", *flags)[0] == 0
    code, out, err = kdpipe(capsys, "inspect", tmp_path / "cache", "--json")
    assert code == 0, err
    assert (json.loads(out)["teacher_perplexity"] is None) == (perplexity is None)
    code, out, _ = kdpipe(capsys, "inspect", tmp_path / "cache")
    assert ("perplexity" in out) == (perplexity is not None)


def test_an_interrupt_exits_with_130_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path, text: Path
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.capture.capture", interrupted)
    code, _, err = kdpipe(capsys, "cache-teacher", "--teacher", teacher, "--text", text, "--out", tmp_path / "c")
    assert code == 130
    assert "run the same command again" in err


def test_a_dry_run_writes_nothing_and_tells_the_cost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: Path, text: Path
) -> None:
    flags = ["--teacher", teacher, "--text", text, "--out", tmp_path / "cache", *SMALL, "--dry-run", "--json"]
    code, out, err = kdpipe(capsys, "cache-teacher", *flags)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["tokens"] == 12 * 41 // 16 * 16
    assert facts["bytes"] == pytest.approx(facts["tokens"] * facts["bytes_per_token"], abs=1)
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_of_one_block_tells_the_size_of_large_shards(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher: Path
) -> None:
    text = write_words(tmp_path / "text.jsonl", num_documents=60)
    flags = ["--teacher", teacher, "--text", text, "--out", tmp_path / "cache", *SMALL, "--json"]
    flags += ["--batch-blocks", 1, "--shard-blocks", 64]
    told = json.loads(kdpipe(capsys, "cache-teacher", *flags, "--dry-run")[1])
    real = json.loads(kdpipe(capsys, "cache-teacher", *flags)[1])
    assert (told["tokens"], told["shards"]) == (real["tokens"], real["shards"])
    assert told["bytes_per_token"] == pytest.approx(real["bytes_per_token"], rel=0.1)


def test_workers_without_gpus_of_their_own_promise_no_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path, text: Path
) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("pipeline.estimate.time.perf_counter", lambda: float(next(ticks)))
    flags = ["--teacher", teacher, "--text", text, "--out", tmp_path / "cache", *SMALL, "--dry-run", "--json"]
    for workers in (0, 1, 8):
        _, out, _ = kdpipe(capsys, "cache-teacher", *flags, "--workers", workers)
        assert json.loads(out)["tokens_per_s"] == 2 * 16


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from pipeline.cli import run; code = run(['--help']); "
        "heavy = {'torch', 'transformers', 'dask', 'zarr', 'pydantic', 'numpy', 'datasets'} & set(sys.modules); "
        "sys.exit(code or ' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in settings.COMMANDS)


@pytest.mark.parametrize(("command", "model"), [("cache-teacher", CaptureConfig), ("transcode", TranscodeConfig)])
def test_help_of_a_command_shows_every_setting_with_its_meaning(
    capsys: pytest.CaptureFixture[str], command: str, model: Any
) -> None:
    code, out, _ = kdpipe(capsys, command, "--help")
    assert code == 0
    for name, field in model.model_fields.items():
        assert ("[CACHE]" if name == "cache" else "--" + name.replace("_", "-")) in out
        assert field.description
