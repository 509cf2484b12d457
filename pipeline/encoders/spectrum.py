"""Rows of logits to what encoders are made of: the head, and the masses of all tokens at each temperature.

In: float32 logits of R rows. Out: an encoder's columns, entropy and loss. The passes over the
logits are shared by every encoding, and there are few of them: at half the temperature a mass is the square of what
it was.

Legend of axes: R rows, V real vocabulary, K kept, M temperatures, N random numbers, G groups, C candidates,
D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from cache_spec.targets import Array

_GROUPS_OF, _GROUPS_OF_GROUPS = 32, 8
_TINY_TAIL = 1e-30
"""Below this a sum of float32 exponentials has lost digits to underflow, and the tail is summed again, rescaled."""


class Rows(NamedTuple):
    """R rows: their hidden states, their own random numbers, and their most probable tokens."""

    hidden_RD: torch.Tensor
    """Last hidden states, as the teacher gave them."""
    uniforms_RMN: torch.Tensor
    """float64 in [0, 1): as many as the encoder asks for, for each temperature of its grid."""
    head_ids_RK: torch.Tensor
    """int64, most probable first, equal values by ascending id."""
    head_d_RK: torch.Tensor
    """float32: logit minus the row's largest."""


class Masses(NamedTuple):
    """exp(d / temperature) of every token, d its logit minus the row's largest: probabilities but for their sum."""

    at: int
    """Index of the temperature in the encoder's grid."""
    temperature: float
    head_RK: torch.Tensor
    tail_RV: torch.Tensor
    """0 at the head; an encoder may write to the head's places, if it makes them 0 again."""
    log_odds_R: torch.Tensor
    """log of the sum outside the head minus log of that of the head, each from its own sum; -inf where K = V."""


class Encoder(Protocol):
    """How one encoding is made; columns are tensors of R rows, named as the encoder likes."""

    num_head: int
    """K: tokens of each row that are looked up for it, at least 1."""
    temperatures: tuple[float, ...]
    """The grid for which ``columns_at`` is asked; may be empty."""
    float64: bool
    """Whether it counts in float64, which some devices lack."""
    num_uniforms: int
    """N: random numbers that it takes for each row and temperature."""
    seed: int
    """Of these."""

    def columns(self, rows: Rows, head_logprobs_RK: torch.Tensor) -> dict[str, torch.Tensor]:
        """What does not depend on temperature; ``head_logprobs_RK`` is at temperature 1."""

    def columns_at(self, rows: Rows, masses: Masses) -> dict[str, torch.Tensor]:
        """What does, at one temperature; stored as axis 1 of the column."""

    def stored(self, columns: Mapping[str, Array]) -> dict[str, Array]:
        """The cache's arrays [B, ...] of all columns [B, T, ...] or, with temperatures, [B, T, M, ...]."""


class Encoded(NamedTuple):
    """What is kept of R rows of logits."""

    columns: dict[str, torch.Tensor]
    entropy_R: torch.Tensor
    """float32 nats, at temperature 1."""
    loss_R: torch.Tensor
    """float32 nats: -log p of the next token, at temperature 1."""
    log_z_RM: torch.Tensor
    """float32: log of the sum of masses, at every temperature that was looked at."""


def encode_logits(
    encoder: Encoder,
    hidden_RD: torch.Tensor,
    uniforms_RMN: torch.Tensor,
    logits_RV: torch.Tensor,
    next_ids_R: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
) -> Encoded:
    """Everything kept of R rows of float32 logits; both of ``scratch``, float32 [R, V], are overwritten.

    With d = logits - max: log Z_T = log sum exp(d / T), log p_T = d / T - log Z_T, and the entropy at temperature 1 is
    log Z - sum(exp(d) * d) / Z. The logits come from far away, and are only read: once for the head, once for d.
    """
    head_logits_RK, head_ids_RK = top_k(logits_RV, encoder.num_head)
    max_R1 = head_logits_RK[:, :1]
    head_d_RK = head_logits_RK - max_R1
    rows = Rows(hidden_RD, uniforms_RMN, head_ids_RK, head_d_RK)
    # Hot to cold: a square root would lose the digits of what underflowed, a square loses none.
    temperatures = sorted({1.0, *encoder.temperatures}, reverse=True)
    # d in units in which exp is a power of two, at the first temperature; 3 times faster than exp, and as exact as
    # float32 logits are.
    scaled_RV, mass_RV = scratch
    unit = math.log2(math.e) / temperatures[0]
    torch.add(max_R1 * -unit, logits_RV, alpha=unit, out=scaled_RV)
    log_z: list[torch.Tensor] = []
    by_temperature: dict[int, dict[str, torch.Tensor]] = {}
    previous = math.nan
    for temperature in temperatures:
        if previous == 2 * temperature:
            torch.mul(mass_RV, mass_RV, out=mass_RV)
        else:
            if temperature == temperatures[0]:
                torch.exp2(scaled_RV, out=mass_RV)
            else:
                torch.mul(scaled_RV, temperatures[0] / temperature, out=mass_RV).exp2_()
            mass_RV.scatter_(1, head_ids_RK, 0.0)
        previous = temperature
        head_mass_RK = (head_d_RK * (math.log2(math.e) / temperature)).exp2_()
        head_R, tail_R = head_mass_RK.sum(1), mass_RV.sum(1)
        total_R = head_R + tail_R
        log_z.append(total_R.log())
        if temperature in encoder.temperatures:
            at = encoder.temperatures.index(temperature)
            log_odds_R = _log_tail(tail_R, logits_RV, head_ids_RK, max_R1, temperature) - head_R.log()
            masses = Masses(at, temperature, head_mass_RK, mass_RV, log_odds_R)
            by_temperature[at] = encoder.columns_at(rows, masses)
        if temperature == 1.0:
            log_z1_R = log_z[-1]
            # Nothing colder follows, as a rule, and then the masses are not needed any more.
            product_RV = mass_RV.mul_(scaled_RV) if temperature == temperatures[-1] else mass_RV * scaled_RV
            tail_d_R = product_RV.sum(1) / unit
            entropy_R = log_z1_R - ((head_mass_RK * head_d_RK).sum(1) + tail_d_R) / total_R
    columns = encoder.columns(rows, head_d_RK - log_z1_R[:, None])
    for name in by_temperature.get(0, {}):
        columns[name] = torch.stack([by_temperature[at][name] for at in range(len(encoder.temperatures))], 1)
    loss_R = log_z1_R - (logits_RV.gather(1, next_ids_R[:, None]) - max_R1)[:, 0]
    return Encoded(columns, entropy_R, loss_R, torch.stack(log_z, 1))


def _log_tail(
    tail_R: torch.Tensor,
    logits_RV: torch.Tensor,
    head_ids_RK: torch.Tensor,
    max_R1: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """log of the tail's sum of exp(d / T); rows whose sum underflows are summed again around their own maximum."""
    log_tail_R = tail_R.log()
    if head_ids_RK.shape[1] == logits_RV.shape[1]:
        return log_tail_R
    thin = (tail_R < _TINY_TAIL).nonzero()[:, 0]
    if len(thin):
        tail_d_RV = logits_RV[thin].sub_(max_R1[thin]).scatter_(1, head_ids_RK[thin], -math.inf).div_(temperature)
        log_tail_R[thin] = tail_d_RV.logsumexp(1)
    return log_tail_R


def top_k(logits_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K largest values of each row and their columns, descending, equal values by ascending column.

    ``torch.topk`` does not say which of equal values it takes nor in which order; the order is made definite here among
    the K it took, and which it takes depends on the row alone.
    """
    ids_RK, _ = _largest(logits_RV, k, _GROUPS_OF).sort(1)
    values_RK, by_value = logits_RV.gather(1, ids_RK).sort(dim=1, descending=True, stable=True)
    return values_RK, ids_RK.gather(1, by_value)


def _largest(values_RV: torch.Tensor, k: int, size: int) -> torch.Tensor:
    """int64 [R, K]: columns of the K largest values of each row, in no order.

    They lie in the K groups of ``size`` columns with the largest maxima, so that most columns are read once, for their
    maximum; which groups these are is found in the same way.
    """
    num_columns = values_RV.shape[1]
    num_groups = num_columns // size
    if num_groups <= k:
        return values_RV.topk(k, sorted=False).indices
    # Group g holds the columns g, g + num_groups, g + 2 * num_groups, ...
    size = num_columns // num_groups
    grouped = num_groups * size
    largest_RG = values_RV[:, :grouped].view(-1, size, num_groups).amax(1)
    rest = num_columns - grouped
    if rest:
        torch.maximum(largest_RG[:, :rest], values_RV[:, grouped:], out=largest_RG[:, :rest])
    groups_RK = _largest(largest_RG, k, _GROUPS_OF_GROUPS)
    steps = torch.arange(size + bool(rest), device=values_RV.device) * num_groups
    candidates_RC = (groups_RK.unsqueeze(2) + steps).flatten(1)
    if rest:
        outside_RC = candidates_RC >= num_columns
        candidates_RC.clamp_max_(num_columns - 1)
        values_RC = values_RV.gather(1, candidates_RC).masked_fill_(outside_RC, -math.inf)
    else:
        values_RC = values_RV.gather(1, candidates_RC)
    return candidates_RC.gather(1, values_RC.topk(k, sorted=False).indices)
