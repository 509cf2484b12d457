"""Random draws that are a function of (seed, block, position, counter) alone: no generator, no state, any device.

In: integers that name a draw. Out: uniforms in [0, 1), and tokens drawn with them from unnormalised masses.

Legend of axes: R rows, V vocabulary, M streams, N draws, G groups, E entries of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_GROUP = 64
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def uniforms(
    seed: int,
    block_R: torch.Tensor,
    position_R: torch.Tensor,
    *,
    num_streams: int,
    num_draws: int,
    first_stream: int = 0,
) -> torch.Tensor:
    """float64 [R, M, N] in [0, 1), multiples of 2^-53: SplitMix64 hashes of seed, block, position, stream and draw.

    M streams from ``first_stream`` on, below 2^31; draws of different streams, positions, blocks or seeds are
    independent of each other.
    """
    key_R = _mix(_mix(torch.full_like(block_R, seed) + _GOLDEN) + block_R * _GOLDEN)
    key_R = _mix(key_R + (position_R + 1) * _GOLDEN)
    stream_M1 = torch.arange(first_stream, first_stream + num_streams, device=block_R.device)[:, None] << 32
    counter_MN = stream_M1 + torch.arange(num_draws, device=block_R.device) + 1
    bits_RMN = _mix(key_R[:, None, None] + counter_MN * _GOLDEN)
    return _shift(bits_RMN, 11).double() * 2.0**-53


class Picked(NamedTuple):
    """Draws of R rows."""

    ids_RN: torch.Tensor
    """int64."""
    total_R: torch.Tensor
    """float64: the row's mass."""


def pick(mass_RV: torch.Tensor, fractions_RN: torch.Tensor) -> Picked:
    """The token at which each fraction of a row's mass is reached, in the order of ids.

    Masses are at least 0 and need not sum to one; a token without mass is never taken, and a row of zeros gives ids
    that mean nothing. Groups of 64 tokens are summed as they are, everything after that in float64: a running float32
    sum over 50,000 tokens would move the boundaries of small ones by more than their mass.
    """
    num_rows, vocab_size = mass_RV.shape
    padded_RV = torch.nn.functional.pad(mass_RV, (0, -vocab_size % _GROUP)) if vocab_size % _GROUP else mass_RV
    grouped_RGE = padded_RV.view(num_rows, -1, _GROUP)
    ends_RG = grouped_RGE.sum(2).double().cumsum(1)
    zero = ends_RG.new_zeros(())
    total_R1 = ends_RG[:, -1:]
    picked = []
    # Each draw looks at one group: so many at a time that this is no more than the masses themselves.
    for part_RN in fractions_RN.split(max(1, vocab_size // (2 * _GROUP)), 1):
        target_RN = torch.minimum(part_RN * total_R1, torch.nextafter(total_R1, zero))
        group_RN = torch.searchsorted(ends_RG, target_RN, right=True).clamp_max_(ends_RG.shape[1] - 1)
        before_RN = ends_RG.gather(1, (group_RN - 1).clamp_min(0)).masked_fill_(group_RN == 0, 0.0)
        inside_RNE = grouped_RGE.gather(1, group_RN[:, :, None].expand(-1, -1, _GROUP)).double().cumsum(2)
        last_RN = inside_RNE[:, :, -1]
        rest_RN = torch.minimum(target_RN - before_RN, torch.nextafter(last_RN, zero))
        picked.append(group_RN * _GROUP + (inside_RNE <= rest_RN[:, :, None]).sum(2))
    return Picked(torch.cat(picked, 1).clamp_max_(vocab_size - 1), total_R1[:, 0])


def _mix(value: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser; int64 products wrap as unsigned ones do."""
    value = (value ^ _shift(value, 30)) * _MIX[0]
    value = (value ^ _shift(value, 27)) * _MIX[1]
    return value ^ _shift(value, 31)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right of int64 taken as unsigned."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
