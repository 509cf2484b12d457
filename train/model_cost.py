"""What a model costs, from its config alone: parameters, FLOPs a token, and bytes that a backward pass needs kept.

In: a config and the tokens of a block. Out: a ``ModelCost``. The model is built without memory (on torch's meta device)
and reads one block there: torch counts the FLOPs of every matrix product, and what autograd would keep. So the figures
are the architecture's own. Where it cannot be read so, they follow from the shapes of its weights, and say so.

Legend of axes: B blocks (1), T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from train.lm_kind import is_masked_lm, model_class
from train.student import quiet_transformers

_KEPT_BYTES = 68
"""A layer's for each of its width, where they could not be counted: 34 in half precision (Korthikanti et al. 2022)."""
_PROBE_TOKENS = 61
"""Bytes kept are counted on so few: a prime, which is no width of any model, tells what is [.., T, T] from the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """A model in numbers; FLOPs are of one token's forward pass, two for each multiplication and addition."""

    model_type: str
    parameters: int
    vocab_size: int
    """Rows of the output head."""
    width: int
    layers: int
    is_causal: bool
    linear_flops: float
    """Of all matrix products with weights, but for the output head's."""
    head_flops: float
    """Of the output head."""
    attention_flops: float
    """Of queries with keys and weights with values, over the tokens that each one sees: half of them and its own where
    the model reads left to right."""
    kept_bytes: float
    """float32 bytes a token that autograd keeps of the layers, attention's [T, T] weights left out: fused kernels do
    not keep them."""
    is_counted: bool = True
    """Whether a block was read; else figures are those of the weights' shapes."""

    @property
    def forward_flops(self) -> float:
        """Of one token's whole forward pass."""
        return self.linear_flops + self.head_flops + self.attention_flops


def model_cost(config: PreTrainedConfig, block_tokens: int, place: str) -> ModelCost:
    """Count what a model of ``config`` costs on blocks of ``block_tokens``.

    Raises BadInputError ``block-too-long``, or ``unknown-cost`` for an architecture that cannot be built or read
    without its weights.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < block_tokens:
        expected, found = f"at most {positions} tokens", f"{block_tokens} tokens"
        raise BadInputError("block-too-long", f"blocks for {place}", expected=expected, found=found)
    try:
        with quiet_transformers(), torch.device("meta"):
            model: Any = model_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture fails in its own way on numbers that make no sense
        found = f"{type(error).__name__}: {first_line(error)}"
        expected = "a model that can be built from config.json"
        raise BadInputError("unknown-cost", place, expected=expected, found=found) from None
    rows, width = model.get_output_embeddings().weight.shape
    causal = not is_masked_lm(config)
    try:
        with quiet_transformers(), torch.device("meta"):
            model.config.use_cache = False
            (products, attention), kept_bytes = _flops(model, block_tokens), _kept_bytes(model)
        is_counted = True
    except Exception:  # kernels without a rule for tensors that have no values, masks of other shapes
        products, attention = _flops_of_weights(model, block_tokens)
        kept_bytes, is_counted = float(_KEPT_BYTES * width * config.num_hidden_layers), False
    return ModelCost(
        model_type=config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=rows,
        width=width,
        layers=config.num_hidden_layers,
        is_causal=causal,
        linear_flops=products / block_tokens - 2 * rows * width,
        head_flops=2.0 * rows * width,
        attention_flops=attention / block_tokens * ((block_tokens + 1) / (2 * block_tokens) if causal else 1.0),
        kept_bytes=kept_bytes,
        is_counted=is_counted,
    )


def _flops_of_weights(model: Any, block_tokens: int) -> tuple[float, float]:
    """The same where no block can be read: every weight once, of stacks of experts those that a token is sent to."""
    config, head = model.config, model.get_output_embeddings().weight
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for key in names if (n := getattr(config, key, 0))), 1)
    used = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    weights: float = head.numel()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and parameter is not head and parameter not in embeddings:
            weights += parameter.numel() * (used if "experts" in name else 1.0)
    return 2 * weights * block_tokens, 4.0 * block_tokens**2 * head.shape[1] * config.num_hidden_layers


def _flops(model: Any, block_tokens: int) -> tuple[float, float]:
    """Of one block: products with weights, and products of activations with each other, each over all T x T pairs."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**_block(block_tokens))
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for name, count in counts.items() if "attention" in name or "bmm" in name)
    return sum(counts.values()) - attention, attention


def _kept_bytes(model: Any) -> float:
    model.train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    # The storages themselves are held: a freed one's address may be another's.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.shape[-2:] != (_PROBE_TOKENS, _PROBE_TOKENS) and storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(**_block(_PROBE_TOKENS))
    return sum(storage.nbytes() for storage in kept.values()) / _PROBE_TOKENS


def _block(tokens: int) -> dict[str, torch.Tensor]:
    """One block without values. A mask of two axes models look into, which nobody can here; one of four they add."""
    return {
        "input_ids": torch.zeros(1, tokens, dtype=torch.long, device="meta"),
        "attention_mask": torch.zeros(1, 1, tokens, tokens, device="meta"),
    }
