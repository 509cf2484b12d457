"""A narrower student from the teacher's own tensors: some heads, channels and units are kept, the rest is cut.

In: the teacher's tensors, its config and the student's. Out: tensors of the student's shapes. Of each kind of axis one
choice is made and used everywhere, so that what remains still fits together:

    D  channels of the residual stream, evenly spaced
    H  query heads, evenly spaced within the group that shares a key-value head
    G  key-value heads, evenly spaced
    C  channels of a head, evenly spaced; rotated pairs stay pairs
    F  feed-forward units, evenly spaced

A sum over n of N units is that much smaller: the matrix that follows them is scaled by sqrt(N / n), as independent
contributions would ask for. Channels and heads are left as they are: norms keep the size of what comes in, and scaled
cuts started and trained worse where it was measured. With nothing cut every tensor stays as it is, bit by bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cache_spec.errors import BadInputError
from train.student_config import config_key

# The axes of each tensor by the end of its name; a small letter is the one that is summed over. V vocabulary, P
# positions; Q query heads times channels, K key-value heads times channels; GPT-2 has queries,
# keys and values side by side (S), GPT-NeoX within each head (I).
_LLAMA = {
    r"(embed_tokens|lm_head)\.weight": "VD",
    r"self_attn\.q_proj\.weight": "Qd",
    r"self_attn\.[kv]_proj\.weight": "Kd",
    r"self_attn\.o_proj\.weight": "Dq",
    r"self_attn\.q_proj\.bias": "Q",
    r"self_attn\.[kv]_proj\.bias": "K",
    r"mlp\.(gate|up)_proj\.weight": "Fd",
    r"mlp\.(gate|up)_proj\.bias": "F",
    r"mlp\.down_proj\.weight": "Df",
    r"(self_attn\.o|mlp\.down)_proj\.bias": "D",
    r"(input|post_attention)_layernorm\.weight": "D",
    r"norm\.weight": "D",
}
_AXES: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": {
        r"(wte|lm_head)\.weight": "VD",
        r"wpe\.weight": "PD",
        r"ln_[12]\.(weight|bias)": "D",
        r"attn\.c_attn\.weight": "dS",
        r"attn\.c_attn\.bias": "S",
        r"attn\.c_proj\.weight": "qD",
        r"mlp\.c_fc\.weight": "dF",
        r"mlp\.c_fc\.bias": "F",
        r"mlp\.c_proj\.weight": "fD",
        r"(attn|mlp)\.c_proj\.bias": "D",
        r"ln_f\.(weight|bias)": "D",
    },
    "gpt_neox": {
        r"(embed_in|embed_out|lm_head)\.weight": "VD",
        r"(input|post_attention)_layernorm\.(weight|bias)": "D",
        r"attention\.query_key_value\.weight": "Id",
        r"attention\.query_key_value\.bias": "I",
        r"attention\.dense\.weight": "Dq",
        r"mlp\.dense_h_to_4h\.weight": "Fd",
        r"mlp\.dense_h_to_4h\.bias": "F",
        r"mlp\.dense_4h_to_h\.weight": "Df",
        r"(attention\.dense|mlp\.dense_4h_to_h)\.bias": "D",
        r"final_layer_norm\.(weight|bias)": "D",
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What the shapes of a decoder's tensors follow from."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    """Channels of a head whose positions are rotated, the first ones; each belongs to the one half of them further."""
    inner: int
    positions: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> _Sizes:
        width, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or width // heads
        rope: Any = getattr(config, "rope_parameters", None)
        return cls(
            width=width,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            rotated=int(head_dim * rope.get("partial_rotary_factor", 1.0)) if rope else 0,
            inner=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width,
            positions=config.max_position_embeddings,
        )


def refuse_unsliceable(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Raise ``cannot-slice`` for another family, ``bad-student-config`` for a size that the teacher does not have."""
    if teacher.model_type not in _AXES:
        expected = "one of " + ", ".join(sorted(_AXES))
        hint = "start from teacher-layers or from a config instead"
        raise BadInputError("cannot-slice", f"model_type {teacher.model_type}", expected=expected, hint=hint)
    ours, theirs = _Sizes.of(student), _Sizes.of(teacher)
    names = {
        "width": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "inner": "n_inner" if hasattr(teacher, "n_inner") else "intermediate_size",
        "positions": "max_position_embeddings",
    }
    for field, name in names.items():
        found, most = getattr(ours, field), getattr(theirs, field)
        if not 1 <= found <= most:
            place = config_key(teacher, name)
            raise BadInputError("bad-student-config", place, expected=f"1 to {most}, the teacher's", found=found)
    group = theirs.heads // theirs.kv_heads
    if ours.heads % ours.kv_heads or ours.heads // ours.kv_heads > group:
        place = config_key(teacher, "num_key_value_heads")
        expected = f"a divisor of the {ours.heads} heads, with at most {group} of them each"
        raise BadInputError("bad-student-config", place, expected=expected, found=ours.kv_heads)


def slice_tensors(
    tensors: Mapping[str, Tensor], teacher: PreTrainedConfig, student: PreTrainedConfig
) -> dict[str, Tensor]:
    """The teacher's tensors cut to the student's sizes; tensors that are no weights of the family are left out."""
    theirs, ours = _Sizes.of(teacher), _Sizes.of(student)
    chosen = _chosen(theirs, ours)
    scale = {"f": math.sqrt(theirs.inner / ours.inner)}
    sliced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        axes = _axes(teacher.model_type, name)
        if axes is None:
            continue
        cut = tensor
        for dim, axis in enumerate(axes):
            if axis != "V":
                cut = cut.index_select(dim, chosen[axis.upper()])
            if axis in scale:
                cut = cut * scale[axis]
        sliced[name] = cut.contiguous()
    return sliced


def _axes(model_type: str, name: str) -> str | None:
    for pattern, axes in _AXES[model_type].items():
        if re.fullmatch(rf"(?:.*\.)?{pattern}", name):
            return axes
    return None


def _chosen(theirs: _Sizes, ours: _Sizes) -> dict[str, Tensor]:
    """Indices into the teacher's axes."""
    # Pairs spaced evenly keep their frequencies: those of a narrower head are every so many of the wider one's.
    half, our_half = -(-theirs.rotated // 2), -(-ours.rotated // 2)
    pairs = _evenly(our_half, half)
    rest = 2 * half + _evenly(ours.head_dim - 2 * our_half, theirs.head_dim - 2 * half)
    channels_C = torch.cat([pairs, pairs + half, rest])
    kv_heads_G = _evenly(ours.kv_heads, theirs.kv_heads)
    group, our_group = theirs.heads // theirs.kv_heads, ours.heads // ours.kv_heads
    heads_H = (kv_heads_G[:, None] * group + _evenly(our_group, group)).flatten()

    def rows(starts: Tensor) -> Tensor:
        """Channels of the heads that start there."""
        return (starts[:, None] + channels_C).flatten()

    queries = rows(heads_H * theirs.head_dim)
    parts = torch.arange(3)
    return {
        "D": _evenly(ours.width, theirs.width),
        "F": _evenly(ours.inner, theirs.inner),
        "P": torch.arange(ours.positions),
        "Q": queries,
        "K": rows(kv_heads_G * theirs.head_dim),
        "S": (parts[:, None] * theirs.heads * theirs.head_dim + queries).flatten(),
        "I": rows(((heads_H[:, None] * 3 + parts) * theirs.head_dim).flatten()),
    }


def _evenly(count: int, of: int) -> Tensor:
    """``count`` of ``of`` indices, evenly spaced from 0; all of them where the numbers are equal."""
    return torch.arange(count) * of // max(count, 1)
