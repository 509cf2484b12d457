"""Batches of short blocks without their common padding: decoded targets come in, those up to the longest block go out.

In: a batch whose blocks are padded on the right. Out: the batch cut to its longest block, rounded up to whole windows
of hidden states. Causal attention never sees what comes later, masked language models are told where a block ends, and
no loss counts padding: only the cost changes.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from cache_spec.masking import MaskedText
from cache_spec.reader import TargetBatch
from cache_spec.targets import Targets

Part = TypeVar("Part", bound=Targets | MaskedText)


def trimmed(batch: TargetBatch, window: int | None) -> TargetBatch:
    """``batch`` cut to its longest block; as it is where a block is full. ``window`` is that of its hidden states."""
    size = window or 1
    block_tokens = batch.input_ids_BT.shape[1]
    num_tokens = min(-(-int(batch.lengths_B.max()) // size) * size, block_tokens)
    if num_tokens == block_tokens:
        return batch
    return replace(
        batch,
        input_ids_BT=batch.input_ids_BT[:, :num_tokens],
        targets=_cut(batch.targets, num_tokens),
        masked=None if batch.masked is None else _cut(batch.masked, num_tokens),
        hidden_BWD=None if batch.hidden_BWD is None else batch.hidden_BWD[:, : num_tokens // size],
    )


def _cut(part: Part, num_tokens: int) -> Part:
    """Every array of targets, and of masked text, has the tokens as its second axis."""
    arrays: dict[str, Any] = {field.name: getattr(part, field.name) for field in fields(part)}
    cut: dict[str, Any] = {name: None if array is None else array[:, :num_tokens] for name, array in arrays.items()}
    return type(part)(**cut)
