"""What a model writes: prompts come in, their continuations go out.

Legend: B batch (1), T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from cache_spec.errors import BadInputError
from train.evaluation.config import EvaluateConfig


@torch.inference_mode()
def write_samples(model: PreTrainedModel, tokenizer: Any, config: EvaluateConfig) -> list[dict[str, str]]:
    """Continue each prompt of ``config.sample`` until the model ends the text, or runs out of tokens or positions.

    Greedy at temperature 0; else drawn from the whole distribution, the same draws for the same seed. Returns for each
    ``prompt`` and ``text``, the continuation alone. Raises BadInputError ``no-prompt``, ``block-too-long``.
    """
    samples = []
    for prompt in config.sample:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not ids:
            raise BadInputError("no-prompt", "--sample", expected="at least one token", found=repr(prompt))
        positions = getattr(model.config, "max_position_embeddings", None)
        room = config.sample_tokens if not isinstance(positions, int) else positions - len(ids)
        if room < 1:
            raise BadInputError("block-too-long", "--sample", expected=f"fewer than {positions} tokens", found=len(ids))
        is_drawn = config.sample_temperature > 0
        settings = GenerationConfig(
            max_new_tokens=min(config.sample_tokens, room),
            do_sample=is_drawn,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **({"temperature": config.sample_temperature, "top_k": 0, "top_p": 1.0} if is_drawn else {}),
        )
        ids_BT = torch.tensor([ids], device=model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        with _without_its_own_settings(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(config.seed)
            generated: Any = model.generate(  # type: ignore[operator]
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings
            )
        text = tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text})
    return samples


@contextmanager
def _without_its_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """What a model's folder says of generation (a repetition penalty, words to suppress) would fill whatever a call
    leaves open, and make models incomparable."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
