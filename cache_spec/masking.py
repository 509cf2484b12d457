"""Masked text: what a masked language model was shown in place of some tokens, and which positions have targets.

In: the stored ids, which positions were selected, and what stood there instead. Out: the ids that the teacher read, and
the positions whose targets mean something.

Legend of axes: B blocks, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from cache_spec.errors import CacheError
from cache_spec.record import Record
from cache_spec.targets import Array, Targets

SELECTED, REPLACEMENTS = "selected", "replacement_ids"
MIN_BLOCK_TOKENS = 3
"""A token between the two that frame a block."""
_Share = Field(ge=0, le=1)
_TokenId = Field(ge=0)


class MaskingInfo(Record):
    """How blocks are framed and masked, and what is kept of them."""

    probability: float = Field(gt=0, le=1)
    """Share of a block's ordinary tokens, those that are not special, that is selected."""
    mask_share: float = _Share
    """Share of the selected tokens that becomes the mask token."""
    keep_share: float = _Share
    """Share that stays as it is."""
    random_share: float = _Share
    """Share that becomes any token of the vocabulary."""
    smoothing: float = Field(ge=0)
    """A token is selected in proportion to its count in the corpus to the power of minus this."""
    seed: int = Field(ge=0, lt=1 << 63)
    positions: Literal["masked", "all"]
    """Which positions have targets: the selected ones, or all real ones."""
    mask_token_id: int = _TokenId
    cls_token_id: int = _TokenId
    """Begins each block."""
    sep_token_id: int = _TokenId
    """Ends each block."""
    special_ids: tuple[int, ...]
    """Tokens that are never selected, ascending; the three above are among them."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not math.isclose(self.mask_share + self.keep_share + self.random_share, 1, abs_tol=1e-6):
            raise ValueError("the shares of masked, kept and random tokens do not add up to 1")
        if not math.isfinite(self.smoothing):
            raise ValueError("smoothing is not finite")
        if list(self.special_ids) != sorted(set(self.special_ids)) or min(self.special_ids, default=0) < 0:
            raise ValueError("special_ids must be ascending, distinct and at least 0")
        if not {self.mask_token_id, self.cls_token_id, self.sep_token_id} <= set(self.special_ids):
            raise ValueError("the tokens that mask and frame are not among special_ids")
        return self

    def ordinary(self, input_ids_BT: Array, lengths_B: Array) -> Array:
        """bool [B, T]: real tokens that are not special, which may be selected."""
        ordinary_BT: Array = real_positions(lengths_B, input_ids_BT.shape[1]) & ~np.isin(input_ids_BT, self.special_ids)
        return ordinary_BT

    def num_selected(self, num_ordinary_B: Array) -> Array:
        """int64 [B]: how many tokens of a block with so many ordinary ones are selected, at least 1 if there is one."""
        wanted_B = np.floor(self.probability * num_ordinary_B.astype(np.float64) + 0.5).astype(np.int64)
        chosen_B: Array = np.clip(wanted_B, np.minimum(1, num_ordinary_B), num_ordinary_B)
        return chosen_B

    def kept(self, selected_BT: Array, lengths_B: Array) -> Array:
        """bool [B, T]: the positions that have targets."""
        return (
            selected_BT.astype(bool) if self.positions == "masked" else real_positions(lengths_B, selected_BT.shape[1])
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedText:
    """B masked blocks."""

    read_ids_BT: Array
    """What the teacher read, and a student is to read: the text with replacements at selected positions."""
    selected_BT: Array
    """bool: positions whose token is to be found out."""
    kept_BT: Array
    """bool: positions that have targets."""


def masked_text(
    info: MaskingInfo, input_ids_BT: Array, lengths_B: Array, selected_BT: Array, replacements_BT: Array
) -> MaskedText:
    """Masked blocks from what is stored of them."""
    is_selected_BT = selected_BT.astype(bool)
    return MaskedText(
        read_ids_BT=np.where(is_selected_BT, replacements_BT, input_ids_BT),
        selected_BT=is_selected_BT,
        kept_BT=info.kept(selected_BT, lengths_B),
    )


def places(kept_BT: Array) -> Array:
    """int64 [B, T]: which of a block's kept positions each one is, or the last before it, or else the first."""
    place_BT: Array = np.maximum(kept_BT.cumsum(axis=1) - 1, 0)
    return place_BT


def at_positions(targets: Targets, kept_BT: Array) -> Targets:
    """Decoded targets of kept positions, which are stored one after the other, each at its own position."""
    place_BT, block_B1 = places(kept_BT), np.arange(len(kept_BT))[:, None]
    arrays: dict[str, Any] = {field.name: getattr(targets, field.name) for field in fields(targets)}
    moved: dict[str, Any] = {n: None if array is None else array[block_B1, place_BT] for n, array in arrays.items()}
    return type(targets)(**moved)


def real_positions(lengths_B: Array, num_tokens: int) -> Array:
    """bool [B, T]: positions before each block's length."""
    real_BT: Array = np.arange(num_tokens) < lengths_B[:, None]
    return real_BT


def checked_masking(selected_BT: Array, replacements_BT: Array, vocab_size: int, place: object) -> None:
    """CacheError ``bad-selection`` or ``id-out-of-range`` for values that no reader may use."""
    if selected_BT.size and selected_BT.max() > 1:
        raise CacheError("bad-selection", f"{place} {SELECTED}", expected="0 or 1", found=selected_BT.max())
    if replacements_BT.size and replacements_BT.max() >= vocab_size:
        expected, found = f"ids below {vocab_size}", replacements_BT.max()
        raise CacheError("id-out-of-range", f"{place} {REPLACEMENTS}", expected=expected, found=found)


def masking_errors(
    info: MaskingInfo, input_ids_BT: Array, lengths_B: Array, selected_BT: Array, replacements_BT: Array, place: object
) -> Iterator[CacheError]:
    """Every broken rule of masked blocks."""
    last_B1 = lengths_B.astype(np.int64).clip(1, input_ids_BT.shape[1])[:, None] - 1
    ends_B = np.take_along_axis(input_ids_BT, last_B1, axis=1)[:, 0]
    if (input_ids_BT[:, 0] != info.cls_token_id).any() or (ends_B != info.sep_token_id).any():
        expected = f"blocks that begin with token {info.cls_token_id} and end with {info.sep_token_id}"
        yield CacheError("bad-frame", f"{place} input_ids", expected=expected)
    is_selected_BT, ordinary_BT = selected_BT == 1, info.ordinary(input_ids_BT, lengths_B)
    if (is_selected_BT & ~ordinary_BT).any():
        yield CacheError("bad-selection", f"{place} {SELECTED}", expected="real tokens that are not special")
    wanted_B, found_B = info.num_selected(ordinary_BT.sum(1)), is_selected_BT.sum(1)
    if (wanted_B != found_B).any():
        block = int((wanted_B != found_B).argmax())
        expected, found = f"{wanted_B[block]} selected in row {block}", found_B[block]
        yield CacheError("bad-selection", f"{place} {SELECTED}", expected=expected, found=found)
    if replacements_BT[~is_selected_BT].any():
        yield CacheError("bad-replacement", f"{place} {REPLACEMENTS}", expected="0 where nothing is selected")
