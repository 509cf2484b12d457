"""Figures of an evaluation equal naive dense ones in float64, count each byte once, and bad input is refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import train.evaluation.scorer
from cache_spec.errors import KdpipeError
from pipeline.cli import run
from tests.evaluation import (
    BLOCK,
    PADDED,
    POSITIONS,
    TEXT,
    WORDS,
    V,
    evaluate,
    naive_logprobs,
    save_cache,
    save_model,
    save_tokenizer,
)
from tests.refusals import refusal
from tests.synthetic import make_manifest, make_rows, write_cache
from train.evaluation.config import EvaluateConfig
from train.evaluation.tables import table
from train.evaluation.text import DOCUMENT_GAP, read_text, tokenise
from train.export import export_student
from train.student import build_student


def naive_loss(model: Any, blocks: list[torch.Tensor]) -> tuple[float, int]:
    losses = [-naive_logprobs(model, ids)[:-1].gather(1, ids.long()[1:, None]) for ids in blocks]
    return float(torch.cat(losses).sum()), sum(map(len, losses))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.evaluation.scorer, "CHUNK_BYTES", 4 * V * 5)


# --- plain text


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("rows", [V, PADDED])
@pytest.mark.parametrize("family", ["gpt2", "llama", "granite", "gemma2"])
def test_figures_on_text_equal_naive_ones_for_linear_scaled_and_capped_heads(
    tmp_path: Path, text: Path, family: str, rows: int
) -> None:
    model = save_model(tmp_path / "model", family, rows=rows)
    row = evaluate(tmp_path / "model", text=(str(text),), batch_blocks=5)
    ids = torch.tensor(save_tokenizer(tmp_path / "again")(TEXT)["input_ids"])
    assert len(ids) % BLOCK > 1, "the last block is a partial one"
    assert len(ids) // BLOCK % 5, "the last batch is a partial one"
    nats, count = naive_loss(model, [ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK)])
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    (figures,) = row["texts"]
    assert figures["num_tokens"] == count
    assert figures["loss_nats"] == pytest.approx(nats / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / figures["num_bytes"], rel=1e-5)
    assert 0 < figures["ece"] < 1
    assert figures["tokens_per_s"] > 0
    assert row["cache"] is None


def test_bytes_of_split_characters_count_once_and_unpredicted_tokens_not(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tokenised = tokenise("aé€😀the", tokenizer, place="text", block_tokens=4)
    assert tokenised.bytes_per_token.tolist() == [1, 2, 0, 3, 0, 0, 4, 0, 0, 0, 3]
    assert tokenised.is_predicted.tolist() == [False, True, True, True] * 2 + [False, True, True]
    assert tokenised.num_predicted == 8
    assert tokenised.num_predicted_bytes == 12
    assert [batch.shape for batch in tokenised.batches(1)] == [(1, 4), (1, 4), (1, 3)]


def test_dropped_characters_count_with_the_token_after_them_and_at_the_end_with_the_last() -> None:
    words = Tokenizer(models.WordLevel({"é": 0, "cd": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    tokenised = tokenise(" é  cd – \n", tokenizer, place="text", block_tokens=8)
    assert tokenised.ids.tolist() == [0, 1, 2]
    assert tokenised.bytes_per_token.tolist() == [3, 4, 6]


def test_last_block_of_one_token_predicts_nothing(tmp_path: Path) -> None:
    tokenised = tokenise("abcde", save_tokenizer(tmp_path), place="text", block_tokens=4)
    assert [batch.shape for batch in tokenised.batches(8)] == [(1, 4)]
    assert (tokenised.num_predicted, tokenised.num_predicted_bytes) == (3, 3)


def test_uniform_model_of_a_padded_vocabulary_has_the_loss_log_v(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "model", rows=PADDED, std=0.0)
    figures = evaluate(tmp_path / "model", text=(str(text),))["texts"][0]
    assert figures["loss_nats"] == pytest.approx(math.log(V), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(V, rel=1e-5)
    bits = math.log2(V) * figures["num_tokens"] / figures["num_bytes"]
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_limit_tokens_keeps_exactly_the_first(tmp_path: Path, text: Path) -> None:
    model = save_model(tmp_path / "model")
    figures = evaluate(tmp_path / "model", text=(str(text),), limit_tokens=BLOCK + 5)["texts"][0]
    ids = torch.tensor(save_tokenizer(tmp_path / "again")(TEXT)["input_ids"])[: BLOCK + 5]
    nats, count = naive_loss(model, [ids[:BLOCK], ids[BLOCK:]])
    assert figures["num_tokens"] == count == BLOCK + 3
    assert figures["loss_nats"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize(("limit", "expected"), [(1, "a"), (2, "a"), (3, "aé"), (5, "aé"), (6, "aé€"), (99, "aé€z")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_limit_bytes_cuts_back_to_a_whole_character(tmp_path: Path, limit: int, expected: str, mark: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(mark + "aé€z", encoding="utf-8")
    assert read_text(path, limit) == expected


def test_texts_of_json_lines_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one\\u2028"}\n\n{"text": "twö", "id": 3}\n', encoding="utf-8")
    assert read_text(path) == f"one\u2028{DOCUMENT_GAP}twö"
    assert read_text(path, 11) == f"one\u2028{DOCUMENT_GAP}tw"


def test_half_precision_stays_close(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "model")
    whole, half = (evaluate(tmp_path / "model", text=(str(text),), dtype=d) for d in ("float32", "bfloat16"))
    assert (whole["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert half["texts"][0]["loss_nats"] == pytest.approx(whole["texts"][0]["loss_nats"], rel=0.05)


# --- text and a cache


def test_a_model_without_tokenizer_is_measured_on_a_cache_but_not_on_text(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "model")
    reader = save_cache(tmp_path / "cache", k=4)
    with_tokenizer = evaluate(tmp_path / "model", cache=reader.path)["cache"]
    (tmp_path / "model" / "tokenizer.json").unlink()
    without = evaluate(tmp_path / "model", cache=reader.path)["cache"]
    assert without["kl_to_teacher"] == with_tokenizer["kl_to_teacher"]
    assert refusal(evaluate, tmp_path / "model", text=(str(text),)).kind == "no-tokenizer"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen2"])
def test_text_and_cache_are_read_with_the_tokenizer_of_the_files_in_every_family(
    tmp_path: Path, text: Path, family: str
) -> None:
    """Beside some families' configs AutoTokenizer puts the family's own tokenizer in the place of a plain fast one."""
    manifest = make_manifest(vocab_size=V, padded_vocab_size=PADDED, k=4, block_tokens=8, hidden_size=16)
    reader = save_cache(tmp_path / "cache", k=4)
    model = save_model(tmp_path / "model", family, rows=PADDED)
    expected = save_tokenizer(tmp_path / "again")(TEXT)["input_ids"]
    (tmp_path / "cache" / "teacher").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "cache" / "teacher" / "config.json")
    built = build_student(
        teacher_folder_in_cache=tmp_path / "cache" / "teacher",
        manifest=manifest,
        init="checkpoint",
        num_layers=None,
        layer_indices=None,
        overrides={},
        teacher=None,
        checkpoint=str(tmp_path / "model"),
        seed=0,
        initializer_range=None,
    )
    folder = tmp_path / "cache" / "tokenizer"
    export_student(built.model, tmp_path / "student", tokenizer_folder=folder, manifest=manifest, card={})
    ids = torch.tensor(expected)
    nats, count = naive_loss(model, [ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK)])
    for name in ("model", "student"):
        row = evaluate(tmp_path / name, text=(str(text),), cache=reader.path)
        (figures,) = row["texts"]
        assert figures["num_tokens"] == count
        assert figures["loss_nats"] == pytest.approx(nats / count, rel=1e-5)
        assert row["cache"]["num_tokens"] == 7 * 7


def test_out_of_memory_is_one_line(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model")
    for place in ("train.evaluation.scorer.Scorer.logits", "train.evaluation.scorer.refuse_incomplete"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_: torch.empty(1 << 50))
            with pytest.raises(KdpipeError) as caught:
                evaluate(tmp_path / "model", text=(str(text),))
        assert caught.value.kind == "out-of-memory"
        assert "--batch-blocks" in str(caught.value)


# --- bad input


def test_models_that_cannot_be_opened_are_refused(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(train.evaluation.scorer, "snapshot_download", unreachable)
    given = {"text": (str(text),)}
    assert refusal(evaluate, tmp_path / "gone", **given).kind == "unknown-model"
    model = tmp_path / "model"
    save_model(model)
    (model / "tokenizer.json").write_text("{}")
    assert refusal(evaluate, model, **given).kind == "no-tokenizer"
    save_tokenizer(model)
    tensors = load_file(model / "model.safetensors")
    first = tensors.pop("transformer.ln_f.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert refusal(evaluate, model, **given).kind == "unreadable-weights"
    (model / "model.safetensors").write_bytes(b"no tensors")
    assert refusal(evaluate, model, **given).kind == "unreadable-weights"
    (model / "model.safetensors").unlink()
    torch.save({**tensors, "transformer.ln_f.weight": first}, model / "pytorch_model.bin")
    assert refusal(evaluate, model, **given).kind == "unknown-model"


def test_a_model_that_reads_ahead_is_refused(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "model", "bert", is_decoder=False)
    assert refusal(evaluate, tmp_path / "model", text=(str(text),)).kind == "not-a-causal-lm"


def test_a_model_whose_logits_are_no_numbers_is_refused(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "model", std=math.inf)
    reader = save_cache(tmp_path / "cache", k=4)
    for on in ({"text": (str(text),)}, {"cache": reader.path}):
        with pytest.raises(KdpipeError) as caught:
            evaluate(tmp_path / "model", **on)
        assert caught.value.kind == "non-finite-loss"


def test_blocks_beyond_the_models_positions_are_refused(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "model")
    assert refusal(evaluate, tmp_path / "model", text=(str(text),), block_tokens=POSITIONS + 1).kind == "block-too-long"
    reader = save_cache(tmp_path / "cache", k=4, block_tokens=POSITIONS + 4)
    assert refusal(evaluate, tmp_path / "model", cache=reader.path).kind == "block-too-long"


def test_models_of_another_vocabulary_are_refused(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "small", rows=V - 1)
    assert refusal(evaluate, tmp_path / "small", text=(str(text),)).kind == "vocabulary-mismatch"
    reader = save_cache(tmp_path / "cache", k=4)
    save_model(tmp_path / "model", rows=V + 1)
    assert refusal(evaluate, tmp_path / "model", cache=reader.path).kind == "student-vocabulary"
    save_model(tmp_path / "model")
    save_tokenizer(tmp_path / "model", [*WORDS[1:], WORDS[0]])
    error = refusal(evaluate, tmp_path / "model", cache=reader.path)
    assert (error.kind, error.found) == ("student-vocabulary", f"{V} tokens, {V} differ")


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("gone.txt", None, "unknown-text"),
        ("empty.txt", b"", "no-text"),
        ("blank.txt", b" \n\t", "no-text"),
        ("latin.txt", "naïve".encode("latin-1"), "invalid-utf8"),
        ("cut.txt", "café".encode()[:-1], "invalid-utf8"),
        ("short.txt", b"a", "too-little-text"),
        ("character.txt", "é".encode(), "too-little-text"),
        ("array.jsonl", b"[1]", "bad-record"),
        ("number.jsonl", b'{"text": 1}', "bad-record"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}', "bad-record"),
        ("broken.jsonl", b'{"text": "a', "broken-json"),
        ("latin.jsonl", b'{"text": "\xff"}', "invalid-utf8"),
        ("empty.jsonl", b"\n", "no-text"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, name: str, data: bytes | None, kind: str) -> None:
    save_model(tmp_path / "model")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    error = refusal(evaluate, tmp_path / "model", text=(str(tmp_path / name),))
    assert error.kind == kind


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    assert refusal(evaluate, tmp_path / "model", text=(str(tmp_path),)).kind == "cannot-read"


def test_caches_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    reader = save_cache(tmp_path / "cache", k=4)
    assert refusal(evaluate, tmp_path / "model", cache=reader.path, temperature=3.0).kind == "undeclared-temperature"
    refusal(evaluate, tmp_path / "model", cache=tmp_path / "gone")
    unfinished = make_manifest(vocab_size=V, k=4)
    write_cache(tmp_path / "unfinished", unfinished, make_rows(unfinished), seal=False)
    refusal(evaluate, tmp_path / "model", cache=tmp_path / "unfinished")


def test_an_absent_device_is_refused(tmp_path: Path, text: Path) -> None:
    assert refusal(evaluate, tmp_path / "model", text=(str(text),), device="cuda:99").kind == "no-such-device"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"models": ()},
        {"models": ("",), "text": ("a.txt",)},
        {"cache": "c", "limit_bytes": 5},
        {"text": ("a.txt",), "temperature": 0.0},
        {"text": ("a.txt",), "block_tokens": 1},
        {"text": ("a.txt",), "tempreature": 1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvaluateConfig(**{"models": ("m",), **settings})


def test_settings_import_no_torch() -> None:
    script = "import sys, train.evaluation.config; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# --- the command and its table


def shown(rows: list[dict[str, Any]]) -> list[str]:
    return table({"models": rows, "bootstrap": {"resamples": 0, "level": 0.95, "seed": 0}})


def test_command_prints_one_row_for_each_model(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("one", "two")]
    save_model(tmp_path / "one", "gpt2", rows=PADDED)
    save_model(tmp_path / "two", "llama")
    reader = save_cache(tmp_path / "cache", k=4)
    arguments = ["evaluate", "--models", names[0], "--models", names[1], "--text", str(text), "--block-tokens", "16"]
    arguments += ["--cache", str(reader.path), "--temperature", "2", "--device", "cpu"]
    assert run([*arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed)["models"]
    assert [row["name"] for row in rows] == names
    assert [row["texts"][0]["text"] for row in rows] == [str(text)] * 2
    assert rows[0]["cache"]["temperature"] == 2.0
    assert rows[0]["texts"][0]["num_bytes"] == rows[1]["texts"][0]["num_bytes"]
    assert run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(names[1])] != []
    assert run(["evaluate", "--models", names[0], "--text", str(tmp_path / "gone.txt")]) == 3
    assert capsys.readouterr().err.startswith("error: unknown-text: ")
    assert run(["evaluate", "--models", names[0]]) == 2


def test_table_aligns_columns_and_shows_teacher_and_models_under_each_other() -> None:
    on_text = {"text": "a.txt", "num_tokens": 1000, "loss_nats": 2.5, "perplexity": None, "ece": 0.05}
    on_text |= {"bits_per_byte": 1.25, "tokens_per_s": 10.0}
    on_cache = {"cache": "held", "temperature": 2.0, "num_tokens": 9, "loss_nats": 3.0, "perplexity": 20.0}
    on_cache |= {"ece": 0.125, "kl_is": "exact", "kl_to_teacher": 0.5, "agreement": 0.25, "overlap": 0.75}
    on_cache |= {"teacher_loss": 2.0, "teacher_perplexity": 7.0, "intervals": {}}
    row = {"name": "a-model", "parameters": 1234, "texts": [on_text], "cache": on_cache}
    row |= {"corpora": [], "speed": None, "samples": [], "harness": None}
    assert shown([row]) == [
        "a.txt",
        "model    parameters  tokens    loss  perplexity  bits/byte     ECE  tokens/s",
        "a-model       1,234   1,000  2.5000           -     1.2500  0.0500        10",
        "",
        "held, exact KL and overlap at temperature 2",
        "model          parameters  tokens    loss  perplexity     ECE      KL  agreement  overlap",
        "(the teacher)                   9  2.0000        7.00",
        "a-model             1,234       9  3.0000       20.00  0.1250  0.5000     0.2500   0.7500",
    ]
    drawn = {**on_cache, "kl_is": None, "kl_to_teacher": None, "agreement": None, "overlap": None}
    lines = shown([{**row, "texts": [], "cache": drawn}])
    assert "drawn" in lines[0]
    assert lines[-1].split()[-4:] == ["0.1250", "-", "-", "-"]
    sure = {**on_cache, "intervals": {"loss_nats": [2.5, 3.5], "kl_to_teacher": [0.25, 1.0]}}
    lines = shown([{**row, "cache": sure}])[-2:]
    assert lines[0].split("  ")[0] == "intervals, by block"
    assert lines[1].split()[1:] == ["[2.5000,", "3.5000]", "-", "-", "[0.2500,", "1.0000]", "-", "-"]
    bounds = shown([{**row, "texts": [], "cache": {**on_cache, "kl_is": "lower-bound"}}])
    assert "KL from below" in bounds[0]
    assert shown([]) == []


def test_figures_do_not_depend_on_the_batch(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "model")
    reader = save_cache(tmp_path / "cache", k=4)
    given: dict[str, Any] = {"text": (str(text),), "cache": reader.path}
    one, many = (evaluate(tmp_path / "model", batch_blocks=b, **given) for b in (1, 100))
    compared: list[Callable[[dict[str, Any]], float]] = [
        lambda row: row["texts"][0]["loss_nats"],
        lambda row: row["cache"]["loss_nats"],
        lambda row: row["cache"]["kl_to_teacher"],
        lambda row: row["cache"]["overlap"],
    ]
    for figure in compared:
        assert figure(one) == pytest.approx(figure(many), rel=1e-6)
