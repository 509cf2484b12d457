"""A first look at all rows of an import: every one checked, sizes learnt, and whether they are what was declared.

In: files and what is declared. Out: the sizes of the cache to be.

Legend of axes: R rows, N positions, E entries of all positions, K kept; or heads of 1, 2, … K tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from cache_spec.errors import BadInputError
from cache_spec.manifest import SourceInfo
from cache_spec.targets import Array
from pipeline.interop.rows_in import Declared, Rows, masses, read_rows
from pipeline.interop.sources import Source
from pipeline.textfiles import file_info

logger = logging.getLogger("kdpipe")

_FEWEST_FOR_SHIFT = 32
_SURE_SHARE = 0.2
_SUMS_TO_ONE = 1e-4
# Of lists of rounded values, a few leave more mass than less probable tokens can have, and none much more.
_MOST_BEYOND = 0.01
_FAR_ERRORS, _FAR_ROOM = 10, 1.5


@dataclass(kw_only=True)
class Scan:
    """What one look at all rows tells."""

    lengths: list[Array] = field(default_factory=list)
    """Tokens of the block of each row, file by file; 0 for a row that makes none."""
    sources: list[SourceInfo] = field(default_factory=list)
    k: int = 0
    """Tokens kept for each position."""
    longest_list: int = 0
    least_sum: float = 1.0
    beyond_K: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    """Positions that leave more mass than less probable tokens can have, if 1, 2, … K tokens are kept."""
    first_beyond: dict[int, tuple[str, str]] = field(default_factory=dict)
    """By K, the first of these, and what it leaves."""
    first_far: dict[int, tuple[str, str]] = field(default_factory=dict)
    """By K, the first position that leaves much more than fits."""
    num_hits: int = 0
    """Tokens that are in the list that tells what follows the one before."""
    num_other_hits: int = 0
    """The same by the other shift."""
    num_next: int = 0

    @property
    def num_tokens(self) -> int:
        return int(sum(lengths.sum() for lengths in self.lengths))

    @property
    def num_blocks(self) -> int:
        return int(sum((lengths > 0).sum() for lengths in self.lengths))

    @property
    def block_tokens(self) -> int:
        """Of the longest block."""
        return max(int(lengths.max(initial=0)) for lengths in self.lengths)

    @property
    def facts(self) -> dict[str, Any]:
        """What is said beside the cache's own summary."""
        left_out = sum(len(lengths) for lengths in self.lengths) - self.num_blocks
        return {
            "k": self.k,
            "longest_list": self.longest_list,
            "rows_left_out": left_out,
            "positions_beyond": self.num_beyond,
        }

    @property
    def num_beyond(self) -> int:
        """Positions whose k tokens leave more mass than less probable tokens can have: their heads are scaled up."""
        return int(self.beyond_K[self.k - 1]) if len(self.beyond_K) >= self.k > 0 else 0

    def add(self, rows: Rows, source: Source) -> None:
        """Count some rows in."""
        if not len(rows.tokens_N):
            return
        declared, fewest = source.declared, int(rows.counts_N.min())
        self.k = source.config.k or min(self.k or fewest, fewest)
        self.longest_list = max(self.longest_list, int(rows.counts_N.max()))
        self.least_sum = min(self.least_sum, float(masses(rows).min()))
        self._add_beyond(rows, declared, source.config.levels)
        other_N = rows.tokens_N if declared.shift == 0 else rows.after_next_N
        counted_N = (rows.next_N >= 0) & (other_N >= 0)
        self.num_next += int(counted_N.sum())
        self.num_hits += int((rows.names(rows.next_N) & counted_N).sum())
        self.num_other_hits += int((rows.names(other_N) & counted_N).sum())

    def _add_beyond(self, rows: Rows, declared: Declared, levels: int) -> None:
        """For each number of tokens that may turn out to be kept: what is missing from one must fit below the last."""
        if declared.logprobs == "renormalised":
            return
        _, logprobs_NK = rows.top(self.k)
        missing_NK = 1 - np.cumsum(np.exp(logprobs_NK), axis=1)
        room_NK = most_outside(logprobs_NK, declared.vocab_size - np.arange(1, self.k + 1), levels)
        beyond_NK = missing_NK > room_NK + declared.mass_error
        far_NK = missing_NK > _FAR_ROOM * room_NK + _FAR_ERRORS * declared.mass_error
        before_K = self.beyond_K[: self.k] if len(self.beyond_K) else np.zeros(self.k, np.int64)
        self.beyond_K = before_K + beyond_NK.sum(0)
        for at_NK, first in ((beyond_NK, self.first_beyond), (far_NK, self.first_far)):
            for at in np.flatnonzero(at_NK.any(0)).tolist():
                row = int(np.argmax(at_NK[:, at]))
                found = f"{missing_NK[row, at]:.4f}, and room for {room_NK[row, at]:.4f}"
                first.setdefault(at + 1, (rows.at(row), found))


def most_outside(last: Array, num_others: Array | int, levels: int) -> Array:
    """The most mass that tokens outside a head can have, each at most as probable as ``last``, its last token's
    log-probability; to the rounding of SPEC.md's rule H-5."""
    levels_N = np.rint(np.exp(last / 2) * levels) + 1
    result: Array = num_others * (levels_N / levels) ** 2
    return result


def scan_rows(source: Source, quiet: bool) -> Scan:
    """Check every row; BadInputError for the first that is not as it was declared."""
    scan, config = Scan(), source.config
    with tqdm(unit="tok", unit_scale=True, desc="check", disable=quiet or None) as bar:
        for path, name, columns in zip(source.paths, source.names, source.columns, strict=True):
            scan.sources.append(file_info(path, name))
            lengths = [np.zeros(0, np.int64)]
            for rows in read_rows(path, columns, source.declared):
                if config.block_tokens and len(bad := np.flatnonzero(rows.lengths_R > config.block_tokens)):
                    place = f"{path}, row {rows.first_row + int(bad[0])}"
                    expected, found = f"at most {config.block_tokens} tokens", f"{rows.lengths_R[bad[0]]} tokens"
                    hint = "give a larger --block-tokens: a row's targets are right after all of it"
                    raise BadInputError("row-too-long", place, expected=expected, found=found, hint=hint)
                scan.add(rows, source)
                lengths.append(rows.lengths_R)
                bar.update(len(rows.tokens_N))
            scan.lengths.append(np.concatenate(lengths))
    place = str(source.paths[0]) if len(source.paths) == 1 else f"{len(source.paths)} files"
    if not scan.num_tokens:
        raise BadInputError("no-text", place, expected="a row of at least 2 tokens with log-probabilities")
    if scan.num_next >= _FEWEST_FOR_SHIFT:
        share, other = scan.num_hits / scan.num_next, scan.num_other_hits / scan.num_next
        if other > _SURE_SHARE and other > 2 * share:
            expected = f"lists that hold what follows, as --shift {config.shift} has it"
            found, hint = f"{share:.0%} of next tokens, and {other:.0%} by the other shift", "give the other --shift"
            raise BadInputError("wrong-shift", place, expected=expected, found=found, hint=hint)
    is_part = scan.longest_list < source.declared.vocab_size
    if config.logprobs == "full" and is_part and scan.least_sum > 1 - _SUMS_TO_ONE:
        found, hint = "sums of one in every list", "--logprobs renormalised, if they are of the kept tokens alone"
        expected = "some mass outside the lists"
        raise BadInputError("mass-not-one", place, expected=expected, found=found, hint=hint)
    share = scan.num_beyond / scan.num_tokens
    if scan.k in scan.first_far or share > _MOST_BEYOND:
        where, left = (scan.first_far if scan.k in scan.first_far else scan.first_beyond)[scan.k]
        expected = f"the top {scan.k}: what they leave fits into less probable tokens"
        found = f"a mass of {left} (more than fits at {share:.1%} of positions)"
        hint = "these are not the most probable tokens, or not of temperature 1, or --vocab-size is too small"
        raise BadInputError("not-top-k", where, expected=expected, found=found, hint=hint)
    if scan.num_beyond:
        logger.warning(
            "%d of %d positions leave more mass than fits below their last kept token: it is cut to that, and their"
            " heads are scaled up",
            scan.num_beyond,
            scan.num_tokens,
        )
    if not config.k and scan.k < scan.longest_list:
        logger.info("k %d is that of the shortest list; the longest has %d", scan.k, scan.longest_list)
    return scan
