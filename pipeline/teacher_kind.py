"""Which kind of language model a teacher is, and what that asks of its class, its tokenizer and its positions.

In: a configuration, a tokenizer, a model without weights. Out: causal or masked, and what a masked one is framed by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from cache_spec.errors import BadInputError

MASKED_LM_HEADS = ("ForMaskedLM", "ForPreTraining")
"""How the names of architectures end that find out masked tokens."""


def is_masked_lm(config: Any) -> bool:
    """Whether a config is of a model that reads both ways and finds out masked tokens."""
    reads_one_way = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not reads_one_way


def model_class(config: Any) -> Any:
    """The class of ``transformers`` that builds the model of a config, head included."""
    return AutoModelForMaskedLM if is_masked_lm(config) else AutoModelForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskingTokens:
    """The ids of a tokenizer that masking needs."""

    mask: int
    cls: int
    sep: int
    special: tuple[int, ...]
    """Ascending."""


def masking_tokens(tokenizer: Any, place: str) -> MaskingTokens:
    """The tokens that mask and frame blocks; BadInputError ``no-mask-token`` where the tokenizer lacks one."""
    mask, cls, sep = (getattr(tokenizer, f"{name}_token_id") for name in ("mask", "cls", "sep"))
    if mask is None or cls is None or sep is None:
        expected = "a tokenizer with tokens for mask, cls and sep"
        raise BadInputError("no-mask-token", place, expected=expected, found=(mask, cls, sep))
    special = sorted({mask, cls, sep, *tokenizer.all_special_ids})
    return MaskingTokens(mask=mask, cls=cls, sep=sep, special=tuple(special))


def unused_positions(model: Any) -> int:
    """Position embeddings in front of the first token's: in some families the padding has one."""
    embedding = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding: int | None = getattr(embedding, "padding_idx", None)
    return 0 if padding is None else padding + 1
