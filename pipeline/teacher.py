"""A causal language model, checked and ready to read blocks.

In: a teacher's files. Out: ``Teacher``: last hidden states of a batch of blocks, the output head cut to the real
vocabulary, and what the manifest says of model and tokenizer.

Legend of axes: B blocks, T tokens, V real vocabulary, D width, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line, is_out_of_memory
from cache_spec.manifest import TeacherInfo, TokenizerInfo
from pipeline.teacher_files import (
    TeacherFiles,
    describe_model,
    load_config,
    load_tokenizer,
    quiet_transformers,
    source_options,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEAD_CHECK_LOGIT = 100.0
"""The self-check scales logits up to this, so that a soft cap cannot hide behind small logits."""
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """The output head cut to the real vocabulary; logits always come out in float32."""

    weight_VD: torch.Tensor
    """float32, or the teacher's half precision where the device multiplies into float32."""
    bias_V: torch.Tensor | None

    def logits(self, hidden_ND: torch.Tensor, out_NV: torch.Tensor) -> torch.Tensor:
        """float32 logits [N, V] of hidden states [N, D], written to ``out_NV`` (float32, contiguous)."""
        if self.weight_VD.dtype == torch.float32:
            torch.mm(hidden_ND.float(), self.weight_VD.T, out=out_NV)
        else:
            out_NV.copy_(_half_matmul(hidden_ND, self.weight_VD.T))
        return out_NV if self.bias_V is None else out_NV.add_(self.bias_V)


def _half_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.mm(left, right, out_dtype=torch.float32)
    return product


def _output_head(model: Any, vocab_size: int) -> OutputHead:
    """Logits rounded to bfloat16 lie on a grid of 1/8 near 20, so half precision is only multiplied into float32."""
    head = model.get_output_embeddings()
    weight_VD = head.weight.detach()[:vocab_size]
    bias = getattr(head, "bias", None)
    if weight_VD.dtype != torch.float32:
        try:
            _half_matmul(weight_VD[:1], weight_VD[:1].T)
        except (TypeError, RuntimeError):  # not on this device or by this torch: pay for a float32 copy once
            weight_VD = weight_VD.float()
    return OutputHead(weight_VD=weight_VD, bias_V=None if bias is None else bias.detach()[:vocab_size].float())


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A loaded, checked causal language model in eval mode."""

    files: TeacherFiles
    info: TeacherInfo
    tokenizer_info: TokenizerInfo
    tokenizer: Any
    model: Any
    head: OutputHead
    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype without its module, as the manifest says it: ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def hidden(self, input_ids_BT: np.ndarray[Any, Any]) -> torch.Tensor:
        """Last hidden state after the final norm, [B, T, D] in the teacher's dtype on its device."""
        ids_BT = torch.from_numpy(input_ids_BT.astype(np.int64)).to(self.device)
        hidden_BTD: torch.Tensor = self.model.base_model(input_ids=ids_BT).last_hidden_state
        return hidden_BTD


def load_teacher(
    files: TeacherFiles, *, device: str = "auto", dtype: str = "auto", attention: str | None = None
) -> Teacher:
    """Load a teacher's weights and prove on a short input that its logits are its last hidden state times its head.

    ``device``: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps. ``dtype``: auto (bfloat16 on CUDA that has
    it, else float32), float32, bfloat16 or float16. ``attention``: a transformers attention implementation, None for
    its default. Raises what ``describe_teacher`` raises, and BadInputError ``no-such-device``, ``no-such-dtype``,
    ``broken-weights``, ``incomplete-weights``, ``other-shape``, ``unsupported-head``.
    """
    place = f"teacher {files.name}"
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    load_config(files)
    tokenizer = load_tokenizer(files)
    options = source_options(files) | ({} if attention is None else {"attn_implementation": attention})
    options |= {} if files.gguf_file is not None else {"use_safetensors": True}
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.folder,
                dtype=torch_dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInputError("broken-weights", place, found=first_line(error)) from None
    # A checkpoint without a language model's head would be given a random one.
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise BadInputError("incomplete-weights", place, expected=f"{missing[0]} and {len(missing) - 1} more weights")
    if mismatched := sorted(report["mismatched_keys"]):
        weight, stored, wanted = mismatched[0]
        raise BadInputError(
            "other-shape",
            f"teacher {files.name}: {weight}",
            expected=f"the shape {tuple(wanted)} of config.json",
            found=tuple(stored),
            hint="config.json and the weights do not belong together",
        )
    model.requires_grad_(False).eval().to(torch_device)
    model.config.use_cache = model.config.get_text_config().use_cache = False
    info, tokenizer_info = describe_model(files, model, tokenizer)
    teacher = Teacher(
        files=files,
        info=info,
        tokenizer_info=tokenizer_info,
        tokenizer=tokenizer,
        model=model,
        head=_output_head(model, info.vocab_size),
        device=torch_device,
        dtype=torch_dtype,
    )
    _check_reads_left_to_right(teacher)
    _check_head(teacher)
    return teacher


def pick_device(name: str) -> torch.device:
    """The device of that name, checked to be there: BadInputError ``no-such-device``."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if not counts.get(kind) or (index and not (index.isdecimal() and int(index) < counts[kind])):
        there = ["cpu", *(f"cuda:{i}" for i in range(counts["cuda"])), *(["mps"] * counts["mps"])]
        raise BadInputError("no-such-device", f"device {name}", expected="auto or one of " + ", ".join(there))
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; auto is bfloat16 on CUDA that has it, else float32."""
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if half else torch.float32
    if name not in _DTYPES:
        raise BadInputError("no-such-dtype", f"dtype {name}", expected="one of auto, " + ", ".join(_DTYPES))
    return _DTYPES[name]


def _check_ids(info: TeacherInfo) -> np.ndarray[Any, Any]:
    """Two rows of ids that differ in their last token only."""
    ids_BT = np.tile(np.arange(min(16, info.max_positions or 16)) * 7919 % info.vocab_size, (2, 1))
    ids_BT[1, -1] = (ids_BT[1, -1] + 1) % info.vocab_size
    return ids_BT


def _check_reads_left_to_right(teacher: Teacher) -> None:
    hidden_BTD = teacher.hidden(_check_ids(teacher.info)).float()
    bound = _TOLERANCES[teacher.dtype] * hidden_BTD.abs().max()
    if (hidden_BTD[0, :-1] - hidden_BTD[1, :-1]).abs().gt(bound).any():
        place = f"teacher {teacher.info.name}"
        raise BadInputError("not-a-causal-lm", place, found="hidden states that depend on tokens to their right")


@torch.inference_mode()
def _check_head(teacher: Teacher) -> None:
    """Compare the model's own logits with ours, on hidden states scaled up so that a soft cap or factor shows."""
    ids_BT = _check_ids(teacher.info)
    seen: list[torch.Tensor] = []

    def ours(hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden_ND = hidden_BTD.flatten(0, 1)
        return teacher.head.logits(
            hidden_ND, torch.empty(len(hidden_ND), teacher.info.vocab_size, device=teacher.device)
        )

    hidden_BTD = teacher.hidden(ids_BT)
    scale = _HEAD_CHECK_LOGIT / ours(hidden_BTD).abs().max().clamp_min(1e-6)

    def scale_up(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = (output.last_hidden_state.float() * scale).to(teacher.dtype)
        seen.append(output.last_hidden_state)
        return output

    hook = teacher.model.base_model.register_forward_hook(scale_up)
    try:
        ids = torch.from_numpy(ids_BT).to(teacher.device)
        theirs_NV = teacher.model(input_ids=ids).logits.flatten(0, 1)[:, : teacher.info.vocab_size].float()
    finally:
        hook.remove()
    ours_NV = ours(seen[0])
    # A teacher of NaNs passes: the first block that it reads says so.
    error = (ours_NV - theirs_NV).abs().max()
    if error > _TOLERANCES[teacher.dtype] * ours_NV.abs().max():
        raise BadInputError(
            "unsupported-head",
            f"teacher {teacher.info.name}",
            expected="logits equal to the last hidden state times the output head",
            found=f"a difference of {error:.3g} ({teacher.info.model_type} scales or caps its logits)",
        )
