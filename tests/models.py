"""Tiny random models of several families, with a tokenizer of words ``w2 w3 …``, saved as a user's folder would be.

In: a family and sizes. Out: a model, or a folder that ``from_pretrained`` opens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

ROWS = 120
"""Rows of each output head; a smaller tokenizer makes the rest padding."""
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": ROWS}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**SIZES, **TOKENS, "max_position_embeddings": 64},
    "llama": {**LLAMA, **TOKENS, "tie_word_embeddings": False},
    "gpt_neox": {**SIZES, **TOKENS, "intermediate_size": 48, "max_position_embeddings": 64},
    "qwen2": {**LLAMA, **TOKENS, "tie_word_embeddings": True},
}
MASKED_FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0},
    "distilbert": {**SIZES, "hidden_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0},
    # The padding's id is left out of the positions: it takes the first ones.
    "roberta": {**SIZES, "intermediate_size": 48, "max_position_embeddings": 65, "pad_token_id": 0},
}
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

ENCODINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 8},
    "prototype": {"k": 8, "prototypes": 3, "residual_draws": 4, "calibration_tokens": 300},
    "sampled": {"draws": 20},
    "sparsified": {"k": 8},
    "hidden": {},
}
"""Settings of a small cache of each encoding."""


def make_tokenizer(vocab_size: int, eos: str | None = "<eos>", *, backwards: bool = False) -> Any:
    """A tokenizer whose word ``wN`` is token N, or the N-th from the end; 0 is unknown, 1 ends a document."""
    words = range(2, vocab_size)
    vocab = {"<unk>": 0, "<eos>": 1} | {
        f"w{i}": n for i, n in zip(words, words[:: -1 if backwards else 1], strict=True)
    }
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=eos)


def make_masking_tokenizer(vocab_size: int) -> Any:
    """A WordPiece tokenizer whose word ``wN`` is token N, from N = 5 on; before that come BERT's special tokens."""
    words = {token: number for number, token in enumerate(BERT_SPECIAL)}
    words |= {f"w{number}": number for number in range(len(words), vocab_size)}
    backend = Tokenizer(models.WordPiece(vocab=words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, BERT_SPECIAL, strict=True)))


def make_model(family: str, *, std: float | None = None, **changes: Any) -> Any:
    """A seeded random language model; settings may have the architecture's own names or the common ones.

    ``std`` draws every parameter anew from a normal distribution: norms and biases too, so that a mix-up shows.
    """
    torch.manual_seed(0)
    is_masked = family in MASKED_FAMILIES
    settings = (MASKED_FAMILIES if is_masked else FAMILIES).get(family, LLAMA | TOKENS) | changes
    own_names = transformers.AutoConfig.for_model(family).attribute_map
    config = transformers.AutoConfig.for_model(family, **{own_names.get(key, key): settings[key] for key in settings})
    auto: Any = transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    if std is not None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return model


def make_folder(folder: Path, family: str = "gpt2", vocab_size: int = 100, spread: float = 1.0, **changes: Any) -> Path:
    """A saved model with its tokenizer; ``spread`` scales every weight, for less uniform distributions."""
    model = make_model(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(spread)
    model.save_pretrained(folder)
    tokenizer = make_masking_tokenizer if family in MASKED_FAMILIES else make_tokenizer
    tokenizer(vocab_size).save_pretrained(folder)
    return folder


def write_words(path: Path, *, num_documents: int = 12, words: int = 40, vocab_size: int = 100, seed: int = 0) -> Path:
    """A JSON-lines file of random documents that the tokenizer reads word by word."""
    rng = np.random.default_rng(seed)
    lines = [" ".join(f"w{i}" for i in rng.integers(2, vocab_size, size=words)) for _ in range(num_documents)]
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return path
