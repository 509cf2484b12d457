"""What is in a cache, and what it costs: a readable account.

In: a cache's folder, finished or not, or the URL of a finished one in a store. Out: one dictionary for
machines and lines for people.

Legend of axes: B blocks, T tokens, M temperatures.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.address import CopySettings
from cache_spec.encodings.topk import Head, decode_odds
from cache_spec.imported import ImportedInfo
from cache_spec.layout import array_specs, target_arrays
from cache_spec.masking import SELECTED, real_positions
from cache_spec.reader import CacheReader
from cache_spec.receipts import committed_shards, read_manifest, read_seal

_SHARDS_AHEAD = 64


def inspect_cache(cache: Path | str, copy: CopySettings | None = None) -> dict[str, Any]:
    """Facts about a cache: teacher, tokens, shards, bytes/token per array, tables, tail mass, teacher's loss.

    Means are over the shards committed so far, each block weighing as its tokens that have targets; None where there is
    nothing to take the mean of, or where it is too large for a float. A table's bytes are those on disk.
    """
    if isinstance(cache, Path):
        reader = CacheReader(cache, read_manifest(cache))
        shards = committed_shards(cache, reader.manifest)
        is_finished = read_seal(cache, reader.manifest) is not None
    else:
        reader = CacheReader.open(cache, copy)
        shards, is_finished = list(range(reader.manifest.blocks.num_shards)), True
    manifest = reader.manifest
    specs, encoding = array_specs(manifest), manifest.encoding
    num_bytes = dict.fromkeys(specs, 0)
    num_tokens, num_predicted, num_kept, loss_nats, entropy_nats = 0, 0, 0, 0.0, 0.0
    tail_mass_M = np.zeros(len(manifest.temperatures))
    has_head, masking = isinstance(encoding, Head), manifest.masking
    of_teacher = [name for name in ("block_loss", "block_entropy") if name in specs]
    names = ["block_lengths", *of_teacher]
    names += [*(["tail_log_odds"] if has_head else []), *([] if masking is None else [SELECTED])]
    ahead = reader.read_ahead(names)
    for at, shard in enumerate(shards):
        ahead.want([shard], shards[at + 1 : at + 1 + _SHARDS_AHEAD])
        receipt = reader.receipt(shard)
        for name in specs:
            num_bytes[name] += receipt.files[name].num_bytes
        rows = {name: reader.file(shard, specs[name]).read_rows(receipt.num_blocks) for name in names}
        lengths_B = rows["block_lengths"].astype(np.int64)
        predicted_B, kept_BT = lengths_B - 1, real_positions(lengths_B, manifest.blocks.block_tokens)
        if masking is not None:
            predicted_B, kept_BT = rows[SELECTED].sum(1, dtype=np.int64), masking.kept(rows[SELECTED], lengths_B)
        num_tokens += int(lengths_B.sum())
        num_predicted += int(predicted_B.sum())
        num_kept += int(kept_BT.sum())
        if of_teacher:
            loss_nats += float(rows["block_loss"] @ predicted_B)
            entropy_nats += float(rows["block_entropy"] @ kept_BT.sum(1))
        if isinstance(encoding, Head):
            odds_BMT = decode_odds(rows["tail_log_odds"], encoding.odds_step_nats).astype(np.float64)
            stored_BT = real_positions(kept_BT.sum(1), kept_BT.shape[1])
            tail_mass_M += ((1 / (1 + np.exp(-odds_BMT))) * stored_BT[:, None]).sum((0, 2))
    ahead.close()
    table_bytes = {part.name: reader.table_bytes(part.name) for part in encoding.tables(manifest.geometry)}
    target_bytes = sum(num_bytes[name] for name in target_arrays(manifest))
    total_bytes = sum(num_bytes.values()) + sum(table_bytes.values())
    mean_loss = _mean(loss_nats, num_predicted) if of_teacher else None
    return {
        "cache": reader.place,
        "fingerprint": manifest.fingerprint,
        "finished": is_finished,
        "teacher": manifest.teacher.model_dump(mode="json"),
        "corpus": manifest.corpus.model_dump(mode="json"),
        "blocks": manifest.blocks.model_dump(mode="json"),
        "encoding": encoding.model_dump(mode="json"),
        "temperatures": list(manifest.temperatures),
        "hidden": manifest.hidden.model_dump(mode="json") if manifest.hidden else None,
        "imported": manifest.imported.model_dump(mode="json") if manifest.imported else None,
        "masking": manifest.masking.model_dump(mode="json") if manifest.masking else None,
        "compute": manifest.compute.model_dump(mode="json") if manifest.compute else None,
        "provenance": manifest.provenance,
        "shards_done": len(shards),
        "shards_planned": manifest.blocks.num_shards,
        "tokens_done": num_tokens,
        "targets_done": num_kept,
        "bytes": total_bytes,
        "bytes_per_token": _mean(total_bytes, num_tokens),
        "bytes_per_token_by_array": {name: _mean(size, num_tokens) for name, size in num_bytes.items()},
        "target_arrays": target_arrays(manifest),
        "target_bytes_per_token": _mean(target_bytes, num_tokens),
        "table_bytes": table_bytes,
        "table_bytes_per_token": _mean(sum(table_bytes.values()), num_tokens),
        "mean_tail_mass": {
            f"{t:g}": _mean(float(mass), num_kept) for t, mass in zip(manifest.temperatures, tail_mass_M, strict=True)
        }
        if has_head
        else {},
        "teacher_loss_nats": mean_loss,
        "teacher_perplexity": _exp(mean_loss),
        "teacher_entropy_nats": _mean(entropy_nats, num_kept) if of_teacher else None,
    }


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _exp(value: float | None) -> float | None:
    return math.exp(value) if value is not None and value < math.log(sys.float_info.max) else None


def describe(facts: dict[str, Any]) -> list[str]:
    """Lines for people."""
    teacher, blocks = facts["teacher"], facts["blocks"]
    hidden = facts["hidden"]
    pooled = f"{hidden['dtype']} means of {hidden['window']} tokens" if hidden else "none"
    lines = [
        f"cache        {facts['cache']}  ({'finished' if facts['finished'] else 'not finished'})",
        f"fingerprint  {facts['fingerprint'][:16]}",
        f"teacher      {teacher['name']}: {_sizes(teacher)}vocabulary {teacher['vocab_size']:,}",
        f"text         {len(facts['corpus']['sources'])} source(s), {facts['corpus']['num_documents']:,} documents,"
        f" {facts['corpus']['num_tokens']:,} tokens",
        f"shards       {facts['shards_done']:,} of {facts['shards_planned']:,} done,"
        f" {blocks['num_blocks']:,} blocks of {blocks['block_tokens']:,} tokens",
        f"targets      {describe_encoding(facts['encoding'])}",
        f"temperatures {', '.join(f'{t:g}' for t in facts['temperatures'])}"
        + (" and any other" if facts["encoding"]["name"] == "hidden" else ""),
        f"hidden       {pooled}",
    ]
    if (masking := facts["masking"]) is not None:
        lines.append(
            f"masking      {masking['probability']:g} of a block's tokens: {masking['mask_share']:g} masked,"
            f" {masking['keep_share']:g} kept, {masking['random_share']:g} random; smoothing {masking['smoothing']:g},"
            f" seed {masking['seed']}; targets of {'these' if masking['positions'] == 'masked' else 'all'}"
        )
    if (imported := facts["imported"]) is not None:
        of_what = "the whole vocabulary" if imported["logprobs"] == "full" else "the kept tokens alone"
        lines.append(
            f"imported     log-probabilities of {of_what}, sums right within {imported['mass_error']:g}, no normaliser:"
            f" temperature 1 and tail {' or '.join(ImportedInfo(**imported).tails)}"
        )
    if "transcoded_from" in facts["provenance"]:
        lines.append(f"made from    cache {facts['provenance']['transcoded_from'][:16]}")
    if not facts["tokens_done"]:
        return lines
    lines.append(f"size         {facts['bytes']:,} bytes, {facts['bytes_per_token']:.2f} bytes/token")
    lines += [
        f"  {name:<18}{size:8.2f} bytes/token{'  *' if name in facts['target_arrays'] else ''}"
        for name, size in facts["bytes_per_token_by_array"].items()
    ]
    lines.append(f"  {'* targets':<18}{facts['target_bytes_per_token']:8.2f} bytes/token")
    if facts["table_bytes"]:
        shown = ", ".join(f"{name} {size:,} bytes" for name, size in facts["table_bytes"].items())
        lines.append(f"  {'stored once':<18}{facts['table_bytes_per_token']:8.2f} bytes/token: {shown}")
    lines += [f"tail mass    {mass:.4f} at T = {t}" for t, mass in facts["mean_tail_mass"].items()]
    loss, perplexity = facts["teacher_loss_nats"], facts["teacher_perplexity"]
    known = [] if loss is None else [f"loss {loss:.4f} nats"]
    known += [] if perplexity is None else [f"perplexity {perplexity:.2f}"]
    if facts["teacher_entropy_nats"] is None:
        return lines
    known.append(f"entropy {facts['teacher_entropy_nats']:.4f} nats on this text")
    return [*lines, "teacher      " + ", ".join(known)]


def _sizes(teacher: dict[str, Any]) -> str:
    """Architecture and sizes, as far as they are known."""
    known = [] if teacher["model_type"] is None else [str(teacher["model_type"])]
    known += [] if teacher["num_parameters"] is None else [f"{teacher['num_parameters']:,} parameters"]
    known += [] if teacher["hidden_size"] is None else [f"width {teacher['hidden_size']}"]
    return "".join(f"{part}, " for part in known)


def describe_encoding(encoding: dict[str, Any]) -> str:
    """An encoding and its parameters in words."""
    names = {
        "k": "K = {}",
        "draws": "{} draws",
        "prototypes": "{} prototypes",
        "residual_draws": "{} residual draws",
        "levels": "{} levels",
        "dtype": "{}",
        "head_dtype": "output head in {}",
        "seed": "seed {}",
    }
    parts = [text.format(f"{encoding[name]}") for name, text in names.items() if encoding.get(name) is not None]
    return ", ".join([encoding["name"], *parts])
