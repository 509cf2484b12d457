"""A causal or masked language model, checked and ready to read blocks.

In: a teacher's files. Out: ``Teacher``: last hidden states of a batch of blocks, the output head cut to the real
vocabulary, and what the manifest says of model and tokenizer.

Legend of axes: B blocks, T tokens, V real vocabulary, D width, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line, is_out_of_memory
from cache_spec.manifest import TeacherInfo, TokenizerInfo
from pipeline.compiled import COMPILE_BACKEND, compiling
from pipeline.teacher_files import (
    TeacherFiles,
    describe_model,
    load_config,
    load_tokenizer,
    quiet_transformers,
    source_options,
)
from pipeline.teacher_kind import is_masked_lm, model_class

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


class States(NamedTuple):
    """What a teacher makes of a batch of blocks, [B, T, D] in its dtype on its device."""

    read_BTD: torch.Tensor
    """What the output head reads."""
    last_BTD: torch.Tensor
    """The last hidden state, after the final norm: the same, but for a head that transforms it first."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A loaded, checked language model in eval mode."""

    files: TeacherFiles
    info: TeacherInfo
    tokenizer_info: TokenizerInfo
    tokenizer: Any
    model: Any
    head: OutputHead
    device: torch.device
    """Of the output head, and of what follows it."""
    dtype: torch.dtype
    is_masked_lm: bool
    """Whether it reads both ways; its ``model`` then has no output head of its own any more."""
    compiled: bool = False
    """Whether ``torch.compile`` makes its kernels, when it is first called."""

    @property
    def dtype_name(self) -> str:
        """The dtype without its module, as the manifest says it: ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def hidden(self, input_ids_BT: np.ndarray[Any, Any]) -> torch.Tensor:
        """Last hidden state after the final norm, [B, T, D] in the teacher's dtype on its device."""
        ids_BT = torch.from_numpy(input_ids_BT.astype(np.int64)).to(self.device)
        hidden_BTD: torch.Tensor = self.model.base_model(input_ids=ids_BT).last_hidden_state
        return hidden_BTD.to(self.device)

    @torch.inference_mode()
    def states(self, read_ids_BT: np.ndarray[Any, Any], lengths_B: np.ndarray[Any, Any]) -> States:
        """What comes of blocks of ``lengths_B`` real tokens, as it reads them; KdpipeError ``cannot-compile``."""
        with compiling(self.compiled, f"teacher {self.info.name}"):
            return self._states(read_ids_BT, lengths_B)

    def _states(self, read_ids_BT: np.ndarray[Any, Any], lengths_B: np.ndarray[Any, Any]) -> States:
        if not self.is_masked_lm:
            # What lies behind a token changes nothing.
            hidden_BTD = self.hidden(read_ids_BT)
            return States(hidden_BTD, hidden_BTD)
        ids_BT, last = torch.from_numpy(read_ids_BT.astype(np.int64)).to(self.device), []
        real_BT = np.arange(read_ids_BT.shape[1]) < lengths_B[:, None]
        mask_BT = torch.from_numpy(real_BT.astype(np.int64)).to(self.device)
        hook = self.model.base_model.register_forward_hook(lambda _module, _inputs, output: last.append(output[0]))
        try:
            read_BTD: torch.Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
        finally:
            hook.remove()
        return States(read_BTD.to(self.device), last[0].to(self.device))


def load_teacher(
    files: TeacherFiles,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
    spread: bool = False,
    compiled: bool = False,
) -> Teacher:
    """Load a teacher's weights and prove on a short input that its logits are its last hidden state times its head.

    ``device``: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps. ``dtype``: auto (bfloat16 on CUDA that has
    it, else float32), float32, bfloat16 or float16. ``attention``: a transformers attention implementation, None for
    its default. ``spread`` lays its layers over all GPUs that this process sees, one after the other. ``compiled``: its
    base model is compiled when it is first called. Raises what
    ``describe_teacher`` raises, and BadInputError ``no-such-device``, ``no-such-dtype``, ``broken-weights``,
    ``incomplete-weights``, ``other-shape``, ``unsupported-head``, ``teacher-too-large``.
    """
    place = f"teacher {files.name}"
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    config = load_config(files)
    tokenizer = load_tokenizer(files)
    options = source_options(files) | ({} if attention is None else {"attn_implementation": attention})
    options |= {} if files.gguf_file is not None else {"use_safetensors": True}
    options |= {"device_map": "auto"} if spread else {}
    try:
        with quiet_transformers():
            loaded: Any = model_class(config).from_pretrained(
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
    model.requires_grad_(False).eval()
    if spread:
        _refuse_offloaded(model, place)
    else:
        model.to(torch_device)
    model.config.use_cache = model.config.get_text_config().use_cache = False
    info, tokenizer_info = describe_model(files, model, tokenizer)
    head = _output_head(model, info.vocab_size)
    teacher = Teacher(
        files=files,
        info=info,
        tokenizer_info=tokenizer_info,
        tokenizer=tokenizer,
        model=model,
        head=head,
        device=head.weight_VD.device,
        dtype=torch_dtype,
        is_masked_lm=is_masked_lm(config),
        compiled=compiled,
    )
    if teacher.is_masked_lm:
        _check_masked_head(teacher)
        _take_head_off(model)
    else:
        _check_reads_left_to_right(teacher)
        _check_head(teacher)
    if compiled:
        # After the checks, whose short inputs would be compiled for. Captures have one shape.
        model.base_model.compile(backend=COMPILE_BACKEND, dynamic=False)
    return teacher


def _refuse_offloaded(model: Any, place: str) -> None:
    """Weights that are fetched anew for each batch make a capture last longer than anybody waits."""
    if devices := {str(device) for device in getattr(model, "hf_device_map", {}).values()}:
        places = sorted(devices & {"cpu", "disk"})
        if places and len(devices) > len(places):
            expected = "room for the whole teacher on the GPUs that this process sees"
            raise BadInputError("teacher-too-large", place, expected=expected, found=f"layers left to {places[0]}")


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
    scale = float(_HEAD_CHECK_LOGIT / _logits(teacher, teacher.hidden(ids_BT)).abs().max().clamp_min(1e-6))

    def scale_up(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = (output.last_hidden_state.float() * scale).to(teacher.dtype)
        seen.append(output.last_hidden_state)
        return output

    hook = teacher.model.base_model.register_forward_hook(scale_up)
    try:
        theirs_NV = _own_logits(teacher, ids_BT)
    finally:
        hook.remove()
    _compare(teacher, seen, theirs_NV)


@torch.inference_mode()
def _check_masked_head(teacher: Teacher) -> None:
    """The same where the head is the last of several modules: what it reads is scaled up, at its own door."""
    ids_BT, seen, scale = _check_ids(teacher.info), [], 1.0

    def scale_up(_module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        seen.append((inputs[0].float() * scale).to(teacher.dtype))
        return (seen[-1],)

    hook = teacher.model.get_output_embeddings().register_forward_pre_hook(scale_up)
    try:
        scale = float(_HEAD_CHECK_LOGIT / _own_logits(teacher, ids_BT).abs().max().clamp_min(1e-6))
        theirs_NV = _own_logits(teacher, ids_BT)
    finally:
        hook.remove()
    _compare(teacher, seen[1:], theirs_NV)


def _take_head_off(model: Any) -> None:
    """Put in the output head's place a module that lets pass what it reads: what is in front of it then comes out."""
    head = model.get_output_embeddings()
    parent, _, name = next(name for name, module in model.named_modules() if module is head).rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())


def _own_logits(teacher: Teacher, ids_BT: np.ndarray[Any, Any]) -> torch.Tensor:
    """float32 [N, V]: what the model itself makes of ids."""
    logits_BTV: torch.Tensor = teacher.model(input_ids=torch.from_numpy(ids_BT).to(teacher.device)).logits
    return logits_BTV.flatten(0, 1)[:, : teacher.info.vocab_size].float().to(teacher.device)


def _logits(teacher: Teacher, hidden_BTD: torch.Tensor) -> torch.Tensor:
    hidden_ND = hidden_BTD.flatten(0, 1)
    return teacher.head.logits(hidden_ND, torch.empty(len(hidden_ND), teacher.info.vocab_size, device=teacher.device))


def _compare(teacher: Teacher, seen: list[torch.Tensor], theirs_NV: torch.Tensor) -> None:
    place, expected = f"teacher {teacher.info.name}", "logits equal to the last hidden state times the output head"
    if not seen:
        raise BadInputError("unsupported-head", place, expected=expected, found="an output head that is never called")
    ours_NV = _logits(teacher, seen[0].to(teacher.device))
    # A teacher of NaNs passes: the first block that it reads says so.
    error = (ours_NV - theirs_NV).abs().max()
    if error > _TOLERANCES[teacher.dtype] * ours_NV.abs().max():
        raise BadInputError(
            "unsupported-head",
            place,
            expected=expected,
            found=f"a difference of {error:.3g} ({teacher.info.model_type} scales or caps its logits)",
        )
