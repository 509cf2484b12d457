"""``hidden``: the last hidden state of every token, and the teacher's output head once: dense and exact.

In: stored hidden states. Out: the same as floats; with the head they give the full distribution at any temperature.

Legend of axes: B blocks, T tokens, D teacher width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np

from cache_spec.encodings.base import EncodingRecord, broken
from cache_spec.errors import CacheError
from cache_spec.targets import Array, ArrayPart, Geometry, HiddenTargets, TablePart

_LARGEST_INT8 = 127
_MAX_SCALE = float(np.finfo(np.float32).max) / 128


class Hidden(EncodingRecord):
    """The teacher's last hidden state, after its final norm, for every token."""

    name: Literal["hidden"] = "hidden"
    dtype: Literal["float16", "int8"] = "float16"
    """float16, or int8 with one scale for each vector."""
    head_dtype: Literal["float16", "float32"] = "float32"
    """Of the stored output head: float16 where every weight of the teacher's is one."""
    bias: bool = False
    """Whether the output head has a bias."""

    any_temperature: ClassVar[bool] = True

    def arrays(self, g: Geometry) -> tuple[ArrayPart, ...]:
        """The states, and the scales of int8."""
        states = ArrayPart(
            name="last_hidden",
            dims=("token", "width"),
            row_shape=(g.block_tokens, g.hidden_size),
            dtype=np.float16 if self.dtype == "float16" else np.int8,
            shuffle="shuffle",
            attributes={"description": "last hidden state after the final norm; times output_head it gives logits"},
        )
        if self.dtype == "float16":
            return (states,)
        scales = ArrayPart(
            name="last_hidden_scale",
            dims=("token",),
            row_shape=(g.block_tokens,),
            dtype=np.float32,
            shuffle="bitshuffle",
            attributes={"description": "what last_hidden is multiplied by"},
        )
        return states, scales

    def tables(self, g: Geometry) -> tuple[TablePart, ...]:
        """The teacher's output head, cut to the real vocabulary."""
        weight = TablePart(
            name="output_head",
            dims=("vocabulary", "width"),
            shape=(g.vocab_size, g.hidden_size),
            dtype=np.float16 if self.head_dtype == "float16" else np.float32,
            attributes={"description": "weight of the teacher's output head: logits are last_hidden times its rows"},
        )
        if not self.bias:
            return (weight,)
        bias = TablePart(
            name="output_bias",
            dims=("vocabulary",),
            shape=(g.vocab_size,),
            dtype=np.float32,
            attributes={"description": "bias of the teacher's output head"},
        )
        return weight, bias

    def decode(
        self, stored: Mapping[str, Array], g: Geometry, at: int, place: object, prepared: Array | None = None
    ) -> HiddenTargets:
        """The states, float16 as stored or float32 of int8; CacheError ``non-finite``."""
        hidden_BTD = stored["last_hidden"]
        if self.dtype == "int8":
            scale_BT = checked_scales(stored["last_hidden_scale"], f"{place} last_hidden_scale")
            return HiddenTargets(hidden_BTD=hidden_BTD * scale_BT[..., None])
        # A sum over finite float16 values cannot overflow float32, and NaN or infinity survive in it.
        with np.errstate(invalid="ignore"):
            sums_BT = hidden_BTD.sum(-1, dtype=np.float32)
        if not np.isfinite(sums_BT).all():
            raise CacheError("non-finite", f"{place} last_hidden", expected="finite hidden states")
        return HiddenTargets(hidden_BTD=hidden_BTD)

    def check(self, stored: Mapping[str, Array], g: Geometry, place: object) -> Iterator[CacheError]:
        """Every broken rule of the values."""
        yield from broken(lambda: self.decode(stored, g, 0, place))


def encode_int8(values: Array) -> tuple[Array, Array]:
    """int8 codes [..., D] and float32 scales [...] of vectors, symmetric; the error is at most half a scale."""
    scale = (np.abs(values).max(-1) / _LARGEST_INT8).astype(np.float32)
    codes = np.rint(values / np.where(scale > 0, scale, 1)[..., None]).clip(-_LARGEST_INT8, _LARGEST_INT8)
    return codes.astype(np.int8), scale


def checked_scales(scales: Array, place: object) -> Array:
    """The same scales; CacheError ``non-finite`` unless all are at least 0 and their products with codes finite."""
    # Written so that NaN is refused too.
    if not ((scales >= 0) & (scales <= _MAX_SCALE)).all():
        raise CacheError("non-finite", place, expected=f"scales of 0 to {_MAX_SCALE:g}")
    return scales
