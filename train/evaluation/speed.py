"""How fast models generate: folders of models come in, tokens a second of prefill and decode go out.

One sequence at a time, greedy, with the key-value cache, the same prompt for all. Models are timed in turns (A B C
A B C ...), each loaded anew for its turn: what slows the machine for a while slows all of them, and only one is in
memory.

Legend: B batch (1), T time.
"""

from __future__ import annotations

import inspect
import multiprocessing
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import AutoModelForCausalLM

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.failures import first_line
from train.lm_kind import is_masked_lm
from train.memory import out_of_memory_at
from train.student import quiet_transformers
from train.student_config import load_config


class SpeedConfig(BaseModel):
    """How generation is timed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens that are read in one pass; fewer where the model of the fewest positions has no room for them."""
    new_tokens: int = Field(default=32, ge=2)
    """Tokens that are generated one by one."""
    rounds: int = Field(default=3, ge=1)
    """Turns of each model; the median counts."""
    peak_memory: bool = False
    """Also generate once in a process of its own for each model, and tell its peak memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians over a model's turns, at batch size 1."""

    prompt_tokens: int
    """Tokens of the prompt."""
    prefill_tokens_per_s: float
    """Prompt tokens by the time until the first new token is known."""
    decode_tokens_per_s: float
    """New tokens after the first, by their time."""
    first_token_s: float
    """Latency of the first new token."""
    token_s: float
    """Latency of each further one."""
    peak_bytes: int | None = None
    """Most memory that generation took, in a process that did nothing else: on CUDA what PyTorch allocated there, else
    all that the process held, interpreter and libraries included. None: not measured, or the system does not say."""


class Generated(NamedTuple):
    """What one timed generation gave."""

    ids_BT: Tensor
    """int64, the new tokens."""
    prefill_s: float
    decode_s: float


def measure_speeds(
    folders: Mapping[str, Path], config: SpeedConfig, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Speed]:
    """Time each model of ``folders``, by name.

    Raises BadInputError ``unknown-model``, ``unreadable-weights``, or ``block-too-long`` where a model has no position
    for a prompt; and KdpipeError ``out-of-memory``.
    """
    prompt_tokens = _fitting_prompt(folders, config)
    turns: dict[str, list[Generated]] = {name: [] for name in folders}
    with quiet_transformers(), out_of_memory_at(f"generation on {device}"):
        for _ in range(config.rounds):
            for name, folder in folders.items():
                model = _load(folder, device, dtype)
                prompt_BT = _prompt(prompt_tokens, model, device)
                # The first generation of a loaded model also pays for what is set up once.
                generate(model, prompt_BT, min(2, config.new_tokens))
                turns[name].append(generate(model, prompt_BT, config.new_tokens))
                del model
    peaks = {name: _peak_bytes(folder, config, device, dtype, prompt_tokens) for name, folder in folders.items()}
    return {name: _median(done, prompt_tokens, peaks[name]) for name, done in turns.items()}


@torch.inference_mode()
def generate(model: Any, prompt_BT: Tensor, new_tokens: int) -> Generated:
    """Generate greedily, whatever ends a text, and time the first token and the others."""
    # Generation needs the logits of the last position only; most architectures can leave the others out.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    new: list[Tensor] = []
    _wait_for(prompt_BT.device)
    began = time.perf_counter()
    output: Any = model(input_ids=prompt_BT, use_cache=True, **last_only)
    new.append(output.logits[:, -1:].argmax(dim=-1))
    _wait_for(prompt_BT.device)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        output = model(input_ids=new[-1], past_key_values=output.past_key_values, use_cache=True, **last_only)
        new.append(output.logits[:, -1:].argmax(dim=-1))
    _wait_for(prompt_BT.device)
    return Generated(torch.cat(new, dim=1), first - began, time.perf_counter() - first)


def _fitting_prompt(folders: Mapping[str, Path], config: SpeedConfig) -> int:
    """Tokens of the prompt that all models are given."""
    prompt_tokens = config.prompt_tokens
    for name, folder in folders.items():
        model_config = load_config(folder, "unknown-model")
        if is_masked_lm(model_config):
            raise BadInputError("not-a-causal-lm", f"generation by {name}", expected="a model that generates text")
        positions = getattr(model_config, "max_position_embeddings", None)
        if isinstance(positions, int):
            if positions <= config.new_tokens:
                place, expected = f"generation by {name}", f"fewer than its {positions} positions"
                raise BadInputError("block-too-long", place, expected=expected, found=f"{config.new_tokens} new tokens")
            prompt_tokens = min(prompt_tokens, positions - config.new_tokens)
    return prompt_tokens


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # safetensors, transformers and the system each raise their own
        raise BadInputError("unreadable-weights", folder, found=first_line(error)) from None
    return model.requires_grad_(False).eval().to(device)


def _prompt(num_tokens: int, model: Any, device: torch.device) -> Tensor:
    """The same ids for every model of one vocabulary."""
    vocab_size = model.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, num_tokens), generator=generator).to(device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak_bytes(
    folder: Path, config: SpeedConfig, device: torch.device, dtype: torch.dtype, prompt_tokens: int
) -> int | None:
    if not config.peak_memory:
        return None
    # Spawned, not forked: a copy of this process would begin with all that it ever held.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        settings = (folder, str(device), dtype, prompt_tokens, config.new_tokens, torch.get_num_threads())
        try:
            return pool.submit(_generate_alone, *settings).result()
        except BrokenProcessPool:
            place, hint = f"generation by {folder} in a process of its own", "it may have run out of memory"
            raise KdpipeError("process-ended", place, expected="a result", found="none", hint=hint) from None


def _generate_alone(
    folder: Path, device_name: str, dtype: torch.dtype, prompt_tokens: int, new_tokens: int, num_threads: int
) -> int | None:
    """Load a model, generate once, and return the most memory that this process has taken."""
    torch.set_num_threads(num_threads)
    device = torch.device(device_name)
    with quiet_transformers():
        model = _load(folder, device, dtype)
        generate(model, _prompt(prompt_tokens, model, device), new_tokens)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if peak is None else int(peak.split()[1]) * 1024


def _median(turns: list[Generated], prompt_tokens: int, peak_bytes: int | None) -> Speed:
    prefill_s = statistics.median(turn.prefill_s for turn in turns)
    token_s = statistics.median(turn.decode_s for turn in turns) / (turns[0].ids_BT.shape[1] - 1)
    return Speed(
        prompt_tokens=prompt_tokens,
        prefill_tokens_per_s=round(prompt_tokens / prefill_s, 1),
        decode_tokens_per_s=round(1 / token_s, 1),
        first_token_s=round(prefill_s, 6),
        token_s=round(token_s, 6),
        peak_bytes=peak_bytes,
    )
