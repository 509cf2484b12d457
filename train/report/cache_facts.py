"""Facts about a cache, in the time that a sample takes, however many shards it has.

In: a cache's folder, finished or not, or the URL of a finished one. Out: plain JSON values. Sizes and figures of blocks
come from at most 256 shards, distributions from a sample of blocks; what is scaled up or sampled says so.

Legend of axes: N positions, K listed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.layout import array_specs, target_arrays
from cache_spec.reader import CacheReader
from cache_spec.receipts import committed_shards, read_manifest, read_seal, refuse_absurd, small_file_errors
from cache_spec.targets import Array
from train.report.config import ReportConfig
from train.report.sample import Positions, Tops, entropy_is, pick_blocks, pick_positions, pick_shards, read_tops
from train.report.tokens import Pieces

_SIZED_SHARDS = 256
_DECODED_SHARDS = 64
# Each is fetched whole.
_FETCHED_SHARDS = 8
_SHARDS_AHEAD = 64
_BINS = 40
_CONTEXT_TOKENS = 48
_SHOWN_TOKENS = 10


def cache_facts(config: ReportConfig) -> dict[str, Any]:
    """Everything that a report shows of ``config.cache``; CacheError for what is no cache or is damaged."""
    reader, shards, is_finished = _opened(config)
    manifest = reader.manifest
    rng = np.random.default_rng(config.seed)
    facts: dict[str, Any] = {
        "cache": reader.place,
        "fingerprint": manifest.fingerprint,
        "finished": is_finished,
        "shards_done": len(shards),
        "shards_planned": manifest.blocks.num_shards,
        **manifest.model_dump(
            mode="json",
            include={"teacher", "tokenizer", "corpus", "blocks", "encoding", "hidden", "compute", "provenance"},
        ),
        "temperatures": list(manifest.temperatures),
        "imported": None if manifest.imported is None else manifest.imported.model_dump(mode="json"),
        "masking": None if manifest.masking is None else manifest.masking.model_dump(mode="json"),
        "seed": config.seed,
        "sizes": None,
        "sample": None,
    }
    if shards:
        facts["sizes"] = _sizes(reader, shards, pick_shards(shards, _SIZED_SHARDS, rng))
        is_local = isinstance(config.cache, Path)
        chosen = pick_shards(shards, min(config.sample_blocks, _DECODED_SHARDS if is_local else _FETCHED_SHARDS), rng)
        blocks = pick_blocks(manifest, chosen, config.sample_blocks, rng)
        facts["sample"] = _sample(reader, chosen, blocks, config, rng)
    return facts


def _opened(config: ReportConfig) -> tuple[CacheReader, list[int], bool]:
    """The cache, its committed shards, and whether there is nothing to come."""
    if not isinstance(config.cache, Path):
        assert config.cache is not None
        reader = CacheReader.open(config.cache, config)
        return reader, list(range(reader.manifest.blocks.num_shards)), True
    manifest = read_manifest(config.cache)
    refuse_absurd(config.cache, manifest)
    is_finished = read_seal(config.cache, manifest) is not None
    for error in small_file_errors(config.cache, manifest):
        raise error
    shards = list(range(manifest.blocks.num_shards)) if is_finished else committed_shards(config.cache, manifest)
    return CacheReader(config.cache, manifest), shards, is_finished


def _sizes(reader: CacheReader, shards: Sequence[int], chosen: Sequence[int]) -> dict[str, Any]:
    """Bytes and tokens of all committed shards, from those of the chosen ones; what is measured once per block."""
    manifest, specs = reader.manifest, array_specs(reader.manifest)
    num_bytes = dict.fromkeys(specs, 0)
    # Imported caches know neither of the last two.
    names = [name for name in ("block_lengths", "block_loss", "block_entropy") if name in specs]
    rows: dict[str, list[Array]] = {name: [] for name in names}
    with reader.read_ahead(names) as ahead:
        for at, shard in enumerate(chosen):
            ahead.want([shard], chosen[at + 1 : at + 1 + _SHARDS_AHEAD])
            receipt = reader.receipt(shard)
            for name in specs:
                num_bytes[name] += receipt.files[name].num_bytes
            for name in names:
                rows[name].append(reader.file(shard, specs[name]).read_rows(receipt.num_blocks))
    lengths_B = np.concatenate(rows["block_lengths"]).astype(np.int64)
    there = sum(manifest.blocks.shard_range(shard)[1] for shard in shards)
    scale = there / len(lengths_B)
    is_sealed = len(shards) == manifest.blocks.num_shards
    num_tokens = manifest.corpus.num_tokens if is_sealed else round(scale * int(lengths_B.sum()))
    tables = {part.name: reader.table_bytes(part.name) for part in manifest.encoding.tables(manifest.geometry)}
    arrays = {name: round(size * scale) for name, size in num_bytes.items()}
    return {
        "shards_read": len(chosen),
        "is_estimate": len(chosen) < len(shards),
        "tokens": num_tokens,
        "is_estimate_of_tokens": len(chosen) < len(shards) and not is_sealed,
        "blocks": there,
        "bytes": sum(arrays.values()) + sum(tables.values()),
        "arrays": arrays,
        "target_arrays": target_arrays(manifest),
        "tables": tables,
        "block_entropy": _of_blocks(rows.get("block_entropy", [])),
        # Blocks of one token have no loss of their own.
        "block_loss": _of_blocks(rows.get("block_loss", []), lengths_B > 1),
    }


def _sample(
    reader: CacheReader, shards: Sequence[int], blocks: Sequence[int], config: ReportConfig, rng: np.random.Generator
) -> dict[str, Any] | None:
    """What the teacher says at positions of some blocks; None where none of them has a target."""
    manifest = reader.manifest
    with reader.read_ahead(reader.batch_arrays(with_hidden=False)) as ahead:
        ahead.want(shards)
        positions = pick_positions(reader, blocks, rng)
        if not len(positions.at_N):
            return None
        tops = {temperature: read_tops(reader, positions, temperature) for temperature in manifest.temperatures}
        base = 1.0 if 1.0 in tops else manifest.temperatures[0]
        chosen = _spread(tops[base].entropy_N, config.examples, rng)
        examples = _examples(reader, positions, tops, base, chosen)
    return {
        "blocks": len(blocks),
        "positions": len(positions.at_N),
        "head_mass": {f"{t:g}": _head_mass(top) for t, top in tops.items()},
        "tail_mass": {
            f"{t:g}": _summary(top.outside_N) | {"outside": top.probs_NK.shape[1]}
            for t, top in tops.items()
            if top.outside_N is not None
        },
        "entropy": {f"{t:g}": _histogram(top.entropy_N) for t, top in tops.items()},
        "entropy_is": entropy_is(manifest.encoding.name, manifest.imported),
        "temperature": base,
        "examples": examples,
    }


def _spread(entropy_N: Array, count: int, rng: np.random.Generator) -> list[int]:
    """Positions from where the teacher is sure to where it is not: one at random of each of ``count`` groups."""
    order = np.argsort(entropy_N, kind="stable")
    groups = np.array_split(order, min(count, len(order))) if count else []
    return [int(rng.choice(group)) for group in groups]


def _head_mass(top: Tops) -> list[dict[str, float]]:
    """For each K the mass of the K most probable tokens over the sampled positions."""
    mass_NK = np.cumsum(top.probs_NK, axis=1)
    low, middle, high = np.quantile(mass_NK, [0.1, 0.5, 0.9], axis=0)
    columns = zip(mass_NK.mean(0).tolist(), low.tolist(), middle.tolist(), high.tolist(), strict=True)
    names = ("mean", "p10", "p50", "p90")
    return [{"k": k, **dict(zip(names, values, strict=True))} for k, values in enumerate(columns, 1)]


def _summary(values_N: Array) -> dict[str, float]:
    low, middle, high = np.quantile(values_N, [0.1, 0.5, 0.9]).tolist()
    return {"mean": float(values_N.mean()), "p10": low, "p50": middle, "p90": high}


def _of_blocks(parts: Sequence[Array], chosen_B: Array | None = None) -> dict[str, Any] | None:
    if not parts:
        return None
    values_B = np.concatenate(parts)
    return _histogram(values_B if chosen_B is None else values_B[chosen_B])


def _histogram(values: Array) -> dict[str, Any] | None:
    """Counts in bins of equal width, the edges, mean and quantiles; None where there is nothing to count."""
    known = values[np.isfinite(values)].astype(np.float64)
    if not len(known):
        return None
    counts, edges = np.histogram(known, bins=_BINS)
    return {"counts": counts.tolist(), "edges": edges.tolist(), "num": len(known), **_summary(known)}


def _examples(
    reader: CacheReader, positions: Positions, tops: dict[float, Tops], base: float, chosen: Sequence[int]
) -> list[dict[str, Any]]:
    pieces = Pieces.of_cache(reader.path)
    return [_example(reader, pieces, positions, tops, base, row) for row in chosen]


def _example(
    reader: CacheReader, pieces: Pieces, positions: Positions, tops: dict[float, Tops], base: float, row: int
) -> dict[str, Any]:
    block, at = int(positions.block_N[row]), int(positions.at_N[row])
    ids_T, length = reader.read("input_ids", [block])[0], int(reader.lengths([block])[0])
    masked = reader.masked([block])
    if masked is None:
        read_T, gold_at, after = ids_T, at + 1, []
    else:
        read_T, gold_at = masked.read_ids_BT[0], at
        after = read_T[at + 1 : min(length, at + 1 + _CONTEXT_TOKENS)].tolist()
    before = read_T[max(0, at + 1 - _CONTEXT_TOKENS) : at + 1].tolist()
    gold = int(ids_T[gold_at]) if gold_at < length else None
    shown = tops[base].ids_NK[row, :_SHOWN_TOKENS].tolist()
    probabilities = {
        f"{t:g}": dict(zip(top.ids_NK[row].tolist(), top.probs_NK[row].tolist(), strict=True))
        for t, top in tops.items()
    }
    return {
        "block": block,
        "position": at,
        "before": pieces.text(before[:-1]),
        "read": pieces.piece(before[-1])._asdict(),
        "after": pieces.text(after),
        "truth": None if gold is None else pieces.piece(gold)._asdict(),
        "selected": None if masked is None else bool(masked.selected_BT[0, at]),
        "entropy": float(tops[base].entropy_N[row]),
        "outside": {f"{t:g}": float(top.outside_N[row]) for t, top in tops.items() if top.outside_N is not None},
        "tokens": [
            {
                **pieces.piece(token)._asdict(),
                "is_truth": token == gold,
                "probability": {name: known.get(token) for name, known in probabilities.items()},
            }
            for token in shown
            if probabilities[f"{base:g}"][token] > 0
        ],
    }
