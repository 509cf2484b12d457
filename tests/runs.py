"""Small training runs: a teacher, a cache of it whose last block is short, settings, and what a run left.

In: a folder. Out: files as a capture would leave them, and settings of a run of 12 steps on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cache_spec.manifest import sha256_hex
from tests.synthetic import make_manifest, make_rows, write_cache
from train.run_files import CLOCK_METRICS
from train.teacher_layers import weights_digest

VOCABULARY, WIDTH, TOKENS, BLOCKS = 50, 16, 8, 22


def teacher_config() -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )


def save_run_teacher(folder: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    GPT2LMHeadModel(teacher_config()).save_pretrained(folder)
    return folder


def save_run_cache(folder: Path, teacher: Path, *, seed: int = 0, lengths: list[int] | None = None) -> Path:
    """A cache of random targets; ``lengths`` are the real tokens of its last blocks, more ragged than captured."""
    lengths = lengths or [5]
    teacher_config().save_pretrained(folder / "teacher")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w0", unk_token="w1"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    manifest = make_manifest(
        num_blocks=BLOCKS,
        block_tokens=TOKENS,
        shard_blocks=4,
        vocab_size=VOCABULARY,
        k=5,
        window=4,
        hidden_size=WIDTH,
        num_layers=3,
    )
    weights = manifest.teacher.model_copy(
        update={"weights_sha256": weights_digest(list(teacher.glob("*.safetensors")))}
    )
    files = {
        str(path.relative_to(folder)): sha256_hex(path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    }
    rows = make_rows(manifest, seed=seed)
    rows["block_lengths"][-len(lengths) :] = lengths
    corpus = manifest.corpus.model_copy(update={"num_tokens": BLOCKS * TOKENS - (TOKENS - lengths[-1])})
    write_cache(folder, manifest.model_copy(update={"teacher": weights, "files": files, "corpus": corpus}), rows)
    return folder


def run_settings(cache: Path, teacher: Path, out: Path) -> dict[str, Any]:
    return {
        "cache": cache,
        "out": out,
        "teacher": str(teacher),
        "num_layers": 2,
        "epochs": 2,
        "batch_blocks": 2,
        "accumulate": 2,
        "window_shards": 2,
        "checkpoint_every": 3,
        "log_every": 1,
        "temperature": 2.0,
        "cosine_weight": 0.5,
        "dropout": 0.1,
        "device": "cpu",
        "tensorboard": False,
    }


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def metric_lines(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics, but for what a clock says."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK_METRICS} for line in found]


def assert_same_run(left: Path, right: Path) -> None:
    """Final weights and metrics are equal in every bit."""
    ours, theirs = weights_of(left), weights_of(right)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert metric_lines(left) == metric_lines(right)
