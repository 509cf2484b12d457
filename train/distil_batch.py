"""One micro-batch as tensors: what a cache's reader decodes comes in, tensors for the student's device go out.

This is where numpy becomes torch. Tensors travel to the device in narrow dtypes and are widened there.

Legend: B batch, T time, K kept, S residual draws, J points, W windows, D teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cache_spec.masking import MaskedText
from cache_spec.reader import TargetBatch
from cache_spec.targets import HeadTargets, PointTargets, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensors:
    """Tensors that move together."""

    def to(self, device: torch.device | str) -> Self:
        """The same on a device; without waiting for it, where the tensors are pinned."""

        def moved(part: Any) -> Any:
            return part.to(device) if isinstance(part, _Tensors) else part.to(device, non_blocking=part.is_pinned())

        return self._with(moved)

    def pin_memory(self) -> Self:
        """The same in page-locked memory; a DataLoader asks for it by this name."""
        return self._with(lambda part: part.pin_memory())

    def joined(self, others: Sequence[Self]) -> Self:
        """The same with all blocks of ``others`` behind its own."""

        def join(part: Any, *more: Any) -> Any:
            return part.joined(more) if isinstance(part, _Tensors) else torch.cat([part, *more])

        return self._with(join, *others)

    def _with(self, change: Callable[..., Any], *others: Self) -> Self:
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        parts = {name: change(*(getattr(each, name) for each in (self, *others))) for name in names}
        return replace(self, **parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTensors(_Tensors):
    """``HeadTargets`` as tensors: a head, the odds of its tail, and what is known of the tail."""

    ids_BTK: Tensor
    """int32."""
    logprobs_BTK: Tensor
    """float32, nats, at temperature 1."""
    tail_log_odds_BT: Tensor
    """float32, nats, at the training temperature."""
    prototype_BT: Tensor | None = None
    """int32."""
    residual_ids_BTS: Tensor | None = None
    """int32."""
    residual_weights_BTS: Tensor | None = None
    """float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointTensors(_Tensors):
    """``PointTargets`` as tensors: a distribution on few tokens, at the training temperature."""

    ids_BTJ: Tensor
    """int32."""
    probs_BTJ: Tensor
    """float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTensors(_Tensors):
    """``HiddenTargets`` as tensors: the teacher's last hidden state."""

    hidden_BTD: Tensor
    """float16 or float32."""


StoredTensors = HeadTensors | PointTensors | HiddenTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedTensors(_Tensors):
    """``MaskedText`` as tensors."""

    read_ids_BT: Tensor
    """int32: what the student reads."""
    selected_BT: Tensor
    """bool: tokens to be found out."""
    kept_BT: Tensor
    """bool: positions whose targets count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilBatch(_Tensors):
    """Blocks and their targets, as tensors on one device; blocks are packed and padded on the right only."""

    input_ids_BT: Tensor
    """int32."""
    lengths_B: Tensor
    """int64, real tokens in each block."""
    targets: StoredTensors
    """What the teacher says after each position."""
    hidden_BWD: Tensor | None = None
    """float16 or float32, the teacher's last hidden state, mean over each window's real tokens."""
    masked: MaskedTensors | None = None
    """How the blocks were masked; None where the next token is predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TermCounts:
    """What each term is divided by: global counts over the accumulation window (all micro-batches, all ranks)."""

    tokens: float
    """Real tokens."""
    kl_tokens: float
    """Real tokens; of masked text those whose targets count."""
    ce_tokens: float
    """Real tokens that have a next one in their block; of masked text the selected ones."""
    hidden_windows: float
    """Windows with at least one real token."""

    def __add__(self, other: TermCounts) -> TermCounts:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return TermCounts(**{field.name: sum(pair) for field, pair in zip(fields(self), pairs, strict=True)})


def count_terms(lengths_B: Tensor, window: int | None, masked: MaskedTensors | None = None) -> TermCounts:
    """What one micro-batch adds to the global counts."""
    windows = 0 if window is None else int((lengths_B + window - 1).div(window, rounding_mode="floor").sum())
    tokens = int(lengths_B.sum())
    if masked is None:
        ce_tokens = int((lengths_B - 1).clamp(min=0).sum())
        return TermCounts(tokens=tokens, kl_tokens=tokens, ce_tokens=ce_tokens, hidden_windows=windows)
    real_BT = torch.arange(masked.kept_BT.shape[1], device=lengths_B.device) < lengths_B.unsqueeze(1)
    kl_tokens, ce_tokens = (int((each_BT & real_BT).sum()) for each_BT in (masked.kept_BT, masked.selected_BT))
    return TermCounts(tokens=tokens, kl_tokens=kl_tokens, ce_tokens=ce_tokens, hidden_windows=windows)


def masked_tensors(text: MaskedText) -> MaskedTensors:
    """Masked blocks as host tensors."""
    return MaskedTensors(
        read_ids_BT=from_numpy(text.read_ids_BT, np.int32),
        selected_BT=from_numpy(text.selected_BT),
        kept_BT=from_numpy(text.kept_BT),
    )


def to_tensors(batch: TargetBatch, *, pin_memory: bool = False) -> DistilBatch:
    """Return decoded targets as host tensors, in the narrow dtypes that travel to the device."""

    def tensor(array: np.ndarray, dtype: type[np.generic] | None = None) -> Tensor:
        made = from_numpy(array, dtype)
        return made.pin_memory() if pin_memory else made

    def maybe(array: np.ndarray | None, dtype: type[np.generic]) -> Tensor | None:
        return None if array is None else tensor(array, dtype)

    def stored(targets: Targets) -> StoredTensors:
        if isinstance(targets, HeadTargets):
            return HeadTensors(
                ids_BTK=tensor(targets.ids_BTK, np.int32),
                logprobs_BTK=tensor(targets.logprobs_BTK, np.float32),
                tail_log_odds_BT=tensor(targets.tail_log_odds_BT, np.float32),
                prototype_BT=maybe(targets.prototype_BT, np.int32),
                residual_ids_BTS=maybe(targets.residual_ids_BTS, np.int32),
                residual_weights_BTS=maybe(targets.residual_weights_BTS, np.float32),
            )
        if isinstance(targets, PointTargets):
            return PointTensors(
                ids_BTJ=tensor(targets.ids_BTJ, np.int32), probs_BTJ=tensor(targets.probs_BTJ, np.float32)
            )
        return HiddenTensors(hidden_BTD=tensor(targets.hidden_BTD))

    masked = None if batch.masked is None else masked_tensors(batch.masked)
    return DistilBatch(
        input_ids_BT=tensor(batch.input_ids_BT, np.int32),
        lengths_B=tensor(batch.lengths_B, np.int64),
        targets=stored(batch.targets),
        hidden_BWD=None if batch.hidden_BWD is None else tensor(batch.hidden_BWD),
        masked=masked.pin_memory() if masked is not None and pin_memory else masked,
    )


def from_numpy(array: np.ndarray, dtype: type[np.generic] | None = None) -> Tensor:
    """A tensor of an array, in ``dtype`` if it is given; it may share the array's memory."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
