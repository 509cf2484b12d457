"""Configs of well-known models by name, so that a plan needs no file and no network.

In: a name. Out: what ``config.json`` of that model says of its shape; the facts are those that its makers published.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


def _llama(
    width: int, units: int, layers: int, heads: int, shared: int, vocab_size: int, positions: int, *, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": units,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "vocab_size": vocab_size,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, tied=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, 8192, tied=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, 8192, tied=True),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, 32768) | {"model_type": "mistral"},
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152064, 32768) | {"model_type": "qwen2"},
}


def preset(name: str) -> PreTrainedConfig | None:
    """The config of that name; None where none is shipped."""
    values = PRESETS.get(name)
    if values is None:
        return None
    config: PreTrainedConfig = AutoConfig.for_model(**values)
    return config
