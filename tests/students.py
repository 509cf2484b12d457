"""Teachers of five layers, their manifests, and the students that are built from them.

In: a family. Out: a teacher's folder; the manifest of a cache of it; a student built as a run would build it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from cache_spec.manifest import Manifest
from tests.models import ROWS, make_model
from tests.synthetic import make_manifest
from train.student import StudentBuild, build_student
from train.teacher_layers import weights_digest

V = ROWS
BLOCK_TOKENS = 16
NUM_LAYERS = 5
LLAMA_SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
TEACHERS: dict[str, dict[str, Any]] = {
    "gpt2": {key: size for key, size in LLAMA_SIZES.items() if key != "intermediate_size"},
    "llama": {**LLAMA_SIZES, "num_key_value_heads": 2},
    "gpt_neox": LLAMA_SIZES,
    "qwen2": {
        **LLAMA_SIZES,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
}


def save_teacher(folder: Path, model_type: str, *, max_shard_size: str = "1GB", rows: int = V, **changes: Any) -> Any:
    """A random model in evaluation mode, saved without a tokenizer."""
    special = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    model = make_model(model_type, std=0.3, **TEACHERS[model_type] | {"vocab_size": rows} | special | changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model.eval()


def teacher_manifest(teacher_folder: Path, *, vocab_size: int = V, block_tokens: int = BLOCK_TOKENS) -> Manifest:
    """The manifest of a cache of this teacher."""
    config = AutoConfig.from_pretrained(teacher_folder)
    return make_manifest(
        num_blocks=2,
        block_tokens=block_tokens,
        shard_blocks=2,
        vocab_size=vocab_size,
        padded_vocab_size=config.vocab_size,
        k=4,
        window=block_tokens,
        hidden_size=config.hidden_size,
        teacher_name=str(teacher_folder),
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        weights_sha256=weights_digest(teacher_folder.glob("*.safetensors")),
    )


def build(teacher_folder: Path, cache: Path, *, manifest: Manifest | None = None, **changes: Any) -> StudentBuild:
    """Build a student from the files of a cache; of what is not changed, the layers of the teacher are copied."""
    (cache / "teacher").mkdir(parents=True, exist_ok=True)
    if not (cache / "teacher" / "config.json").exists():
        shutil.copy(teacher_folder / "config.json", cache / "teacher" / "config.json")
    settings: dict[str, Any] = {
        "teacher_folder_in_cache": cache / "teacher",
        "manifest": manifest or teacher_manifest(teacher_folder),
        "init": "teacher-layers",
        "num_layers": None,
        "layer_indices": None,
        "overrides": {},
        "teacher": None,
        "checkpoint": None,
        "seed": 3,
        "initializer_range": None,
    }
    return build_student(**settings | changes)
