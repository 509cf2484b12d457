"""Encodings of given distributions, without a teacher: made by the encoders, read by the format, spelt out in full.

In: logits [B, T, V] and an encoding's record. Out: stored arrays, or the dense distributions that they mean.

Legend of axes: B blocks, T tokens, V vocabulary, C prototypes, M temperatures, N = B*T rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cache_spec.encodings import Encoding
from cache_spec.encodings.prototype import Prototype, decode_prototypes, encode_prototypes
from cache_spec.targets import Array, Geometry, Tail, dense
from pipeline.encoders import make_encoder
from pipeline.targets import encode_batch
from pipeline.teacher import OutputHead


def one_hot_head(logits_BTV: torch.Tensor) -> tuple[OutputHead, torch.Tensor]:
    """A head and hidden states [B, T, N] whose products are exactly these logits."""
    num_blocks, num_tokens, vocab_size = logits_BTV.shape
    rows = num_blocks * num_tokens
    head = OutputHead(weight_VD=logits_BTV.reshape(rows, vocab_size).T.contiguous(), bias_V=None)
    return head, torch.eye(rows).reshape(num_blocks, num_tokens, rows)


def same_rows(logits_V: torch.Tensor, num_blocks: int, num_tokens: int) -> tuple[OutputHead, torch.Tensor]:
    """A head and hidden states [B, T, 1] that give the same logits everywhere."""
    return OutputHead(weight_VD=logits_V[:, None].clone(), bias_V=None), torch.ones(num_blocks, num_tokens, 1)


def some_tables(encoding: Encoding, geometry: Geometry, seed: int = 0) -> dict[str, Array]:
    """Random tables of an encoding, where it has any that do not follow from the teacher."""
    if not isinstance(encoding, Prototype):
        return {}
    rng = np.random.default_rng(seed)
    shared_MCV = rng.exponential(size=(len(geometry.temperatures), encoding.prototypes, geometry.vocab_size)) ** 2
    return {
        "prototype_classifier": rng.normal(size=(encoding.prototypes, geometry.hidden_size + 1)).astype(np.float32),
        "prototypes": encode_prototypes(shared_MCV / shared_MCV.sum(-1, keepdims=True)),
    }


def encode(
    head: OutputHead,
    hidden_BTD: torch.Tensor,
    encoding: Encoding,
    temperatures: tuple[float, ...],
    *,
    tables: Mapping[str, Array] | None = None,
    **changes: Any,
) -> tuple[dict[str, Array], Geometry]:
    """Stored arrays of full blocks, and the geometry that they have."""
    num_blocks, num_tokens, width = hidden_BTD.shape
    geometry = Geometry(num_tokens, temperatures, len(head.weight_VD), width)
    tables = some_tables(encoding, geometry) if tables is None else tables
    settings: dict[str, Any] = {"first_block": 0} | changes
    arrays = encode_batch(
        head,
        hidden_BTD,
        np.zeros((num_blocks, num_tokens), np.int64),
        np.full(num_blocks, num_tokens),
        encoder=make_encoder(encoding, geometry, tables=tables),
        **settings,
    )
    return arrays, geometry


def meaning(
    arrays: Mapping[str, Array],
    encoding: Encoding,
    geometry: Geometry,
    at: int,
    *,
    tables: Mapping[str, Array] | None = None,
    head: OutputHead | None = None,
    tail: Tail = "uniform",
) -> Array:
    """The dense distributions [B, T, V] at the temperature of index ``at``; prototypes stand for tails they have."""
    tables = some_tables(encoding, geometry) if tables is None else tables
    shared = decode_prototypes(tables["prototypes"])[at] if isinstance(encoding, Prototype) else None
    return dense(
        encoding.decode(arrays, geometry, at, "test", encoding.prepare(tables.__getitem__)),
        temperature=geometry.temperatures[at],
        vocab_size=geometry.vocab_size,
        tail=tail if shared is None else "prototype",
        prototypes_CV=shared,
        head=None if head is None else (head.weight_VD.numpy(), None),
    )


def full(logits: torch.Tensor, temperature: float) -> Array:
    """The teacher's distribution in float64."""
    result: Array = torch.softmax(logits.double() / temperature, -1).numpy()
    return result
