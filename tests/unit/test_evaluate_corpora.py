"""Figures on corpora equal naive float64 ones token by token, and the report says what they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import GenerationConfig

import train.evaluation.scorer
from pipeline.cli import run
from tests.evaluation import (
    COMMON_GEN,
    LAMBADA,
    PADDED,
    POSITIONS,
    WORDS,
    V,
    evaluate,
    naive_logprobs,
    save_cache,
    save_model,
    save_tokenizer,
    write_corpora,
)
from tests.refusals import refusal
from train.evaluation.config import CORPORA, EvaluateConfig
from train.evaluation.corpora import read_corpus
from train.evaluation.evaluate import evaluate_models
from train.evaluation.tables import table
from train.evaluation.windows import DEFAULT_WINDOW

EOS = 256


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.evaluation.scorer, "CHUNK_BYTES", 4 * V * 5)


def nats(model: Any, read: list[int], targets: int) -> list[tuple[float, bool]]:
    """Nats of the last tokens of a sequence, and whether each was the first choice, one forward pass a sequence."""
    logprobs = naive_logprobs(model, torch.tensor(read[:-1]))
    positions = range(len(read) - targets - 1, len(read) - 1)
    return [(-float(logprobs[at, read[at + 1]]), int(logprobs[at].argmax()) == read[at + 1]) for at in positions]


def naive_strided(model: Any, ids: list[int], window: int, stride: int) -> float:
    """Token by token: each is predicted in the first window that reaches it."""
    sequence, total = [EOS, *ids], 0.0
    for at in range(1, len(sequence)):
        beyond = max(0, at - window)
        end = min(len(sequence) - 1, window + -(-beyond // stride) * stride)
        total += nats(model, sequence[max(0, end - window) : at + 1], 1)[0][0]
    return total


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["gpt2", "llama", "granite", "gemma2"])
def test_strided_figures_equal_naive_ones(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "model", family, rows=PADDED)
    corpora = write_corpora(tmp_path)
    # Naive figures take time: all corpora by one family, one by the others.
    corpora = corpora[:3] if family == "gpt2" else corpora[1:2]
    row = evaluate(tmp_path / "model", corpus=corpora, window=12, stride=5, batch_blocks=3)
    tokenizer = save_tokenizer(tmp_path / "again")
    assert tokenizer.eos_token_id == EOS
    for given, figures in zip(corpora, row["corpora"], strict=True):
        corpus = read_corpus(given)
        documents = [tokenizer(passage.text)["input_ids"] for passage in corpus.passages]
        total = sum(naive_strided(model, ids, 12, 5) for ids in documents)
        assert figures["num_tokens"] == sum(map(len, documents))
        assert figures["loss_nats"] == pytest.approx(total / figures["num_tokens"], rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(total / figures["num_tokens"]), rel=1e-4)
        assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / figures["num_bytes"], rel=1e-5)
        words = int(sum(passage.words.sum() for passage in corpus.passages))
        if corpus.counts_words:
            assert figures["num_words"] == words
            assert figures["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
        else:
            assert (figures["num_words"], figures["word_perplexity"]) == (None, None)
        assert figures["accuracy"] is None


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_examples_equal_naive_ones(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "model", family)
    corpora = write_corpora(tmp_path)[3:]
    row = evaluate(tmp_path / "model", corpus=corpora, window=POSITIONS)
    tokenizer = save_tokenizer(tmp_path / "again")

    def scored(context: str, target: str) -> list[tuple[float, bool]]:
        whole = tokenizer(context + target)["input_ids"]
        return nats(model, whole[-POSITIONS - 1 :], len(whole) - len(tokenizer(context)["input_ids"]))

    lambada, common_gen = row["corpora"]
    words = [scored(text.rpartition(" ")[0], " " + text.rpartition(" ")[2]) for text in LAMBADA]
    loss = sum(nats for word in words for nats, _ in word) / len(LAMBADA)
    assert lambada["loss_nats"] == pytest.approx(loss, rel=1e-5)
    assert lambada["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert lambada["accuracy"] == sum(all(right for _, right in word) for word in words) / len(LAMBADA)
    assert (lambada["num_examples"], lambada["bits_per_byte"]) == (len(LAMBADA), None)
    sentences = [
        scored(f"Words: {', '.join(example['concepts'])}\nSentence:", f" {example['target']}") for example in COMMON_GEN
    ]
    tokens = [nats for sentence in sentences for nats, _ in sentence]
    assert common_gen["loss_nats"] == pytest.approx(np.mean(tokens), rel=1e-5)
    assert common_gen["num_units"] == 2
    num_bytes = sum(len(example["target"].encode()) + 1 for example in COMMON_GEN)
    assert common_gen["num_bytes"] == num_bytes
    assert common_gen["bits_per_byte"] == pytest.approx(sum(tokens) / math.log(2) / num_bytes, rel=1e-5)


def test_a_last_word_is_right_when_each_of_its_tokens_is_the_first_choice(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", std=0.0)
    with torch.no_grad():
        # It always says " the", whatever it reads.
        model.transformer.ln_f.bias[0] = 1.0
        model.lm_head.weight[WORDS.index("Ġthe"), 0] = 5.0
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "lambada"
    path.write_text("".join(json.dumps({"text": f"a {word}"}) + "\n" for word in ("the", "thee", "cat", "the")))
    (figures,) = evaluate(tmp_path / "model", corpus=(f"lambada={path}",))["corpora"]
    assert figures["accuracy"] == 0.5
    assert figures["num_tokens"] == 1 + 2 + 4 + 1


def test_blocks_are_predicted_by_themselves(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    corpora = write_corpora(tmp_path)
    (figures,) = evaluate(tmp_path / "model", corpus=corpora[:1], window=16, mode="blocks")["corpora"]
    text = "".join(passage.text for passage in read_corpus(corpora[0]).passages)
    ids = save_tokenizer(tmp_path / "again")(text)["input_ids"]
    blocks = [ids[start : start + 16] for start in range(0, len(ids), 16)]
    losses = [loss for block in blocks if len(block) > 1 for loss, _ in nats(model, block, len(block) - 1)]
    assert figures["num_tokens"] == len(losses)
    assert figures["loss_nats"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert (figures["mode"], figures["stride"], figures["interval_unit"]) == ("blocks", None, "block")


def test_one_window_suits_all_models_and_a_named_one_is_kept_or_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "long", max_position_embeddings=2 * POSITIONS)
    save_model(tmp_path / "short")
    both = (str(tmp_path / "long"), str(tmp_path / "short"))
    corpora = write_corpora(tmp_path)[1:2]
    rows = evaluate_models(EvaluateConfig(models=both, corpus=corpora, device="cpu"), quiet=True)
    assert [row["corpora"][0]["window_tokens"] for row in rows] == [POSITIONS] * 2
    assert rows[0]["corpora"][0]["stride"] == POSITIONS // 2
    row = evaluate(tmp_path / "long", corpus=corpora)
    assert row["corpora"][0]["window_tokens"] == 2 * POSITIONS
    assert refusal(evaluate, tmp_path / "short", corpus=corpora, window=POSITIONS + 1).kind == "block-too-long"
    assert refusal(evaluate, tmp_path / "short", corpus=corpora, stride=POSITIONS + 1).kind == "bad-stride"


def test_intervals_hold_their_figures_and_pairs_are_surer_than_each(tmp_path: Path) -> None:
    save_model(tmp_path / "one")
    save_model(tmp_path / "two", std=0.31)
    reader = save_cache(tmp_path / "cache", k=4)
    config = EvaluateConfig(
        models=(str(tmp_path / "one"), str(tmp_path / "two")),
        corpus=write_corpora(tmp_path),
        window=20,
        cache=reader.path,
        device="cpu",
        bootstrap=300,
    )
    rows = evaluate_models(config, quiet=True)
    assert evaluate_models(config, quiet=True)[1]["corpora"] == rows[1]["corpora"]
    for first, second in zip(rows[0]["corpora"], rows[1]["corpora"], strict=True):
        assert first["difference"] is None
        difference = second["difference"]
        assert difference["to"] == str(tmp_path / "one")
        assert difference["loss_nats"] == pytest.approx(second["loss_nats"] - first["loss_nats"])
        for figures in (first, second, difference):
            for name, (low, high) in figures["intervals"].items():
                assert low <= figures[name] <= high
        if first["corpus"] == "enwik8":
            low, high = difference["intervals"]["loss_nats"]
            assert high - low < np.ptp(second["intervals"]["loss_nats"])
    for row in rows:
        cache = row["cache"]
        assert set(cache["intervals"]) >= {"loss_nats", "perplexity", "ece", "kl_to_teacher", "agreement", "overlap"}
        assert cache["interval_unit"] == "block"
        for name in set(cache["intervals"]) - {"ece"}:
            low, high = cache["intervals"][name]
            assert low <= cache[name] <= high


def test_models_of_other_tokens_have_no_difference(tmp_path: Path) -> None:
    save_model(tmp_path / "one")
    save_model(tmp_path / "two")
    tokenizer = json.loads((tmp_path / "two" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (tmp_path / "two" / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = (str(tmp_path / "one"), str(tmp_path / "two"))
    config = EvaluateConfig(models=names, corpus=write_corpora(tmp_path)[:1], device="cpu")
    one, two = (row["corpora"][0] for row in evaluate_models(config, quiet=True))
    assert one["num_tokens"] < two["num_tokens"]
    assert two["difference"] is None
    assert (one["num_words"], one["num_bytes"]) == (two["num_words"], two["num_bytes"])


def test_as_many_tokens_of_another_tokenizer_are_not_the_same_tokens(tmp_path: Path) -> None:
    save_model(tmp_path / "one")
    save_model(tmp_path / "two")
    tokenizer = json.loads((tmp_path / "two" / "tokenizer.json").read_text())
    # The same ids, of which two stand for each other's bytes.
    vocab = tokenizer["model"]["vocab"]
    vocab["e"], vocab["a"] = vocab["a"], vocab["e"]
    (tmp_path / "two" / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = (str(tmp_path / "one"), str(tmp_path / "two"))
    config = EvaluateConfig(models=names, corpus=write_corpora(tmp_path)[:2], limit_tokens=32, window=20, device="cpu")
    for one, two in zip(*(row["corpora"] for row in evaluate_models(config, quiet=True)), strict=True):
        assert one["num_tokens"] == two["num_tokens"]
        assert two["difference"] is None


def test_a_model_of_any_length_reads_windows_of_the_default_length(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "bloom")
    path = tmp_path / "model" / "config.json"
    settings = json.loads(path.read_text())
    del settings["max_position_embeddings"]
    path.write_text(json.dumps(settings))
    (figures,) = evaluate(tmp_path / "model", corpus=write_corpora(tmp_path)[1:2])["corpora"]
    assert figures["window_tokens"] == DEFAULT_WINDOW


def test_a_line_of_the_harness_names_its_windows_and_levels_are_not_rounded(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    row = evaluate(tmp_path / "model", corpus=write_corpora(tmp_path)[2:4], window=12, stride=4)
    row["harness"] = [{"figures": {"bits_per_byte": 1.5}}, {"figures": {"accuracy": 0.5}}]
    lines = table({"models": [row], "bootstrap": {"resamples": 9, "level": 0.995, "seed": 0}})
    told = [line for line in lines if "by lm-evaluation-harness" in line]
    assert [line.partition("harness, ")[2] for line in told] == [
        "windows of 12, stride 12: bits_per_byte 1.5000",
        "at most 12 tokens read: accuracy 0.5000",
    ]
    assert lines[-1].startswith("[99.5% intervals]")


@pytest.mark.parametrize(
    "settings",
    [
        {"corpus": ("wikitext2",)},
        {"corpus": ("ptb=",)},
        {"corpus": ("ptb",), "mode": "blocks", "stride": 4},
        {"corpus": ("ptb",), "window": 4, "stride": 5},
        {"text": ("a.txt",), "limit_examples": 3},
        {"text": ("a.txt",), "harness": True},
        {"corpus": ("ptb",), "limit_tokens": 9, "harness": True},
        {"corpus": ("ptb",), "level": 1.0},
    ],
)
def test_settings_of_corpora_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvaluateConfig(models=("m",), **settings)


def test_command_prints_and_writes_the_table_of_all_corpora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name / "student") for name in ("one", "two")]
    for name in names:
        save_model(Path(name))
    corpora = write_corpora(tmp_path)
    arguments = ["evaluate", "--models", names[0], "--models", names[1], "--window", "20", "--device", "cpu"]
    arguments += [part for given in corpora for part in ("--corpus", given)]
    arguments += ["--sample", "the \x1b[1mcat", "--sample-tokens", "5", "--limit-examples", "2", "--seed", "3"]
    out = tmp_path / "new" / "report.json"
    assert run([*arguments, "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == printed
    assert printed["bootstrap"] == {"resamples": 1000, "level": 0.95, "seed": 3}
    for row, name in zip(printed["models"], names, strict=True):
        assert row["file_bytes"] == (Path(name) / "model.safetensors").stat().st_size
        assert [figures["corpus"] for figures in row["corpora"]] == list(CORPORA)
        assert [figures["sampled"] for figures in row["corpora"]] == [False, False, False, True, True]
        assert row["speed"] is None
        assert row["samples"][0]["prompt"] == "the \x1b[1mcat"
    assert run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["corpus", "figure", "one/student", "two/student"]
    assert any(line.startswith("wikitext103  word perplexity") and line.count("[") == 2 for line in lines)
    assert any("loss - one/student" in line and "+0.0000 [+0.0000, +0.0000]" in line for line in lines)
    assert any("a sample: 2 of 3 examples" in line for line in lines)
    assert not any("\x1b" in line for line in lines)
    assert run([*arguments[:3], "--corpus", "wikitext"]) == 2
    assert run([*arguments[:3], "--corpus", "ptb", "--json", "--out", str(tmp_path)]) == 3


def test_speed_is_shown_beside_the_first_models() -> None:
    speed = {"prompt_tokens": 8, "prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 10.0, "first_token_s": 0.08}
    speed |= {"token_s": 0.1, "peak_bytes": 5e8}
    row = {"name": "a", "parameters": 1000, "file_bytes": 4000000, "texts": [], "cache": None, "corpora": []}
    row |= {"speed": speed, "samples": [], "harness": None}
    faster = {**speed, "decode_tokens_per_s": 16.0, "prefill_tokens_per_s": 250.0, "peak_bytes": None}
    bootstrap = {"resamples": 0, "level": 0.95, "seed": 0}
    lines = table({"models": [row, {**row, "name": "b", "speed": faster}], "bootstrap": bootstrap})
    assert lines[0].endswith("times: those of a")
    assert lines[2].split() == ["a", "1,000", "4.0", "100", "1.00", "10.0", "1.00", "80.0", "100.0", "500"]
    assert lines[3].split() == ["b", "1,000", "4.0", "250", "2.50", "16.0", "1.60", "80.0", "100.0", "-"]


# --- what models write


def test_samples_are_greedy_or_drawn_with_a_seed(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", std=0.5)
    tokenizer = save_tokenizer(tmp_path / "again")
    prompt = "the cat"

    def written(**settings: Any) -> str:
        (sample,) = evaluate(tmp_path / "model", sample=(prompt,), sample_tokens=6, **settings)["samples"]
        return str(sample["text"])

    ids = tokenizer(prompt)["input_ids"]
    for _ in range(6):
        ids.append(int(naive_logprobs(model, torch.tensor(ids))[-1].argmax()))
        if ids[-1] == EOS:
            break
    assert written() == tokenizer.decode(ids[len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
    state = torch.random.get_rng_state()
    drawn = written(sample_temperature=1.0, seed=5)
    assert drawn == written(sample_temperature=1.0, seed=5)
    assert len({written(sample_temperature=1.0, seed=seed) for seed in range(4)}) > 1
    assert torch.equal(state, torch.random.get_rng_state())
    # What the folder says of generation does not count.
    greedy = written()
    GenerationConfig(repetition_penalty=50.0, no_repeat_ngram_size=1).save_pretrained(tmp_path / "model")
    assert written() == greedy
    assert refusal(evaluate, tmp_path / "model", sample=("",)).kind == "no-prompt"
    assert refusal(evaluate, tmp_path / "model", sample=("a" * POSITIONS,)).kind == "block-too-long"
