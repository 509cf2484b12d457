"""``prototype``: a head, and for the tail one of C distributions that all tokens of the cache share.

In: codes of shared distributions, of each token's choice among them, and of draws from what they leave over.
Out: decoded targets. With draws the target is right on average for every token, not only over the tokens of a
prototype.

Legend of axes: B blocks, T tokens, M temperatures, C prototypes, V vocabulary, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from cache_spec.encodings.base import broken
from cache_spec.encodings.topk import EMPTY_TAIL, Head, checked_ids, decode_odds
from cache_spec.errors import CacheError
from cache_spec.targets import Array, ArrayPart, Geometry, HeadTargets, TablePart, id_dtype

TABLE_STEP_NATS = 1 / 64
# No token of a shared tail is impossible: far from what underflows, and from what matters.
_MAX_CODE = round(64 / TABLE_STEP_NATS)
MASS_STEP_NATS = 1 / 8
# Two distributions differ by 2 at most.
_MAX_MASS_CODE = math.ceil(math.log(2) / MASS_STEP_NATS)


class Prototype(Head):
    """A head, a shared distribution for the tail, and possibly draws that take its error away on average."""

    name: Literal["prototype"] = "prototype"
    prototypes: int = Field(ge=1, le=1 << 16)
    """C: shared tail distributions."""
    residual_draws: int = Field(default=0, ge=0, le=1 << 15, multiple_of=2)
    """S: draws from the difference between the teacher's tail and the prototype's, half of them above it and half
    below; even, 0 for none."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the calibration and of the draws."""
    calibration_tokens: int = Field(ge=1)
    """Tokens that the prototypes were learnt from, at most."""

    ids_array: ClassVar[str] = "head_ranks"

    @property
    def row_dtype(self) -> type[np.generic]:
        """Narrowest dtype that holds every row of the table."""
        return np.uint8 if self.prototypes <= 1 << 8 else np.uint16

    def arrays(self, g: Geometry) -> tuple[ArrayPart, ...]:
        """The head's, each token's prototype, and the residual's draws."""
        num_temperatures, tokens = len(g.temperatures), g.block_tokens
        ids, gaps, odds = super().arrays(g)
        ranks = replace(
            ids,
            name="head_ranks",
            shuffle="shuffle",
            attributes={
                "description": "the K most probable next tokens, most probable first: each as its place among all"
                " tokens by falling probability, then id, in row tail_prototype of prototypes at the first temperature"
            },
        )
        if self.residual_draws:
            # Rounded up or down at random, so that the mass is right on average.
            odds = replace(odds, attributes=odds.attributes | {"error_bound": self.odds_step_nats})
        parts = [
            ranks,
            gaps,
            odds,
            ArrayPart(
                name="tail_prototype",
                dims=("token",),
                row_shape=(tokens,),
                dtype=self.row_dtype,
                shuffle="shuffle",
                compressor="lz4",
                attributes={"description": "row of prototypes that stands for the distribution outside the head"},
            ),
        ]
        if not self.residual_draws:
            return tuple(parts)
        draws = (num_temperatures, self.residual_draws, tokens)
        about = {"temperatures": list(g.temperatures)}
        return (
            *parts,
            ArrayPart(
                name="residual_ranks",
                dims=("temperature", "draw", "token"),
                row_shape=draws,
                dtype=g.id_dtype,
                shuffle="bitshuffle",
                attributes={
                    "description": "places as in head_ranks: first half drawn by the part of p above the prototype,"
                    " second half below",
                    **about,
                },
            ),
            ArrayPart(
                name="residual_log_mass",
                dims=("temperature", "token"),
                row_shape=(num_temperatures, tokens),
                dtype=np.int16,
                shuffle="shuffle",
                attributes={
                    "description": "step * value is the log of the sum of |p - prototype| outside the head;"
                    f" {EMPTY_TAIL} for a sum of 0",
                    "step": MASS_STEP_NATS,
                    "units": "nat",
                    **about,
                },
            ),
        )

    def tables(self, g: Geometry) -> tuple[TablePart, ...]:
        """The shared distributions of each temperature, and the linear map that chose among them."""
        return (
            TablePart(
                name="prototype_classifier",
                dims=("prototype", "width"),
                shape=(self.prototypes, g.hidden_size + 1),
                dtype=np.float32,
                attributes={
                    "description": "tail_prototype is the row of largest product with (last hidden state, 1)",
                },
            ),
            TablePart(
                name="prototypes",
                dims=("temperature", "prototype", "vocabulary"),
                shape=(len(g.temperatures), self.prototypes, g.vocab_size),
                dtype=np.uint16,
                attributes={
                    "description": "shared tail distributions: exp(-step * value), each row scaled to sum to one",
                    "step": TABLE_STEP_NATS,
                    "units": "nat",
                    "temperatures": list(g.temperatures),
                },
            ),
        )

    def prepare(self, table: Callable[[str], Array]) -> Array | None:
        """The order of tokens in each prototype, [C, V]."""
        return token_order(table("prototypes"))

    def decode(
        self, stored: Mapping[str, Array], g: Geometry, at: int, place: object, prepared: Array | None = None
    ) -> HeadTargets:
        """Head, tail and draws at the temperature of index ``at``; CacheError also for ``bad-prototype``."""
        assert prepared is not None
        rows_BT = self._rows(stored, place).astype(np.intp)
        order, starts_BT1 = prepared.reshape(-1), (rows_BT * g.vocab_size)[..., None]
        ids_BTK = order.take(checked_ids(stored["head_ranks"], g, f"{place} head_ranks") + starts_BT1)
        targets = replace(super().decode({**stored, "head_ids": ids_BTK}, g, at, place), prototype_BT=rows_BT)
        if not self.residual_draws:
            return targets
        ranks_BST = checked_ids(stored["residual_ranks"][:, at], g, f"{place} residual_ranks")
        log_mass_BT = decode_odds(self._masses(stored, place)[:, at], MASS_STEP_NATS)
        signs_S = np.repeat(np.array([1, -1], np.float32), self.residual_draws // 2)
        return replace(
            targets,
            residual_ids_BTS=order.take(ranks_BST.swapaxes(1, 2) + starts_BT1),
            residual_weights_BTS=np.exp(log_mass_BT)[..., None] * (signs_S / np.float32(self.residual_draws)),
        )

    def check(self, stored: Mapping[str, Array], g: Geometry, place: object) -> Iterator[CacheError]:
        """Every broken rule of the values."""
        yield from super().check(stored, g, place)
        yield from broken(lambda: self._rows(stored, place))
        if self.residual_draws:
            yield from broken(lambda: self._masses(stored, place))
            yield from broken(lambda: checked_ids(stored["residual_ranks"], g, f"{place} residual_ranks"))

    def _rows(self, stored: Mapping[str, Array], place: object) -> Array:
        rows_BT = stored["tail_prototype"]
        if rows_BT.size and rows_BT.max() >= self.prototypes:
            expected = f"rows below {self.prototypes}"
            raise CacheError("bad-prototype", f"{place} tail_prototype", expected=expected, found=rows_BT.max())
        return rows_BT

    def _masses(self, stored: Mapping[str, Array], place: object) -> Array:
        codes_BMT = stored["residual_log_mass"]
        if codes_BMT.size and codes_BMT.max() > _MAX_MASS_CODE:
            expected, found = f"codes of at most {_MAX_MASS_CODE}", codes_BMT.max()
            raise CacheError("bad-residual-mass", f"{place} residual_log_mass", expected=expected, found=found)
        return codes_BMT


def token_order(codes_MCV: Array) -> Array:
    """Ids [C, V] of all tokens in the order of their probability in each prototype at the first temperature."""
    order_CV: Array = np.argsort(codes_MCV[0], axis=1, kind="stable")
    return order_CV.astype(id_dtype(codes_MCV.shape[-1]))


def encode_ranks(ids_BTK: Array, rows_BT: Array, order_CV: Array) -> Array:
    """The place of each id in its row's order, in the order's dtype."""
    places_CV = np.empty_like(order_CV)
    np.put_along_axis(places_CV, order_CV.astype(np.intp), np.arange(order_CV.shape[1], dtype=order_CV.dtype)[None], 1)
    ranks_BTK: Array = places_CV[rows_BT.astype(np.intp)[..., None], ids_BTK.astype(np.intp)]
    return ranks_BTK


def encode_residual(ranks_BTMS: Array, is_drawn_BTM: Array) -> Array:
    """Ranks of draws as they are stored, [B, M, S, T]: each half ascending, zeros where nothing was drawn."""
    halves = ranks_BTMS.reshape(*ranks_BTMS.shape[:-1], 2, -1)
    ranks_BTMS = np.sort(halves, axis=-1).reshape(ranks_BTMS.shape) * is_drawn_BTM[..., None]
    return np.ascontiguousarray(np.moveaxis(ranks_BTMS, 1, -1).astype(ranks_BTMS.dtype))


def encode_prototypes(probs_MCV: Array) -> Array:
    """uint16 codes [M, C, V] of distributions whose rows sum to one."""
    with np.errstate(divide="ignore"):
        codes = np.rint(np.log(probs_MCV.astype(np.float64)) / -TABLE_STEP_NATS)
    return codes.clip(0, _MAX_CODE).astype(np.uint16)


def decode_prototypes(codes: Array) -> Array:
    """float32 distributions of stored codes [..., V], each row summing to one."""
    probs = np.exp(codes * np.float32(-TABLE_STEP_NATS))
    result: Array = probs / probs.sum(-1, keepdims=True, dtype=np.float64).astype(np.float32)
    return result
