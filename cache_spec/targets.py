"""What a cache says about the next token: three forms that every encoding decodes into, and their exact dense meaning.

In: decoded arrays of some blocks at one temperature. Out: the same as one full distribution over the vocabulary, the
reference that losses and encoders are tested against. Also how an encoding declares the arrays that it stores.

Legend of axes: B blocks, T tokens, K kept, S residual draws, J points, V vocabulary, C shared tails, D teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from cache_spec.errors import BadInputError

Array = np.ndarray[Any, np.dtype[Any]]
Shuffle = Literal["noshuffle", "shuffle", "bitshuffle"]
Compressor = Literal["zstd", "lz4"]
Tail = Literal["prototype", "bucket", "renormalise", "uniform", "gold"]


def id_dtype(vocab_size: int) -> type[np.generic]:
    """Narrowest dtype that holds every id: uint16 where V ≤ 65,536, else uint32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class Geometry(NamedTuple):
    """What the shapes of an encoding's arrays follow from, beside its own parameters."""

    block_tokens: int
    temperatures: tuple[float, ...]
    vocab_size: int
    hidden_size: int

    @property
    def id_dtype(self) -> type[np.generic]:
        """Of the cache's ids."""
        return id_dtype(self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class ArrayPart:
    """One array that an encoding stores for every block."""

    name: str
    dims: tuple[str, ...]
    """Names of a block's axes."""
    row_shape: tuple[int, ...]
    """Shape of one block's part."""
    dtype: type[np.generic]
    shuffle: Shuffle
    compressor: Compressor = "zstd"
    """lz4 for arrays of few bytes a token: zstd's fixed cost for each chunk would outweigh what it saves."""
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TablePart:
    """One array that an encoding stores once for the whole cache."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: type[np.generic]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTargets:
    """The K most probable tokens and the mass of all others; what is known of the others is optional.

    At temperature x: p(head) = (1 - m) * softmax(logprobs / x), with m = sigmoid(tail_log_odds); m is the mass outside
    the head in the teacher's full distribution, so head and tail sum to one and are not renormalised.
    """

    ids_BTK: Array
    """Distinct within a row, most probable first."""
    logprobs_BTK: Array
    """float32, nats, at temperature 1, descending."""
    tail_log_odds_BT: Array
    """float32, nats, at the asked temperature: log(m / (1 - m)); -inf where nothing is outside the head."""
    prototype_BT: Array | None = None
    """intp: which shared tail distribution u stands for the tail, p(v) = m * u(v) / (1 - u(head)) outside the head."""
    residual_ids_BTS: Array | None = None
    """Draws from the difference between the teacher's tail and that; they may repeat."""
    residual_weights_BTS: Array | None = None
    """float32, signed: what each draw adds, so that the sum is right on average for every token; 0 for no draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointTargets:
    """A distribution that lives on J tokens at most."""

    ids_BTJ: Array
    probs_BTJ: Array
    """float32, at the asked temperature, summing to one; an entry of 0 is padding, whatever its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTargets:
    """The teacher's last hidden state after its final norm: with its output head, the whole distribution."""

    hidden_BTD: Array
    """float16 or float32."""


Targets = HeadTargets | PointTargets | HiddenTargets


def dense(
    targets: Targets,
    *,
    temperature: float,
    vocab_size: int,
    tail: Tail = "renormalise",
    prototypes_CV: Array | None = None,
    head: tuple[Array, Array | None] | None = None,
    gold_BT: Array | None = None,
) -> Array:
    """The full distribution that targets stand for, float64 [B, T, V]: slow, exact, for tests and measurements.

    ``tail`` says what the mass outside a head does: ``prototype`` follows ``prototypes_CV`` (rows sum to one),
    ``uniform`` is spread evenly, ``gold`` goes to the next token ``gold_BT``, ``renormalise`` is dropped and the head
    rescaled. ``head`` is the teacher's output head, weight [V, D] and bias [V] or None, for hidden states.
    Raises BadInputError ``no-dense-meaning`` for ``bucket``, which says nothing of single tokens.
    """
    if isinstance(targets, HiddenTargets):
        assert head is not None
        logits_BTV = targets.hidden_BTD.astype(np.float64) @ head[0].astype(np.float64).T
        return _softmax((logits_BTV if head[1] is None else logits_BTV + head[1]) / temperature)
    if isinstance(targets, PointTargets):
        points_BTV = np.zeros((*targets.ids_BTJ.shape[:2], vocab_size))
        _add(points_BTV, targets.ids_BTJ, targets.probs_BTJ.astype(np.float64))
        return points_BTV
    ids_BTK = targets.ids_BTK.astype(np.intp)
    shape_BTK = _softmax(targets.logprobs_BTK.astype(np.float64) / temperature)
    with np.errstate(over="ignore"):
        # Each from the odds: as a difference to one, the smaller of the two would lose its digits.
        mass_BT1, kept_BT1 = (
            1 / (1 + np.exp(sign * targets.tail_log_odds_BT[..., None].astype(float))) for sign in (-1, 1)
        )
    if tail == "renormalise":
        mass_BT1, kept_BT1 = np.zeros_like(mass_BT1), np.ones_like(kept_BT1)
    out_BTV = np.zeros((*ids_BTK.shape[:2], vocab_size))
    if tail == "prototype" or tail == "uniform":
        if tail == "uniform":
            out_BTV += 1.0
        else:
            assert prototypes_CV is not None
            assert targets.prototype_BT is not None
            out_BTV += prototypes_CV.astype(np.float64)[targets.prototype_BT]
        np.put_along_axis(out_BTV, ids_BTK, 0.0, axis=2)
        rest_BT1 = out_BTV.sum(2, keepdims=True)
        # With the whole vocabulary in the head there is no tail, whatever its mass was rounded to.
        mass_BT1, kept_BT1 = np.where(rest_BT1 > 0, mass_BT1, 0.0), np.where(rest_BT1 > 0, kept_BT1, 1.0)
        out_BTV *= mass_BT1 / np.where(rest_BT1 > 0, rest_BT1, 1.0)
    elif tail == "gold":
        assert gold_BT is not None
        _add(out_BTV, gold_BT[..., None], mass_BT1)
    elif tail == "bucket":
        raise BadInputError("no-dense-meaning", "tail bucket", expected="a treatment that gives each token a mass")
    _add(out_BTV, ids_BTK, kept_BT1 * shape_BTK)
    if tail == "prototype" and targets.residual_ids_BTS is not None:
        assert targets.residual_weights_BTS is not None
        _add(out_BTV, targets.residual_ids_BTS, targets.residual_weights_BTS.astype(np.float64))
    return out_BTV


def _add(out_BTV: Array, ids_BTJ: Array, values_BTJ: Array) -> None:
    """Add values at their ids; ids may repeat."""
    num_rows, vocab_size = out_BTV.shape[0] * out_BTV.shape[1], out_BTV.shape[2]
    flat = np.arange(num_rows)[:, None] * vocab_size + ids_BTJ.reshape(num_rows, -1).astype(np.intp)
    np.add.at(out_BTV.reshape(-1), flat, values_BTJ.reshape(num_rows, -1))


def _softmax(values: Array) -> Array:
    powers: Array = np.exp(values - values.max(-1, keepdims=True))
    result: Array = powers / powers.sum(-1, keepdims=True)
    return result
