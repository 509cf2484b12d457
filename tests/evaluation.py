"""Tiny models and caches of one vocabulary, with tokenizers of bytes and a few merges, to evaluate on.

In: a folder and sizes. Out: a saved model, a finished cache of a random teacher, figures of one model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cache_spec.reader import CacheReader
from tests.models import make_model
from tests.synthetic import make_manifest, make_rows, write_cache
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import evaluate_models

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = [*BYTES, "<eos>", "th", "the", "Ġthe"]
V = len(WORDS)
PADDED = V + 11
POSITIONS = 32
BLOCK = 16
TEXT = "the cat and the naïve café – 猫 😀 – sat on the mat, the end of the tale.\n" * 3
SIZES = {"hidden_size": 16, "max_position_embeddings": POSITIONS}
LOGITS: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
}
"""What makes logits more than a linear map of hidden states, by family."""


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, family: str = "gpt2", *, rows: int = V, std: float = 0.3, **changes: Any) -> Any:
    """A random model of real size ``V`` with its tokenizer beside it."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = make_model(family, std=std, vocab_size=rows, **{**SIZES, **LOGITS.get(family, {}), **special, **changes})
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model.eval()


def save_cache(folder: Path, *, k: int = 4, last_length: int | None = None, **changes: Any) -> CacheReader:
    """A random teacher's cache of the models' vocabulary."""
    manifest = make_manifest(**{"vocab_size": V, "padded_vocab_size": PADDED, "k": k, "block_tokens": 8, **changes})
    rows = make_rows(manifest, seed=5)
    if last_length is not None:
        rows["block_lengths"][-1] = last_length
    write_cache(folder, manifest, rows)
    save_tokenizer(folder / "tokenizer")
    return CacheReader.open(folder)


def evaluate(model: Path, **settings: Any) -> dict[str, Any]:
    config = EvaluateConfig(**{"models": (str(model),), "block_tokens": BLOCK, "device": "cpu", **settings})
    (row,) = evaluate_models(config, quiet=True)
    return row


def naive_logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float64 log-probabilities [T, V] over the real vocabulary, one block at a time."""
    with torch.no_grad():
        logits: torch.Tensor = model.double()(input_ids=ids.long()[None]).logits[0, :, :V]
    return logits.log_softmax(dim=-1)


WIKITEXT = """ \n = The Cat = \n \n The cat sat on the " mat " , the end @-@ of ( the ) tale . \n the the café \n \n
 = = Later = = \n \n the end , the mat . \n \n = Naïve = \n \n the naïve 猫 's tale , the end . \n the mat \n"""
PTB = " the cat does n't sit <unk> mat \n it cost $ N the end \n"
ENWIK8 = "<page>\n  <title>the</title> [[naïve]] the 猫 '''the''' end\n</page>\n" * 3
LAMBADA = ["the cat sat on the mat the end of the tale", "the naïve café the the the", "the end of the cat"]
COMMON_GEN: list[dict[str, Any]] = [
    {"concept_set_id": 0, "concepts": ["cat", "mat"], "target": "the cat sat on the mat ."},
    {"concept_set_id": 0, "concepts": ["cat", "mat"], "target": "the mat the cat"},
    {"concept_set_id": 1, "concepts": ["café", "end"], "target": "the end of the café ."},
]


def write_corpora(folder: Path) -> tuple[str, ...]:
    """A small file of each corpus's form, as ``--corpus`` names them, in the order of ``CORPORA``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {"lambada": [{"text": text} for text in LAMBADA], "common_gen": COMMON_GEN}
    texts = {"wikitext103": WIKITEXT, "ptb": PTB, "enwik8": ENWIK8}
    texts |= {name: "".join(json.dumps(row) + "\n" for row in of) for name, of in rows.items()}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return tuple(f"{name}={folder / name}" for name in texts)
