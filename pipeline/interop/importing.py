"""``kdpipe import``: Parquet files of token ids and top-k log-probabilities become a cache that says what it is.

In: files and settings. Out: a finished cache of encoding ``topk`` with the field ``imported``. A file's bytes are
read once for their digest, its rows once to check every one and to learn sizes, its tokens once more for the text's
digest, and the rows of shards that are still to be made again, all in bounded memory.

Legend of axes: N positions, B blocks, T tokens, K kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from cache_spec.commit import commit_shard
from cache_spec.encodings.topk import TopK, encode_gaps, encode_odds
from cache_spec.errors import BadInputError, WouldLoseDataError
from cache_spec.imported import TEMPERATURE, ImportedInfo
from cache_spec.manifest import BlocksInfo, CorpusInfo, Manifest, TeacherInfo, differences
from cache_spec.targets import Array, Geometry
from pipeline import folder
from pipeline.interop.config import ImportConfig
from pipeline.interop.rows_in import Rows, read_rows, read_tokens
from pipeline.interop.scan import Scan, most_outside, scan_rows
from pipeline.interop.sources import Source
from pipeline.source import provenance

logger = logging.getLogger("kdpipe")


def import_logprobs(config: ImportConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Make, or finish, the cache that ``config`` describes; returns its summary.

    Raises BadInputError, among its kinds those of ``read_rows``, ``find_columns`` and ``check_exports``, ``no-text``,
    ``repeated-file``, ``row-too-long``, ``short-list``, ``wrong-shift``, ``not-top-k``, ``mass-not-one``,
    ``vocabulary-mismatch``, ``no-tokenizer`` and ``no-eos``; and WouldLoseDataError for a folder that holds another
    cache.
    """
    source = Source.of(config)
    with folder.exclusive(config.out) as existing:
        scan = scan_rows(source, quiet)
        manifest = _manifest(source, scan)
        if existing is not None:
            if found := differences(existing, manifest):
                hint = "choose another --out, or the old settings"
                raise WouldLoseDataError("other-settings", config.out, found="; ".join(found), hint=hint)
            folder.restore(config.out, existing, source.files)
            if folder.is_finished(config.out, existing):
                logger.info("%s is finished already: %d blocks", config.out, existing.blocks.num_blocks)
                folder.drop_staging(config.out)
                return folder.summary(config.out, existing, captured=0) | scan.facts
        manifest = existing or folder.create(config.out, manifest, source.files(), {})
        todo = folder.reopen(config.out, manifest)
        with tqdm(total=len(todo), unit="shard", desc="import", disable=quiet or None) as bar:
            for shard, arrays in _shards(source, scan, manifest, set(todo)):
                commit_shard(config.out, manifest, shard, arrays)
                bar.update()
        folder.seal(config.out, manifest)
        return folder.summary(config.out, manifest, captured=len(todo)) | scan.facts


def _manifest(source: Source, scan: Scan) -> Manifest:
    config = source.config
    block_tokens = config.block_tokens or max(2, scan.block_tokens)
    encoding = TopK(k=scan.k, levels=config.levels, odds_step_nats=config.odds_step_nats)
    if reason := encoding.refuse(_geometry(source, block_tokens)):
        raise BadInputError("bad-encoding", "encoding topk", found=reason)
    eos, digest = source.tokenizer.eos_token_id, hashlib.sha256()
    for path, columns, lengths in zip(source.paths, source.columns, scan.lengths, strict=True):
        first = 0
        for tokens_R, tokens_E in read_tokens(path, columns.tokens):
            ids_BT = _blocks(tokens_R, tokens_E, lengths[first : first + len(tokens_R)], block_tokens, eos)
            digest.update(ids_BT.astype("<u4").tobytes())
            first += len(tokens_R)
    return Manifest(
        teacher=TeacherInfo(
            name=config.teacher,
            revision=None,
            model_type=source.model_type,
            weights_sha256=None,
            vocab_size=source.declared.vocab_size,
            padded_vocab_size=source.num_rows,
            hidden_size=None,
            num_layers=None,
            num_parameters=None,
            max_positions=None,
        ),
        tokenizer=source.tokenizer,
        corpus=CorpusInfo(
            sources=tuple(scan.sources),
            text_field=source.columns[0].tokens,
            num_documents=scan.num_blocks,
            num_tokens=scan.num_tokens,
            tokens_sha256=digest.hexdigest(),
        ),
        blocks=BlocksInfo(
            num_blocks=scan.num_blocks,
            block_tokens=block_tokens,
            shard_blocks=config.shard_blocks,
            last_block="each",
            limit_tokens=None,
        ),
        encoding=encoding,
        temperatures=(TEMPERATURE,),
        hidden=None,
        imported=ImportedInfo(logprobs=config.logprobs, mass_error=config.mass_error),
        compute=None,
        tables={},
        files={},
        provenance=provenance(),
    )


def _geometry(source: Source, block_tokens: int) -> Geometry:
    return Geometry(block_tokens, (TEMPERATURE,), source.declared.vocab_size, 0)


def _blocks(tokens_R: Array, tokens_E: Array, lengths_R: Array, block_tokens: int, eos: int) -> Array:
    """int64 [B, T]: the rows that make a block, cut to its length and padded."""
    row_E = np.repeat(np.arange(len(tokens_R)), tokens_R)
    at_E = np.arange(len(tokens_E)) - np.repeat(np.cumsum(tokens_R) - tokens_R, tokens_R)
    kept_E = at_E < lengths_R[row_E]
    out_BT = np.full((len(lengths_R), block_tokens), eos)
    out_BT[row_E[kept_E], at_E[kept_E]] = tokens_E[kept_E]
    result: Array = out_BT[lengths_R > 0]
    return result


def _shards(source: Source, scan: Scan, manifest: Manifest, todo: set[int]) -> Iterator[tuple[int, dict[str, Array]]]:
    """Every array of the shards that are still to be made, in order."""
    shard_blocks, pending, done = manifest.blocks.shard_blocks, _Pending(manifest, todo), 0
    for path, columns, lengths in zip(source.paths, source.columns, scan.lengths, strict=True):
        # Number of the block that each row makes, or would make.
        number = done + np.cumsum(lengths > 0) - (lengths > 0)

        def wanted(first: int, count: int, number: Array = number) -> bool:
            low, high = int(number[first]), int(number[first + count - 1])
            return any(
                low <= shard * shard_blocks + shard_blocks - 1 and shard * shard_blocks <= high for shard in todo
            )

        for rows in read_rows(path, columns, source.declared, wanted):
            first = int(number[rows.first_row])
            yield from pending.add(first, rows)
        done += int((lengths > 0).sum())
    assert not pending.parts, "blocks of a shard that nobody filled"


class _Pending:
    """Blocks that wait for the rest of their shard, one of those that are still to be made."""

    def __init__(self, manifest: Manifest, todo: set[int]) -> None:
        self._manifest, self._todo = manifest, todo
        self.parts: dict[int, list[dict[str, Array]]] = {}
        self._counts: dict[int, int] = {}

    def add(self, first: int, rows: Rows) -> Iterator[tuple[int, dict[str, Array]]]:
        """Take rows that make blocks from ``first`` on; gives the shards that are whole now."""
        arrays, blocks = _arrays(self._manifest, rows), self._manifest.blocks
        count = len(arrays["block_lengths"])
        start = 0
        while start < count:
            shard, inside = divmod(first + start, blocks.shard_blocks)
            stop = min(count, start + blocks.shard_blocks - inside)
            part = {name: values[start:stop] for name, values in arrays.items()}
            start = stop
            if shard not in self._todo:
                continue
            self.parts.setdefault(shard, []).append(part)
            self._counts[shard] = self._counts.get(shard, 0) + len(part["block_lengths"])
            if self._counts[shard] == blocks.shard_range(shard)[1]:
                parts = self.parts.pop(shard)
                yield shard, {name: np.concatenate([p[name] for p in parts]) for name in part}


def _arrays(manifest: Manifest, rows: Rows) -> dict[str, Array]:
    """Every array of the blocks that some rows make."""
    encoding, imported, vocab_size = manifest.encoding, manifest.imported, manifest.teacher.vocab_size
    assert isinstance(encoding, TopK)
    assert imported is not None
    block_tokens, id_dtype = manifest.blocks.block_tokens, manifest.geometry.id_dtype
    lengths_B = rows.lengths_R[rows.lengths_R > 0]
    ids_NK, logprobs_NK = rows.top(encoding.k)
    sums_N = np.exp(logprobs_NK).sum(1)
    if imported.logprobs == "renormalised" or encoding.k == vocab_size:
        mass_N = np.zeros_like(sums_N)
    else:
        # Between nothing and what less probable tokens can have.
        mass_N = np.clip(1 - sums_N, 0, most_outside(logprobs_NK[:, -1], vocab_size - encoding.k, encoding.levels))
    logprobs_NK = logprobs_NK + np.log((1 - mass_N) / sums_N)[:, None]
    with np.errstate(divide="ignore"):
        odds_N = np.log(mass_N) - np.log1p(-mass_N)
    # Padding repeats the last real position: every rule holds there too.
    at_BT = np.minimum(np.arange(block_tokens), lengths_B[:, None] - 1) + (np.cumsum(lengths_B) - lengths_B)[:, None]
    real_BT = np.arange(block_tokens) < lengths_B[:, None]
    tokens_BT = np.where(real_BT, rows.tokens_N[at_BT], manifest.tokenizer.eos_token_id)
    return {
        "input_ids": tokens_BT.astype(id_dtype),
        "block_lengths": lengths_B.astype(np.uint32),
        "head_ids": ids_NK[at_BT].astype(id_dtype),
        "head_gaps": encode_gaps(logprobs_NK[at_BT], encoding.levels),
        "tail_log_odds": encode_odds(odds_N[at_BT][:, None], encoding.odds_step_nats),
    }
