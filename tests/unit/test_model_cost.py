"""What a model costs is counted on its architecture, and agrees with the textbook and with a real backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from cache_spec.errors import BadInputError
from tests.models import make_model
from train.model_cost import ModelCost, model_cost

T = 32


def cost_of(family: str, block_tokens: int = T, **changes: Any) -> ModelCost:
    return model_cost(make_model(family, **changes).config, block_tokens, "model")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen2", "bert", "distilbert"])
def test_parameters_are_those_of_the_built_model(family: str) -> None:
    model = make_model(family)
    cost = cost_of(family)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.vocab_size == model.get_output_embeddings().weight.shape[0]
    assert cost.is_counted


def test_flops_of_gpt2_are_the_textbooks() -> None:
    width, layers, rows = 32, 2, 120
    cost = cost_of("gpt2", hidden_size=width, num_hidden_layers=layers, vocab_size=rows)
    assert cost.linear_flops == 2 * layers * 12 * width**2
    assert cost.head_flops == 2 * rows * width
    # Each token sees itself and those before: (T + 1) / 2 on average, for the scores and for their sums.
    assert cost.attention_flops == layers * 2 * 2 * width * (T + 1) / 2
    assert cost.forward_flops == cost.linear_flops + cost.head_flops + cost.attention_flops


def test_shared_heads_cost_less_in_their_projections_and_as_much_in_attention() -> None:
    sizes = {"num_attention_heads": 4, "tie_word_embeddings": False}
    shared, own = (cost_of("llama", num_key_value_heads=heads, **sizes) for heads in (1, 4))
    assert own.linear_flops - shared.linear_flops == 2 * 2 * 2 * 32 * (32 - 8)
    assert own.attention_flops == shared.attention_flops


def test_a_model_that_reads_both_ways_sees_all_tokens() -> None:
    cost = cost_of("bert")
    assert not cost.is_causal
    assert cost.attention_flops == 2 * 2 * 2 * 32 * T


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_kept_bytes_are_those_that_a_real_backward_pass_keeps(family: str) -> None:
    tokens = 61
    model = make_model(family, max_position_embeddings=64)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[-2:] != (tokens, tokens):
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train().base_model(torch.zeros(1, tokens, dtype=torch.long))
    assert output.last_hidden_state.requires_grad
    real = sum(storage.nbytes() for storage in kept.values()) / tokens
    # The kernels of a real device keep a little more or less than the reference ones.
    assert cost_of(family).kept_bytes == pytest.approx(real, rel=0.35)


def test_experts_that_a_token_is_not_sent_to_cost_nothing() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 120}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8}
    one, two = (
        model_cost(AutoConfig.for_model("mixtral", **sizes, num_experts_per_tok=used), T, "model") for used in (1, 2)
    )
    assert one.parameters == two.parameters
    assert two.linear_flops - one.linear_flops == pytest.approx(2 * 2 * 3 * 32 * 48, rel=0.01)


def test_blocks_beyond_the_positions_are_refused() -> None:
    with pytest.raises(BadInputError, match="block-too-long: blocks for model, expected at most 64 tokens, found 65"):
        cost_of("gpt2", block_tokens=65)


def test_a_config_that_makes_no_model_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=30, n_head=4)
    with pytest.raises(BadInputError, match="unknown-cost: model"):
        model_cost(config, T, "model")
