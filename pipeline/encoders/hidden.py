"""``hidden``: the last hidden state of every token, see ``cache_spec.encodings.hidden``.

In: hidden states, and an output head. Out: their arrays, and the head's tables.

Legend of axes: R rows, D width, V vocabulary, B blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from cache_spec.encodings.hidden import Hidden, encode_int8
from cache_spec.targets import Array, Geometry
from pipeline.encoders.spectrum import Masses, Rows
from pipeline.teacher import OutputHead


class HiddenEncoder:
    """Hidden states as they are, or one scale a vector."""

    num_head = 1
    temperatures: tuple[float, ...] = ()
    float64 = False
    num_uniforms = seed = 0

    def __init__(self, encoding: Hidden, _geometry: Geometry, _tables: Any, _device: Any) -> None:
        self.encoding = encoding

    def columns(self, rows: Rows, _head_logprobs_RK: torch.Tensor) -> dict[str, torch.Tensor]:
        """The states; beyond float16 they become infinite, which the caller refuses."""
        half = self.encoding.dtype == "float16"
        return {"last_hidden": rows.hidden_RD.half() if half else rows.hidden_RD.float()}

    def columns_at(self, _rows: Rows, _masses: Masses) -> dict[str, torch.Tensor]:
        """Nothing: a hidden state serves any temperature."""
        return {}

    def stored(self, columns: Mapping[str, Array]) -> dict[str, Array]:
        """float16 states, or int8 codes and scales."""
        if self.encoding.dtype == "float16":
            return {"last_hidden": columns["last_hidden"]}
        codes, scales = encode_int8(columns["last_hidden"])
        return {"last_hidden": codes, "last_hidden_scale": scales}


def head_dtype(head: OutputHead) -> Literal["float16", "float32"]:
    """The narrowest dtype of ``output_head`` that holds every weight exactly."""
    weight_VD = head.weight_VD
    return "float16" if bool((weight_VD.half().float() == weight_VD.float()).all()) else "float32"


def head_tables(head: OutputHead) -> dict[str, Array]:
    """The tables ``output_head`` and, where there is a bias, ``output_bias``, as they are stored."""
    dtype = np.float16 if head_dtype(head) == "float16" else np.float32
    tables: dict[str, Array] = {"output_head": head.weight_VD.float().cpu().numpy().astype(dtype)}
    if head.bias_V is not None:
        tables["output_bias"] = head.bias_V.float().cpu().numpy()
    return tables
