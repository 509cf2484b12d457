"""The demo's embedded teacher: opens offline, fits its tokenizer, and has read some English."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

import pipeline
from pipeline.demo_text import python_docs

FOLDER = Path(pipeline.__file__).parent / "demo_teacher"
VOCABULARY = 4096
EVALUATED_TOKENS = 4096
# A model that knows nothing stands at 4096, one that knows only how often each token comes at about 800.
GENEROUS_PERPLEXITY = 250.0


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    opened = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    assert isinstance(opened, PreTrainedTokenizerFast)
    return opened


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    opened = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    assert isinstance(opened, GPT2LMHeadModel)
    return opened.train(False)  # type: ignore[no-any-return]


def test_the_tokenizer_and_the_model_have_one_vocabulary(
    tokenizer: PreTrainedTokenizerFast, model: GPT2LMHeadModel
) -> None:
    assert len(tokenizer) == model.config.vocab_size == model.lm_head.weight.shape[0] == VOCABULARY
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY))
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.unk_token is None
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.lm_head.weight is model.transformer.wte.weight


def test_any_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Return the   name,\n\tor «None» if x == 3; naïve 漢字 🙂\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_weights_are_small_and_stored_in_fp16() -> None:
    files = sorted(FOLDER.glob("*.safetensors"))
    assert [file.name for file in files] == ["model.safetensors"]
    assert files[0].stat().st_size < 8_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8_000_000
    with safe_open(files[0], framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_no_asset_names_the_machine_that_made_it() -> None:
    for file in FOLDER.iterdir():
        if file.suffix == ".safetensors":
            continue
        text = file.read_text(encoding="utf-8")
        # Merges of the tokenizer hold any characters; elsewhere a quoted or indented slash begins an absolute path.
        if file.name != "tokenizer.json":
            assert not re.search(r'name_or_path|["\s]/[A-Za-z]', text), file.name
        if file.suffix == ".json":
            json.loads(text)


@torch.inference_mode()
def test_the_teacher_predicts_heldout_text_far_better_than_chance(
    tokenizer: PreTrainedTokenizerFast, model: GPT2LMHeadModel
) -> None:
    ids: list[int] = []
    for _, text in python_docs("heldout"):
        ids += [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
        if len(ids) > EVALUATED_TOKENS:
            break
    ids_BT = torch.tensor(ids[:EVALUATED_TOKENS]).reshape(-1, 256)
    loss = model(input_ids=ids_BT, labels=ids_BT).loss.item()
    assert 5.0 < math.exp(loss) < GENEROUS_PERPLEXITY


def test_the_last_positions_are_trained_too(tokenizer: PreTrainedTokenizerFast, model: GPT2LMHeadModel) -> None:
    text = "\n\n".join(text for _, text in python_docs("heldout"))[:40_000]
    ids_BT = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids[:4096]).reshape(8, 512)
    with torch.inference_mode():
        logits_NV = model(input_ids=ids_BT).logits[:, :-1].flatten(0, 1)
    losses_BT = torch.nn.functional.cross_entropy(logits_NV, ids_BT[:, 1:].flatten(), reduction="none").reshape(8, 511)
    assert losses_BT[:, 256:].mean() < losses_BT[:, 16:256].mean() + 0.5
