"""The page of a report: what it shows, that it asks for nothing, and that no text of others is anything but text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cache_spec.encodings import Encoding
from cache_spec.imported import ImportedInfo
from tests.reports import HOSTILE, Page, save_cache, save_evaluation, save_everything
from tests.synthetic import ENCODINGS
from train.report import plots
from train.report.config import ReportConfig
from train.report.facts import report_facts
from train.report.inert import visible
from train.report.page import render, sections
from train.report.write import write_report


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Facts and page of a cache, a run, a family, an evaluation and a plan, all hostile."""
    folder = tmp_path_factory.mktemp("report")
    config = save_everything(folder, title=HOSTILE)
    facts = write_report(config)
    return facts, config.out.read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_outside_itself(everything: tuple[dict[str, Any], str]) -> None:
    page = Page(everything[1])
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "data", "poster", "background", "xlink:href"} & attributes.keys(), tag
        if "href" in attributes:
            assert attributes["href"].startswith("#"), tag
            assert attributes["href"][1:] in ids
        for value in attributes.values():
            assert all(pointer in ids for pointer in re.findall(r"url\(#([^)]+)\)", value))
            assert "url(" not in re.sub(r"url\(#[^)]+\)", "", value)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "image"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.raw["style"][0]
    assert "@import" not in page.raw["style"][0]


def test_the_policy_allows_the_pages_own_style_and_script_alone(everything: tuple[dict[str, Any], str]) -> None:
    page = Page(everything[1])
    (policy,) = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind in ("style", "script"):
        (content,) = page.raw[kind]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    for tag, attributes in page.tags:
        assert "style" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag


def test_ids_of_all_plots_are_distinct(everything: tuple[dict[str, Any], str]) -> None:
    ids = [attributes["id"] for _, attributes in Page(everything[1]).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100


def test_hostile_text_is_shown_as_text(everything: tuple[dict[str, Any], str]) -> None:
    text = everything[1]
    page = Page(text)
    assert len(page.named("script")) == len(page.named("style")) == 1
    assert "hacked" not in page.raw["script"][0] + page.raw["style"][0]
    shown = "".join(page.texts)
    assert shown.count("<script>window.hacked=1</script>") > 10
    assert shown.count("{{ 7*7 }}") > 10
    # Neither controls nor what reorders text, not even as a reference; the space is one of ours.
    assert not [c for c in text + shown if not c.isprintable() and c not in "\n\xa0"]
    assert "⟨U+202E⟩" in shown
    assert "⟨U+0000⟩" in shown


def test_plots_have_titles_axes_and_words_for_those_who_do_not_see_them(everything: tuple[dict[str, Any], str]) -> None:
    page = Page(everything[1])
    figures = [a for a in page.named("svg") if "plot" in a.get("class", "").split()]
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert len(figures) > 15
    assert all(figure["role"] == "img" and set(figure["aria-labelledby"].split()) <= ids for figure in figures)
    assert len(page.named("desc")) == len(figures)
    for words in ("Bytes by array", "Mass of the K most probable tokens", "Loss and its terms", "nats", "tokens/s"):
        assert words in page.text
    # Whatever was drawn has the page's colours.
    assert not re.findall(r"#000[01]0[0-9]\b", everything[1])
    assert "var(--series-1)" in everything[1]


def test_the_page_shows_the_facts(everything: tuple[dict[str, Any], str]) -> None:
    facts, text = everything
    page = Page(text)
    assert facts["kdpipe"] in page.text
    assert facts["made"][:10] in page.text
    assert facts["cache"]["fingerprint"] in page.text
    assert "This cache is not finished" not in page.text
    assert "not finished: step 12 of 17" in page.text
    assert "31.50 [30.50, 32.50]" in page.text
    assert "wikitext-103, strided, window 1,024, stride 512; of a sample; [lower, upper] ends of intervals" in page.text
    assert "1.0000 [0.5000, 1.5000]" in page.text
    assert "60 units of one document each" in page.text
    assert "students from 2, epochs never" in page.text
    assert "KL is a lower bound" in page.text
    assert "a cache does not record how long its capture took" in page.text
    for name in facts["cache"]["sizes"]["arrays"]:
        assert name in page.text
    for token in facts["cache"]["sample"]["examples"][0]["tokens"]:
        assert visible(token["text"]) in "".join(page.texts)


def test_facts_are_json_and_say_what_the_files_said(everything: tuple[dict[str, Any], str]) -> None:
    facts = json.loads(json.dumps(everything[0], allow_nan=False))
    assert [run["name"] for run in facts["runs"]] == ["alone", "small", "small-control"]
    rows = {row["what"]: row for row in facts["happened"]}
    assert rows["small: training"]["real"] == pytest.approx(0.01)
    assert rows["small: training"]["difference"] == pytest.approx(0.25)
    assert rows["cache: tokens"]["difference"] == 0
    assert rows["capture: time"]["real"] is None
    assert rows[f"{visible(HOSTILE)}: training"]["note"] == "no run of this name"


def test_a_page_without_plots_has_all_tables(everything: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    facts = {name: value for name, value in everything[0].items() if name not in ("out", "bytes")}
    page, drawn = Page(render(facts, plots=False)), Page(everything[1])
    assert not [a for a in page.named("svg") if a.get("class") == "plot"]
    assert len(page.named("table")) == len(drawn.named("table"))
    assert "Plots are left out." in page.text


@pytest.mark.parametrize(("name", "encoding"), ENCODINGS.items())
def test_a_cache_of_every_encoding_has_a_page(tmp_path: Path, name: str, encoding: Encoding) -> None:
    save_cache(tmp_path / "cache", encoding=encoding)
    facts = report_facts(ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache"))
    text = Page(render(facts, plots=False)).text
    sample = facts["cache"]["sample"]
    assert sample["positions"] == 7 * 8
    assert len(sample["examples"]) == 6
    assert ("keeps no mass of a tail" in text) == (name in ("sampled", "sparsified"))
    assert ("Tail mass by temperature" in text) == (name not in ("sampled", "sparsified"))


def test_an_unfinished_cache_and_an_empty_one_have_pages(tmp_path: Path) -> None:
    save_cache(tmp_path / "cache", seal=False)
    (tmp_path / "cache" / "receipts" / "00000001.json").unlink()
    facts = report_facts(ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache"))
    assert (facts["cache"]["shards_done"], facts["cache"]["finished"]) == (2, False)
    assert {e["block"] // 3 for e in facts["cache"]["sample"]["examples"]} <= {0, 2}
    assert "not finished: 2 of 3 shards" in Page(render(facts, plots=False)).text
    for receipt in (tmp_path / "cache" / "receipts").glob("*.json"):
        receipt.unlink()
    facts = report_facts(ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache"))
    assert "0 of 3 shards" in Page(render(facts, plots=True)).text


def test_a_cache_without_a_tokenizer_shows_ids(tmp_path: Path) -> None:
    save_cache(tmp_path / "cache", tokenizer=False)
    facts = report_facts(ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache"))
    token = facts["cache"]["sample"]["examples"][0]["tokens"][0]
    assert (token["text"], token["kind"]) == (f"#{token['id']}", "id")


def test_a_mathematical_looking_name_does_not_break_a_plot(tmp_path: Path) -> None:
    words = plots.Words(title="$\\frac{", x="$x", y="日本 \u202e", caption=HOSTILE)
    drawn = plots.Plotter().lines([plots.Line(label="_hidden $^", x=[1, 2, None], y=[1, None, 3])], words)
    assert len(drawn.figures) == 1
    assert plots.Plotter().lines([plots.Line(label="none", x=[1.0], y=[None])], words).figures == ()


def test_legends_and_bars_hold_every_name() -> None:
    long, words = "a-model-with-a-very-long-name-", plots.Words(title="t", x="x", y="y")
    names = ["_hidden", f"{long}one", f"{long}two", "same", "same", f"a{long}b", f"a{long * 2}b"]
    assert len(set(plots.short(names))) == len(names)
    plotter = plots.Plotter()
    drawn = [
        plotter.lines([plots.Line(label=name, x=[1, 2], y=[1, 2]) for name in names], words),
        plotter.bars([plots.Bar(label=name, value=1.0) for name in names], words, shown=str),
        plotter.dots([plots.Dot(label=name, x=1, y=1) for name in names], words),
    ]
    for plot in drawn:
        assert set(plots.short(names)) <= set(Page(str(plot.figures[0][0])).texts)


def test_models_and_texts_of_one_name_stay_apart(tmp_path: Path) -> None:
    evaluation = json.loads(save_evaluation(tmp_path / "e.json").read_text())
    model = {**evaluation["models"][0], "cache": {**evaluation["models"][0]["cache"], "kl_is": None}}
    model["texts"] = [{**model["texts"][0], "text": text} for text in ("/a/x.txt", "/b/x.txt")]
    (tmp_path / "e.json").write_text(json.dumps({"models": [model, model]}))
    facts = report_facts(ReportConfig(out=tmp_path / "r.html", evaluation=(tmp_path / "e.json",)))
    page = Page(render(facts, plots=True))
    captions = " ".join(page.texts)
    assert "/a/x.txt" in captions
    assert "/b/x.txt" in captions
    numbers = [page.texts.count(f"/m/teacher ({number})") for number in (1, 2)]
    assert numbers[0] == numbers[1] > len(page.named("table"))
    assert "of drawn or imported targets, which tell neither KL nor acceptance" in page.text


def test_a_bar_stands_in_the_column_that_it_is_of(tmp_path: Path) -> None:
    save_cache(tmp_path / "cache", temperatures=(0.5, 1.0, 2.0))
    facts = report_facts(ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache", examples=1))
    (blocks,) = [block for block in sections(facts, None)[0].blocks if block.kind == "examples"]
    for row, token in zip(blocks.examples[0]["rows"], facts["cache"]["sample"]["examples"][0]["tokens"], strict=True):
        assert [cell.bar for cell in row["cells"]] == [None, token["probability"]["1"], None]
    assert render(facts, plots=False).count('class="bar"') > len(blocks.examples[0]["rows"])


@pytest.mark.parametrize("logprobs", ["full", "renormalised"])
def test_entropies_of_imports_say_what_is_missing(tmp_path: Path, logprobs: Any) -> None:
    info = ImportedInfo(logprobs=logprobs, mass_error=0.001)
    save_cache(tmp_path / "cache", imported=info, temperatures=(1.0,), window=None)
    facts = report_facts(ReportConfig(out=tmp_path / "r.html", cache=tmp_path / "cache"))
    text = Page(render(facts, plots=False)).text
    assert ("Entropies of positions are of the kept tokens, as if there were no others." in text) == (
        logprobs == "renormalised"
    )
    assert ("a lower bound" in text) == (logprobs == "full")
