"""Rows of Parquet files with token ids and top-k log-probabilities: read in batches, checked, sorted.

In: files, columns and what is declared of them. Out: for each batch its blocks' tokens and, for each token that has a
target, the kept tokens in descending order. Every fault is a ``BadInputError`` that names the file, row and position.

Legend of axes: R rows of a batch, N their positions with a target, E entries of all positions, K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from cache_spec.targets import Array
from pipeline.interop.columns_in import Columns, attended_of, entries_of, flags_of, signed, unnest

ROWS_AT_ONCE = 64
# What others write for an entry that is none: axolotl's collator has -1e9.
_LEAST_LOGPROB = -1e8


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What is said of the values, and checked."""

    vocab_size: int
    logprobs: str
    mass_error: float
    shift: int
    ignore_mask: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some rows of a file, as blocks: a row's tokens up to the last one that has a target."""

    place: str
    first_row: int
    """Of the batch, in its file."""
    lengths_R: Array
    """Tokens of each block; 0 for a row without a target."""
    tokens_N: Array
    """int64, block after block."""
    next_N: Array
    """The row's token after each, -1 where there is none."""
    after_next_N: Array
    """The one after that."""
    counts_N: Array
    """Kept tokens of each position."""
    ids_E: Array
    logprobs_E: Array
    """float64, descending within a position; equal ones by ascending id."""

    def at(self, position: int) -> str:
        """Where a position of N lies, for messages."""
        ends_R = np.cumsum(self.lengths_R)
        row = int(np.searchsorted(ends_R, position, side="right"))
        return f"{self.place}, row {self.first_row + row}, position {position - int(ends_R[row] - self.lengths_R[row])}"

    def names(self, token_N: Array) -> Array:
        """Whether each position's list holds a token."""
        of_E = np.repeat(np.arange(len(self.counts_N)), self.counts_N)
        named_N = np.zeros(len(self.counts_N), bool)
        named_N[of_E[self.ids_E == token_N[of_E]]] = True
        return named_N

    def top(self, k: int) -> tuple[Array, Array]:
        """Ids and log-probabilities of the k most probable tokens, [N, K]; BadInputError ``short-list``."""
        if len(short := np.flatnonzero(self.counts_N < k)):
            found, hint = f"{self.counts_N[short[0]]}", f"give --k {self.counts_N.min()}, or leave it out"
            raise BadInputError("short-list", self.at(short[0]), expected=f"{k} tokens", found=found, hint=hint)
        starts_N = np.cumsum(self.counts_N) - self.counts_N
        at_NK = starts_N[:, None] + np.arange(k)
        return self.ids_E[at_NK], self.logprobs_E[at_NK]


def read_rows(
    path: Path, columns: Columns, declared: Declared, wanted: Callable[[int, int], bool] = lambda first, count: True
) -> Iterator[Rows]:
    """The rows of a file in order; row groups and batches that are not ``wanted`` (first row, rows) are left out."""
    for first_row, batch in _record_batches(path, columns.names, wanted):
        yield _parsed(batch, str(path), first_row, columns, declared)


def read_tokens(path: Path, column: str) -> Iterator[tuple[Array, Array]]:
    """Lengths of rows, and their tokens one after the other."""
    for _, batch in _record_batches(path, [column], lambda first, count: True):
        lengths_R, tokens = unnest(batch.column(column))
        yield lengths_R, tokens.to_numpy(zero_copy_only=False).astype(np.int64)


def _record_batches(
    path: Path, names: list[str], wanted: Callable[[int, int], bool]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            first = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if not wanted(first, num_rows):
                    first += num_rows
                    continue
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group], columns=names):
                    if wanted(first, len(batch)):
                        yield first, batch
                    first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise BadInputError("broken-file", path, expected="Parquet", found=first_line(error)) from None


def _parsed(batch: pa.RecordBatch, place: str, first_row: int, columns: Columns, declared: Declared) -> Rows:
    def at(row: int, position: int | None = None) -> str:
        return f"{place}, row {first_row + row}" + ("" if position is None else f", position {position}")

    tokens_R, tokens = unnest(batch.column(columns.tokens))
    tokens_E = _whole_numbers(tokens, f"{place}: {columns.tokens}")
    lists_R, counts_P, ids_E, logprobs_E = entries_of(batch, columns, place)
    _check_lengths(tokens_R, lists_R, declared.shift, at)
    mask_E = flags_of(batch, columns, counts_P, lists_R, place)
    attended_E = attended_of(batch, columns, tokens_R, place)
    if attended_E is not None:
        text_R = _text_lengths(attended_E, tokens_R, at)
        is_text_P = _within(lists_R) < np.repeat(text_R, lists_R)
        of_text_E = np.repeat(is_text_P, counts_P)
        ids_E, logprobs_E, mask_E = (
            ids_E[of_text_E],
            logprobs_E[of_text_E],
            mask_E if mask_E is None else mask_E[of_text_E],
        )
        tokens_E, counts_P = tokens_E[attended_E], counts_P[is_text_P]
        tokens_R, lists_R = text_R, np.minimum(lists_R, text_R)
    row_P = np.repeat(np.arange(len(lists_R)), lists_R)
    position_P = _within(lists_R) - declared.shift
    of_E = np.repeat(np.arange(len(counts_P)), counts_P)

    def at_entry(entry: int) -> str:
        return at(int(row_P[of_E[entry]]), int(position_P[of_E[entry]] + declared.shift))

    # Entries that say nothing are left out: nulls, and what stands for minus infinity.
    if len(bad := np.flatnonzero(np.isnan(logprobs_E))):
        raise BadInputError("not-logprobs", at_entry(bad[0]), expected="numbers", found="NaN")
    if len(bad := np.flatnonzero(logprobs_E > declared.mass_error)):
        found = f"{logprobs_E[bad[0]]:g}"
        raise BadInputError("not-logprobs", at_entry(bad[0]), expected="logarithms of probabilities", found=found)
    is_value_E = logprobs_E > _LEAST_LOGPROB
    if mask_E is not None:
        masked_P = np.bincount(of_E, weights=mask_E, minlength=len(counts_P)) == 0
        last_P = position_P == tokens_R[row_P] - 1
        has_value_P = np.bincount(of_E, weights=is_value_E, minlength=len(counts_P)) > 0
        hidden_P = masked_P & has_value_P & ~last_P & (position_P >= 0)
        if not declared.ignore_mask and len(bad := np.flatnonzero(hidden_P)):
            hint = "students learn from every position: --ignore-mask takes these too"
            where = at(int(row_P[bad[0]]), int(position_P[bad[0]] + declared.shift))
            raise BadInputError("masked-position", where, expected="a mask of 1 before a row's end", hint=hint)
        is_value_E &= (mask_E > 0) | masked_P[of_E]
    is_value_E &= position_P[of_E] >= 0
    of_E, ids_E, logprobs_E = of_E[is_value_E], ids_E[is_value_E], logprobs_E[is_value_E]
    counts_P = np.bincount(of_E, minlength=len(counts_P))
    lengths_R = _block_lengths(counts_P, row_P, position_P, tokens_R, at, declared.shift)
    if len(bad := np.flatnonzero((ids_E < 0) | (ids_E >= declared.vocab_size))):
        where = at(int(row_P[of_E[bad[0]]]), int(position_P[of_E[bad[0]]] + declared.shift))
        raise _outside(where, declared, ids_E[bad[0]])
    row_E = np.repeat(np.arange(len(tokens_R)), tokens_R)
    if len(bad := np.flatnonzero((tokens_E < 0) | (tokens_E >= declared.vocab_size))):
        raise _outside(at(int(row_E[bad[0]]), int(_within(tokens_R)[bad[0]])), declared, tokens_E[bad[0]])
    order_E = np.lexsort((ids_E, -logprobs_E, of_E))
    kept_E = _within(tokens_R) < lengths_R[row_E]
    padded_E = np.concatenate([tokens_E, [-1, -1]])
    next_E, after_E = padded_E[1:-1].copy(), padded_E[2:].copy()
    ends_R = np.cumsum(tokens_R)[tokens_R > 0] - 1
    next_E[ends_R] = -1
    after_E[ends_R] = -1
    after_E[ends_R[tokens_R[tokens_R > 0] > 1] - 1] = -1
    used_P = (position_P >= 0) & (counts_P > 0)
    rows = Rows(
        place=place,
        first_row=first_row,
        lengths_R=lengths_R,
        tokens_N=tokens_E[kept_E],
        next_N=next_E[kept_E],
        after_next_N=after_E[kept_E],
        counts_N=counts_P[used_P],
        ids_E=ids_E[order_E],
        logprobs_E=logprobs_E[order_E],
    )
    _check_distinct(rows)
    _check_mass(rows, declared)
    return rows


def _check_lengths(tokens_R: Array, lists_R: Array, shift: int, at: Callable[..., str]) -> None:
    fits_R = (lists_R == tokens_R) | ((lists_R == tokens_R - 1) if shift == 0 else False)
    if len(bad := np.flatnonzero(~fits_R)):
        expected = f"a list for each of {tokens_R[bad[0]]} tokens" + (", or all but the last" if shift == 0 else "")
        raise BadInputError("uneven-row", at(int(bad[0])), expected=expected, found=f"{lists_R[bad[0]]} lists")


def _text_lengths(attended_E: Array, tokens_R: Array, at: Callable[..., str]) -> Array:
    """Tokens of each row before its padding; BadInputError ``attention-hole`` for padding before a row's text ends."""
    row_E, within_E = np.repeat(np.arange(len(tokens_R)), tokens_R), _within(tokens_R)
    text_R = np.bincount(row_E[attended_E], minlength=len(tokens_R))
    if len(bad := np.flatnonzero(attended_E & (within_E >= text_R[row_E]))):
        row = int(row_E[bad[0]])
        hole = int(within_E[(row_E == row) & ~attended_E][0])
        expected, hint = "an attention_mask of 1 up to a row's last token", "cut the row there, or pad on the right"
        raise BadInputError("attention-hole", at(row, hole), expected=expected, found=0, hint=hint)
    return text_R


def _block_lengths(
    counts_P: Array, row_P: Array, position_P: Array, tokens_R: Array, at: Callable[..., str], shift: int
) -> Array:
    """Tokens of each row that have a target: all, or all but the last; BadInputError ``no-target`` for a gap."""
    has_P = counts_P > 0
    lengths_R = np.bincount(row_P[has_P], minlength=len(tokens_R))
    last_R = np.full(len(tokens_R), -1)
    np.maximum.at(last_R, row_P[has_P], position_P[has_P])
    if len(bad := np.flatnonzero((last_R >= 0) & ((last_R + 1 != lengths_R) | (last_R + 2 < tokens_R)))):
        row = int(bad[0])
        positions = set(position_P[has_P & (row_P == row)].tolist())
        gap = next(position for position in range(int(tokens_R[row])) if position not in positions)
        hint = "each position but the last needs a target"
        raise BadInputError("no-target", at(row, gap + shift), expected="log-probabilities", found="none", hint=hint)
    return lengths_R


def _check_distinct(rows: Rows) -> None:
    of_E = np.repeat(np.arange(len(rows.counts_N)), rows.counts_N)
    order_E = np.lexsort((rows.ids_E, of_E))
    same_E = (np.diff(of_E[order_E]) == 0) & (np.diff(rows.ids_E[order_E]) == 0)
    if len(bad := np.flatnonzero(same_E)):
        entry = order_E[bad[0]]
        found = f"{rows.ids_E[entry]} twice"
        raise BadInputError("repeated-id", rows.at(int(of_E[entry])), expected="distinct ids", found=found)


def _check_mass(rows: Rows, declared: Declared) -> None:
    sums_N = masses(rows)
    error = declared.mass_error
    if len(bad := np.flatnonzero(sums_N > 1 + error)):
        found, hint = f"a sum of {sums_N[bad[0]]:.6f}", "are these logits, or of another temperature than 1?"
        expected = f"probabilities that sum to at most 1 + {error:g}"
        raise BadInputError("mass-above-one", rows.at(int(bad[0])), expected=expected, found=found, hint=hint)
    if declared.logprobs == "renormalised" and len(bad := np.flatnonzero(sums_N < 1 - error)):
        found, hint = f"a sum of {sums_N[bad[0]]:.6f}", "--logprobs full, if they are of the whole vocabulary"
        expected = f"renormalised probabilities that sum to 1 within {error:g}"
        raise BadInputError("mass-not-one", rows.at(int(bad[0])), expected=expected, found=found, hint=hint)


def masses(rows: Rows) -> Array:
    """Sum of probabilities of each position, float64 [N]."""
    of_E = np.repeat(np.arange(len(rows.counts_N)), rows.counts_N)
    result: Array = np.bincount(of_E, weights=np.exp(rows.logprobs_E), minlength=len(rows.counts_N))
    return result


def _whole_numbers(values: Any, place: str) -> Array:
    if values.null_count or not pa.types.is_integer(values.type):
        raise BadInputError("bad-column", place, expected="lists of whole numbers", found=values.type)
    numbers: Array = signed(values, place).to_numpy(zero_copy_only=False)
    return numbers


def _within(counts: Array) -> Array:
    """0, 1, … within each of so many."""
    result: Array = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return result


def _outside(where: str, declared: Declared, found: object) -> BadInputError:
    hint = "name the teacher's tokenizer, or its --vocab-size"
    expected = f"ids from 0 to {declared.vocab_size - 1}"
    return BadInputError("id-out-of-range", where, expected=expected, found=found, hint=hint)
