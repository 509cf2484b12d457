"""Facts of a report: samples that say what the cache says, tokens as text, runs that go on, files of others refused."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.topk import TopK
from cache_spec.reader import CacheReader
from cache_spec.targets import dense
from pipeline import cli
from tests.evaluation import WORDS, save_tokenizer
from tests.refusals import refused
from tests.reports import HOSTILE, VOCABULARY, Page, save_cache, save_evaluation, save_family, save_plan, save_run
from tests.synthetic import make_manifest
from train.report import cache_facts
from train.report.config import ReportConfig
from train.report.facts import report_facts
from train.report.inert import isolated, plain, visible
from train.report.page import render
from train.report.run_facts import run_facts
from train.report.sample import Positions, pick_blocks, pick_shards, read_tops
from train.report.tokens import Pieces

HUGE = 10**400


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("encoding", [TopK(k=VOCABULARY), Hidden(dtype="float16", head_dtype="float32", bias=True)])
def test_a_sample_is_what_the_cache_says_in_full(tmp_path: Path, encoding: TopK | Hidden, temperature: float) -> None:
    save_cache(tmp_path / "cache", encoding=encoding)
    reader = CacheReader.open(tmp_path / "cache")
    positions = Positions(np.array([1, 1, 5]), np.array([0, 7, 3]))
    tops = read_tops(reader, positions, temperature)
    blocks = reader.batch([1, 5], temperature)
    head = reader.output_head() if isinstance(encoding, Hidden) else None
    full_BTV = dense(blocks.targets, temperature=temperature, vocab_size=VOCABULARY, head=head)
    full_NV = full_BTV[[0, 0, 1], [0, 7, 3]]
    np.testing.assert_allclose(tops.probs_NK, -np.sort(-full_NV, axis=1), atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(full_NV, tops.ids_NK.astype(int), axis=1), tops.probs_NK, atol=1e-6)
    nats_N = -(full_NV * np.log(np.maximum(full_NV, 1e-300))).sum(1)
    np.testing.assert_allclose(tops.entropy_N, nats_N, atol=1e-5)


def test_head_and_tail_make_up_the_whole_mass(tmp_path: Path) -> None:
    save_cache(tmp_path / "cache", encoding=TopK(k=5))
    sample = report_facts(ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache"))["cache"]["sample"]
    for temperature, rows in sample["head_mass"].items():
        assert len(rows) == 5
        assert rows[-1]["mean"] + sample["tail_mass"][temperature]["mean"] == pytest.approx(1)
        assert [row["mean"] for row in rows] == sorted(row["mean"] for row in rows)


def test_samples_are_even_seeded_and_bounded() -> None:
    rng = np.random.default_rng(3)
    shards = pick_shards(range(100_000), 64, rng)
    assert len(shards) == 64
    assert all(at * 100_000 // 64 - 1 <= shard < (at + 1) * 100_000 // 64 + 1 for at, shard in enumerate(shards))
    assert shards == pick_shards(range(100_000), 64, np.random.default_rng(3))
    assert shards != pick_shards(range(100_000), 64, np.random.default_rng(4))
    manifest = make_manifest(num_blocks=100, shard_blocks=10)
    blocks = pick_blocks(manifest, [0, 4, 9], 8, rng)
    assert [block // 10 for block in blocks] == [0, 0, 0, 4, 4, 4, 9, 9]
    assert len(pick_blocks(manifest, [0, 9], 50, rng)) == 20


def test_the_same_seed_shows_the_same_examples(tmp_path: Path) -> None:
    save_cache(tmp_path / "cache")

    def examples(seed: int) -> Any:
        config = ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache", seed=seed, examples=3)
        return report_facts(config)["cache"]["sample"]["examples"]

    assert len(examples(0)) == 3
    assert examples(0) == examples(0) != examples(1)


def test_sizes_of_many_shards_are_scaled_up_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_cache(tmp_path / "cache", num_blocks=12)
    config = ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache")
    exact = report_facts(config)["cache"]["sizes"]
    reader = CacheReader.open(tmp_path / "cache")
    receipts = [reader.receipt(shard) for shard in range(4)]
    assert exact["arrays"]["head_ids"] == sum(receipt.files["head_ids"].num_bytes for receipt in receipts)
    assert not exact["is_estimate"]
    monkeypatch.setattr(cache_facts, "_SIZED_SHARDS", 2)
    about = report_facts(config)["cache"]["sizes"]
    assert (about["is_estimate"], about["shards_read"]) == (True, 2)
    assert about["arrays"]["input_ids"] == pytest.approx(exact["arrays"]["input_ids"], rel=0.2)
    assert about["tokens"] == exact["tokens"]
    assert not about["is_estimate_of_tokens"]
    (tmp_path / "cache" / "receipts" / "00000001.json").unlink()
    (tmp_path / "cache" / "seal.json").unlink()
    facts = report_facts(config)
    assert facts["cache"]["sizes"]["is_estimate_of_tokens"]
    assert re.search(r"Tokens about [\d,]+ Size about ", Page(render(facts, plots=False)).text)


def test_an_example_of_a_causal_teacher_shows_what_follows(tmp_path: Path) -> None:
    save_cache(tmp_path / "cache")
    facts = report_facts(ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache", examples=56))
    reader = CacheReader.open(tmp_path / "cache")
    for example in facts["cache"]["sample"]["examples"]:
        ids = reader.read("input_ids", [example["block"]])[0].tolist()
        at = example["position"]
        assert example["read"]["id"] == ids[at]
        assert example["truth"] == (None if at == 7 else {**example["truth"], "id": ids[at + 1]})
        assert [token["id"] for token in example["tokens"] if token["is_truth"]] in ([], ids[at + 1 : at + 2])


def test_an_example_of_a_masked_teacher_shows_what_was_hidden() -> None:
    cache = Path(__file__).parents[1] / "conformance" / "valid" / "masked"
    facts = report_facts(ReportConfig(out=Path("r.html"), cache=cache, examples=50))
    reader = CacheReader.open(cache)
    examples = facts["cache"]["sample"]["examples"]
    assert examples
    for example in examples:
        block, at = example["block"], example["position"]
        masked = reader.masked([block])
        assert masked is not None
        assert masked.kept_BT[0, at]
        assert example["truth"]["id"] == reader.read("input_ids", [block])[0, at]
        assert example["read"]["id"] == masked.read_ids_BT[0, at]


def test_pieces_of_a_byte_level_vocabulary(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    tokenizer.backend_tokenizer.decoder = Tokenizer.from_str(
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
        '"post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,'
        '"use_regex":true},"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}'
    ).decoder
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pieces = Pieces.of_cache(tmp_path)
    assert pieces.piece(WORDS.index("Ġthe"))[1:] == (" the", "text")
    assert pieces.piece(WORDS.index("Ċ"))[1:] == ("\n", "text")
    assert pieces.piece(WORDS.index("Ã"))[1:] == ("⟨C3⟩", "bytes")
    assert pieces.piece(WORDS.index("<eos>"))[1:] == ("<eos>", "special")
    assert pieces.piece(10**6)[1:] == ("#1000000", "id")
    assert pieces.text([WORDS.index("the"), WORDS.index("Ġthe")]) == "the the"


def test_pieces_of_other_vocabularies() -> None:
    words = {"▁a": 0, "<0xE2>": 1, "##ing": 2, "<0x41>": 3, "<0xZZ>": 4}
    pieces = Pieces(Tokenizer(models.WordLevel(words, unk_token="▁a")).to_str().encode())
    assert [pieces.piece(at).text for at in range(5)] == [" a", "⟨E2⟩", "##ing", "A", "<0xZZ>"]
    assert Pieces(b"not json").piece(3) == (3, "#3", "id")
    assert Pieces(None).text([1, 2]) == "#1 #2"


def test_text_of_others_becomes_inert() -> None:
    assert visible("a\nb\tc\x00\u202e\u200d\ud800\ufeff") == "a↵b⇥c⟨U+0000⟩⟨U+202E⟩⟨U+200D⟩⟨U+D800⟩⟨U+FEFF⟩"
    assert visible("naïve 日本 עברית") == "naïve 日本 עברית"
    assert isolated("<b>\n") == '<bdi>&lt;b&gt;<span class="sign">↵</span></bdi>'
    assert plain({"a\x00": [float("nan"), float("inf"), 1.5, True, None, ("\x07",)]}) == {
        "a⟨U+0000⟩": [None, None, 1.5, True, None, ["⟨U+0007⟩"]]
    }


def test_a_run_that_goes_on_tells_what_it_knows(tmp_path: Path) -> None:
    run = run_facts(save_run(tmp_path / "run", finished=False))
    assert (run["finished"], run["steps"], run["total_steps"], run["tokens"]) == (False, 12, 17, 1200)
    assert (run["seconds"], run["tokens_per_s"]) == (10.0, 80.0)
    assert run["evaluation"] == {"loss": 0.5, "kl": pytest.approx(1 / 12)} | {"step": 12}
    assert run["held_out"]["step"] == [4, 8, 12]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    empty = run_facts(tmp_path / "run")
    assert (empty["steps"], empty["training"], empty["num_lines"]) == (0, {}, 0)


def test_long_metrics_are_thinned_to_means(tmp_path: Path) -> None:
    run = run_facts(save_run(tmp_path / "run", num_lines=2000))
    training = run["training"]
    assert len(training["step"]) == 286
    assert training["step"][0] == 7
    assert training["loss"][0] == pytest.approx(np.mean([5 / step for step in range(1, 8)]))
    assert training["step"][-1] == 2000


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (["--cache", "missing"], "not-a-cache"),
        (["--run", "missing"], "not-a-run"),
        (["--run", "family"], "not-a-run"),
        (["--family", "run"], "not-a-family"),
        (["--evaluation", "missing.json"], "not-an-evaluation"),
        (["--evaluation", "plan.json"], "not-an-evaluation"),
        (["--evaluation", "list.json"], "not-an-evaluation"),
        (["--evaluation", "broken.json"], "not-an-evaluation"),
        (["--plan", "evaluation.json"], "not-a-plan"),
        (["--plan", "family"], "not-a-plan"),
        (["--plan", "plan.json", "--out", "missing/r.html"], "cannot-write"),
        (["--plan", "plan.json", "--out", "family"], "cannot-write"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    save_family(tmp_path / "family")
    save_evaluation(tmp_path / "evaluation.json")
    save_plan(tmp_path / "plan.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "broken.json").write_text('{"models": [')
    capsys.readouterr()
    out = [] if "--out" in flags else ["--out", "r.html"]
    assert cli.run(["report", *flags, *out, "--no-plots"]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"error: {kind}: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.html")) + list(tmp_path.glob(".tmp-*"))


def test_damaged_runs_and_shards_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text("[]")
    assert cli.run(["report", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "r.html"), "--no-plots"]) == 3
    assert capsys.readouterr().err.startswith("error: damaged-run: ")
    save_cache(tmp_path / "cache")
    shard = tmp_path / "cache" / "head_gaps" / "c.1.0.0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 0xFF
    shard.write_bytes(data)
    assert cli.run(["report", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "r.html"), "--no-plots"]) == 3
    assert "head_gaps" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_plots_are_left_out_without_matplotlib_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = save_plan(tmp_path / "plan.json"), tmp_path / "r.html"
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert cli.run(["report", "--plan", str(path), "--out", str(out), "--plots"]) == 3
    assert capsys.readouterr().err.startswith("error: no-matplotlib: ")
    assert not out.exists()
    assert cli.run(["report", "--plan", str(path), "--out", str(out)]) == 0
    assert "Plots are left out." in out.read_text()


def test_only_an_older_report_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = save_evaluation(tmp_path / "evaluation.json"), tmp_path / "r.html"
    other, pipe = tmp_path / "other.html", tmp_path / "pipe"
    other.write_text('<!DOCTYPE html>\n<html lang="en">\n')
    os.mkfifo(pipe)
    before = figures.read_bytes(), other.read_bytes()
    for out in (figures, other, pipe):
        assert cli.run(["report", "--evaluation", str(figures), "--out", str(out), "--no-plots"]) == 4
        assert capsys.readouterr().err.startswith("error: not-a-report: ")
    assert (figures.read_bytes(), other.read_bytes()) == before
    for title in ("First", "Second"):
        flags = ["--evaluation", str(figures), "--title", title, "--no-plots"]
        assert cli.run(["report", *flags, "--out", str(page)]) == 0
    assert "Second" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "place", "value", "kind"),
    [
        ("result.json", ("seconds",), "x", "damaged-run"),
        ("result.json", ("steps",), None, None),
        ("result.json", ("parameters",), HUGE, "damaged-run"),
        ("result.json", ("evaluation",), [1], "damaged-run"),
        ("run.json", ("total_steps",), "x", "damaged-run"),
        ("run.json", ("student", "num_parameters"), HUGE, "damaged-run"),
        ("run.json", ("settings",), 5, "damaged-run"),
        ("metrics.jsonl", ("step",), HUGE, "damaged-run"),
        ("metrics.jsonl", ("tokens",), HUGE, None),
        ("metrics.jsonl", ("loss",), "x", None),
        ("metrics.jsonl", ("evaluate/loss",), {}, None),
        ("evaluation.json", ("models", 0, "parameters"), HUGE, "not-an-evaluation"),
        ("evaluation.json", ("models", 0, "cache", "temperature"), math.inf, "not-an-evaluation"),
        ("plan.json", ("cache", "tokens"), math.inf, "not-a-plan"),
        ("plan.json", ("students", 0, "parameters"), HUGE, "not-a-plan"),
        ("plan.json", ("device",), [1], None),
        ("plan.json", ("curve", 0, "ways", "cached", "hours"), HUGE, None),
    ],
    ids=lambda value: "huge" if value == HUGE else str(value),
)
def test_values_of_other_types_are_refused_or_left_out(
    tmp_path: Path, file: str, place: tuple[Any, ...], value: Any, kind: str | None
) -> None:
    folder = save_run(tmp_path / "run")
    paths = {
        "evaluation.json": save_evaluation(tmp_path / "evaluation.json"),
        "plan.json": save_plan(tmp_path / "plan.json"),
    }
    path = paths.get(file, folder / file)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        part = line
        for name in place[:-1]:
            part = part[name]
        part[place[-1]] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = ReportConfig(
        out=tmp_path / "r.html", run=(folder,), evaluation=(paths["evaluation.json"],), plan=paths["plan.json"]
    )
    if kind is None:
        assert render(report_facts(config), plots=False)
    else:
        assert file in refused(kind, report_facts, config)


def test_a_damaged_result_is_told_with_its_place(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text('{"seconds": "x"}')
    assert "result.json, found seconds: " in refused("damaged-run", run_facts, tmp_path / "run")


def test_nothing_to_report_on_is_a_mistake_of_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", "--out", str(tmp_path / "r.html")]) == 2
    assert "nothing to report on" in capsys.readouterr().err


def test_the_command_prints_facts_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = save_evaluation(tmp_path / "evaluation.json"), tmp_path / "r.html"
    assert cli.run(["report", "--evaluation", str(path), "--out", str(out), "--no-plots", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == out.stat().st_size
    assert facts["evaluations"][0]["models"][1]["name"] == visible(f"/m/{HOSTILE}/student")
    assert out.read_text().startswith("<!DOCTYPE html>")


def test_todays_evaluations_have_a_page(tmp_path: Path) -> None:
    text = {"text": "a.txt", "num_tokens": 9, "num_bytes": 9, "loss_nats": 1.0, "perplexity": 2.7, "bits_per_byte": 1.0}
    row = {"name": "m", "parameters": 1, "dtype": "float32", "device": "cpu", "texts": [text], "cache": None}
    (tmp_path / "e.json").write_text(json.dumps({"models": [row]}))
    facts = report_facts(ReportConfig(out=tmp_path / "r.html", evaluation=(tmp_path / "e.json",)))
    assert facts["evaluations"][0]["models"][0]["speed"] is None
