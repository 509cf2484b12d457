"""Causal and masked language models: which one a configuration is, and what lies between layers and output head.

In: a configuration, or a model of it. Out: the class that builds it; last hidden states and what the output head reads.

Legend: B batch, T time, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from cache_spec.errors import BadInputError
from cache_spec.manifest import Manifest


class States(NamedTuple):
    """What a student makes of a batch of blocks, [B, T, D]."""

    last_BTD: Tensor
    """The base model's last hidden state, after the final norm."""
    read_BTD: Tensor
    """What the output head reads: the same, but for a masked language model, which transforms it first."""


def is_masked_lm(config: Any) -> bool:
    """Whether a configuration is of a model that reads both ways and finds out masked tokens."""
    reads_one_way = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (reads_one_way or config.is_encoder_decoder)


def model_class(config: Any) -> Any:
    """The class of ``transformers`` that builds the model of a configuration, output head included."""
    return AutoModelForMaskedLM if is_masked_lm(config) else AutoModelForCausalLM


def refuse_other_kind(config: Any, manifest: Manifest, place: object) -> None:
    """Raise ``not-a-causal-lm`` or ``not-a-masked-lm`` for a model that cannot read what the cache's teacher read."""
    masked = manifest.masking is not None
    if is_masked_lm(config) != masked:
        expected = "a masked language model" if masked else "a language model that reads left to right"
        kind = "not-a-masked-lm" if masked else "not-a-causal-lm"
        raise BadInputError(kind, place, expected=f"{expected}, as in the cache", found=config.model_type)


def student_states(student: PreTrainedModel, read_ids_BT: Tensor, lengths_B: Tensor) -> States:
    """Last hidden states of blocks of ``lengths_B`` real tokens, and what the output head reads of them."""
    base: Any = student.base_model
    if not is_masked_lm(student.config):
        # No attention mask: blocks are padded on the right only, and causal attention never sees what comes later.
        hidden_BTD: Tensor = base(input_ids=read_ids_BT, use_cache=False).last_hidden_state
        return States(hidden_BTD, hidden_BTD)
    # A block without a real token counts nothing, but attention to nothing would be NaN.
    position_T = torch.arange(read_ids_BT.shape[1], device=read_ids_BT.device)
    mask_BT = (position_T < lengths_B.clamp(min=1).unsqueeze(1)).long()
    last_BTD: Tensor = base(input_ids=read_ids_BT, attention_mask=mask_BT).last_hidden_state
    return States(last_BTD, _before_head(student, last_BTD))


def own_logits(student: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """What the model itself makes of whole blocks, [B, T, rows of its head]."""
    options = {} if is_masked_lm(student.config) else {"use_cache": False}
    logits_BTV: Tensor = student(input_ids=ids_BT, **options).logits
    return logits_BTV


def _before_head(student: Any, hidden_BTD: Tensor) -> Tensor:
    """The transform of the families whose heads are built as BERT's, DistilBERT's or RoBERTa's."""
    if hasattr(student, "cls"):
        states_BTD: Tensor = student.cls.predictions.transform(hidden_BTD)
    elif hasattr(student, "vocab_transform"):
        states_BTD = student.vocab_layer_norm(student.activation(student.vocab_transform(hidden_BTD)))
    elif hasattr(student, "lm_head") and hasattr(student.lm_head, "layer_norm"):
        states_BTD = student.lm_head.layer_norm(F.gelu(student.lm_head.dense(hidden_BTD)))
    else:
        expected = "a head as BERT's, DistilBERT's or RoBERTa's"
        raise BadInputError("unsupported-head", f"student {type(student).__name__}", expected=expected)
    return states_BTD
