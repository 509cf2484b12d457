"""Which columns of a Parquet file hold tokens and targets, and how their nested lists become flat arrays.

In: a schema and the names that a user gave. Out: names, and of a batch its nested lists as counts and values: lists of
ids beside lists of log-probabilities, or lists of pairs (structs, or maps from id to log-probability).

Legend of axes: R rows of a batch, P their positions, E entries of all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from cache_spec.targets import Array
from pipeline.interop.config import ImportConfig

TOKENS = ("input_ids", "prompt_token_ids", "tokens")
IDS = ("target_token_ids", "topk_ids", "top_ids")
LOGPROBS = ("target_logprobs", "prompt_logprobs", "topk_logprobs", "top_logprobs")
MASKS = ("target_mask",)
ATTENTION = "attention_mask"
_PAIR_IDS, _PAIR_LOGPROBS = ("token_id", "id", "token", "key"), ("logprob", "value")
_TOKEN_PREFIX = "token_id:"


class Columns(NamedTuple):
    """Names of columns."""

    tokens: str
    logprobs: str
    ids: str | None
    """None where ``logprobs`` holds pairs."""
    mask: str | None
    attention: str | None
    """What tells a row's tokens from its padding."""

    @property
    def names(self) -> list[str]:
        """Those that are there."""
        return [name for name in self if name is not None]


def find_columns(config: ImportConfig, path: Path) -> Columns:
    """The columns of a file.

    Raises BadInputError ``broken-file``, ``no-such-column``, ``ambiguous-column`` or ``bad-column``.
    """
    try:
        schema = parquet.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise BadInputError("broken-file", path, expected="Parquet", found=first_line(error)) from None
    tokens = _column(schema.names, config.tokens_column, TOKENS, path, "--tokens-column")
    logprobs = _column(schema.names, config.logprobs_column, LOGPROBS, path, "--logprobs-column")
    mask = _column(schema.names, config.mask_column, MASKS, path, "--mask-column", needed=False)
    assert tokens is not None
    assert logprobs is not None
    attention = ATTENTION if ATTENTION in schema.names else None
    if not _is_list_of(kind := schema.field(tokens).type, pa.types.is_integer):
        raise BadInputError("bad-column", f"{path}: {tokens}", expected="a list of whole numbers", found=kind)
    if attention is not None and not _is_list_of(kind := schema.field(attention).type, _is_flag):
        raise BadInputError("bad-column", f"{path}: {attention}", expected="a list of 0 and 1", found=kind)
    inner = _inner(schema.field(logprobs).type, f"{path}: {logprobs}")
    ids: str | None = None
    if not (pa.types.is_map(inner) or pa.types.is_struct(inner.value_type)):
        ids = _column(schema.names, config.ids_column, IDS, path, "--ids-column")
        assert ids is not None
        _inner(schema.field(ids).type, f"{path}: {ids}")
    elif config.ids_column is not None:
        found = f"pairs in {logprobs} and --ids-column {config.ids_column}"
        raise BadInputError("bad-column", path, expected="pairs, or two columns", found=found)
    if mask is not None:
        _inner(schema.field(mask).type, f"{path}: {mask}")
    return Columns(tokens, logprobs, ids, mask, attention)


def unnest(column: Any) -> tuple[Array, Any]:
    """How many values each list has, int64, and all values; a null list has none."""
    kind = column.type
    if pa.types.is_map(kind):
        column = column.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)])))
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return counts, column.flatten()


def entries_of(batch: pa.RecordBatch, columns: Columns, place: str) -> tuple[Array, Array, Array, Array]:
    """Lists of each row, entries of each list, the entries' ids, and log-probabilities in float64, -inf for nulls."""
    where = f"{place}: {columns.logprobs}"
    lists_R, lists = unnest(batch.column(columns.logprobs))
    counts_P, values = unnest(lists)
    if columns.ids is None:
        names = {field.name for field in values.type}
        id_name, name = (next((n for n in known if n in names), None) for known in (_PAIR_IDS, _PAIR_LOGPROBS))
        if id_name is None or name is None:
            expected = f"pairs of logprob and one of {', '.join(_PAIR_IDS)}"
            raise BadInputError("bad-column", where, expected=expected, found=", ".join(sorted(names)))
        ids, logprobs = pc.struct_field(values, id_name), pc.struct_field(values, name)
        if pa.types.is_struct(logprobs.type):
            inner = [field.name for field in logprobs.type]
            if "logprob" not in inner:
                raise BadInputError("bad-column", where, expected="structs of logprob", found=", ".join(inner))
            logprobs = pc.struct_field(logprobs, "logprob")
        return lists_R, counts_P, *_entries(ids, logprobs, where, where)
    rows_R, lists = unnest(batch.column(columns.ids))
    ids_P, ids = unnest(lists)
    if not np.array_equal(rows_R, lists_R) or not np.array_equal(ids_P, counts_P):
        found = f"lists of other lengths in {columns.ids} than in {columns.logprobs}"
        raise BadInputError("uneven-row", place, expected="an id for each log-probability", found=found)
    return lists_R, counts_P, *_entries(ids, values, f"{place}: {columns.ids}", where)


def flags_of(batch: pa.RecordBatch, columns: Columns, counts_P: Array, lists_R: Array, place: str) -> Array | None:
    """The mask of all entries, as float64; None where there is no column of it."""
    if columns.mask is None:
        return None
    rows_R, lists = unnest(batch.column(columns.mask))
    mask_P, flags = unnest(lists)
    if not np.array_equal(rows_R, lists_R) or not np.array_equal(mask_P, counts_P):
        found = f"lists of other lengths in {columns.mask} than in {columns.logprobs}"
        raise BadInputError("uneven-row", place, expected="a flag for each log-probability", found=found)
    if not _is_flag(flags.type):
        raise BadInputError("bad-column", f"{place}: {columns.mask}", expected="lists of 0 and 1", found=flags.type)
    return _as_bool(flags).astype(np.float64)


def attended_of(batch: pa.RecordBatch, columns: Columns, tokens_R: Array, place: str) -> Array | None:
    """Which of all tokens are text, bool; None where there is no column of it."""
    if columns.attention is None:
        return None
    flags_R, flags = unnest(batch.column(columns.attention))
    if not np.array_equal(flags_R, tokens_R):
        found = f"lists of other lengths in {columns.attention} than in {columns.tokens}"
        raise BadInputError("uneven-row", place, expected="a flag for each token", found=found)
    return _as_bool(flags)


def signed(values: Any, place: str) -> Any:
    """Whole numbers as int64; BadInputError ``id-out-of-range`` for one that has no place there."""
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise BadInputError("id-out-of-range", place, expected="ids below 2^63", found=first_line(error)) from None


def _column(
    names: Sequence[str], given: str | None, known: Sequence[str], path: Path, flag: str, *, needed: bool = True
) -> str | None:
    if given is not None:
        if given not in names:
            expected = f"one of {', '.join(names)}"
            raise BadInputError("no-such-column", f"{path}: {given}", expected=expected)
        return given
    there = [name for name in known if name in names]
    if len(there) > 1:
        hint = f"name one with {flag}"
        raise BadInputError("ambiguous-column", path, expected=f"one of {', '.join(known)}", found=there, hint=hint)
    if not there and needed:
        found, hint = ", ".join(names), f"name it with {flag}"
        raise BadInputError("no-such-column", path, expected=f"one of {', '.join(known)}", found=found, hint=hint)
    return there[0] if there else None


def _inner(kind: Any, place: str) -> Any:
    """The type of a position's list; BadInputError ``bad-column`` for a column that is no list of lists."""
    if _is_list(kind) and (_is_list(kind.value_type) or pa.types.is_map(kind.value_type)):
        return kind.value_type
    raise BadInputError("bad-column", place, expected="a list for each token of lists", found=kind)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_list_of(kind: Any, is_value: Callable[[Any], bool]) -> bool:
    return _is_list(kind) and is_value(kind.value_type)


def _is_flag(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _as_bool(flags: Any) -> Array:
    is_set = flags if pa.types.is_boolean(flags.type) else pc.greater(flags, pa.scalar(0, flags.type))
    return np.asarray(pc.fill_null(is_set, False).to_numpy(zero_copy_only=False), bool)


def _entries(ids: Any, logprobs: Any, ids_place: str, place: str) -> tuple[Array, Array]:
    """Ids as int64, from numbers or from text such as ``token_id:17``; log-probabilities, -inf where either is null."""
    if pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type):
        try:
            ids = pc.cast(pc.replace_substring(ids, _TOKEN_PREFIX, ""), pa.int64())
        except pa.ArrowInvalid as error:
            raise BadInputError("bad-column", ids_place, expected=f"ids, or {_TOKEN_PREFIX}ID", found=error) from None
    if not pa.types.is_integer(ids.type):
        raise BadInputError("bad-column", ids_place, expected="whole numbers", found=ids.type)
    if not pa.types.is_floating(logprobs.type):
        raise BadInputError("bad-column", place, expected="real numbers", found=logprobs.type)
    is_null = pc.or_(ids.is_null(), logprobs.is_null()).to_numpy(zero_copy_only=False)
    numbers = np.asarray(logprobs.to_numpy(zero_copy_only=False), np.float64)
    whole = np.asarray(pc.fill_null(signed(ids, ids_place), 0).to_numpy(zero_copy_only=False))
    return whole, np.where(is_null, -np.inf, numbers)
