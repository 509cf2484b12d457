"""What is in a cache, and what it costs: a readable account.

In: a cache folder, finished or not. Out: one dictionary for machines and lines for people.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.layout import array_specs
from cache_spec.reader import ShardFile
from cache_spec.receipts import committed_shards, read_manifest, read_receipt, read_seal


def inspect_cache(cache: Path) -> dict[str, Any]:
    """Facts about a cache: teacher, tokens, shards, bytes/token per array, tail mass, teacher's loss.

    Means are over the shards committed so far, each block weighing as its real tokens; None where there is nothing to
    take the mean of, or where it is too large for a float.
    """
    manifest = read_manifest(cache)
    specs = array_specs(manifest)
    shards = committed_shards(cache, manifest)
    num_bytes = dict.fromkeys(specs, 0)
    num_tokens, loss_nats, entropy_nats = 0, 0.0, 0.0
    tail_mass = np.zeros(len(manifest.temperatures))
    for shard in shards:
        receipt = read_receipt(cache, manifest, shard)
        assert receipt is not None
        for name in specs:
            num_bytes[name] += receipt.files[name].num_bytes
        rows = {
            name: ShardFile(cache, specs[name], receipt).read_rows(receipt.num_blocks)
            for name in ("block_lengths", "block_loss", "block_entropy", "log_tail_mass")
        }
        lengths = rows["block_lengths"].astype(np.int64)
        num_tokens += int(lengths.sum())
        loss_nats += float(rows["block_loss"] @ (lengths - 1))
        entropy_nats += float(rows["block_entropy"] @ lengths)
        real_BT = np.arange(manifest.blocks.block_tokens) < lengths[:, None]
        tail_mass += (np.exp(rows["log_tail_mass"].astype(np.float64)) * real_BT[:, None]).sum((0, 2))
    total_bytes = sum(num_bytes.values())
    num_targets = num_tokens - sum(manifest.blocks.shard_range(s)[1] for s in shards)
    mean_loss = _mean(loss_nats, num_targets)
    return {
        "cache": str(cache),
        "fingerprint": manifest.fingerprint,
        "finished": read_seal(cache, manifest) is not None,
        "teacher": manifest.teacher.model_dump(mode="json"),
        "corpus": manifest.corpus.model_dump(mode="json"),
        "blocks": manifest.blocks.model_dump(mode="json"),
        "encoding": manifest.encoding.model_dump(mode="json"),
        "temperatures": list(manifest.temperatures),
        "hidden": manifest.hidden.model_dump(mode="json") if manifest.hidden else None,
        "compute": manifest.compute.model_dump(mode="json"),
        "provenance": manifest.provenance,
        "shards_done": len(shards),
        "shards_planned": manifest.blocks.num_shards,
        "tokens_done": num_tokens,
        "bytes": total_bytes,
        "bytes_per_token": _mean(total_bytes, num_tokens),
        "bytes_per_token_by_array": {name: _mean(size, num_tokens) for name, size in num_bytes.items()},
        "mean_tail_mass": {
            f"{t:g}": _mean(float(mass), num_tokens) for t, mass in zip(manifest.temperatures, tail_mass, strict=True)
        },
        "teacher_loss_nats": mean_loss,
        "teacher_perplexity": _exp(mean_loss),
        "teacher_entropy_nats": _mean(entropy_nats, num_tokens),
    }


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _exp(value: float | None) -> float | None:
    return math.exp(value) if value is not None and value < math.log(sys.float_info.max) else None


def describe(facts: dict[str, Any]) -> list[str]:
    """Lines for people."""
    teacher, blocks = facts["teacher"], facts["blocks"]
    hidden = f"mean of {facts['hidden']['window']} tokens" if facts["hidden"] else "none"
    lines = [
        f"cache        {facts['cache']}  ({'finished' if facts['finished'] else 'not finished'})",
        f"fingerprint  {facts['fingerprint'][:16]}",
        f"teacher      {teacher['name']}: {teacher['model_type']}, {teacher['num_parameters']:,} parameters,"
        f" vocabulary {teacher['vocab_size']:,}, width {teacher['hidden_size']}",
        f"text         {len(facts['corpus']['sources'])} source(s), {facts['corpus']['num_documents']:,} documents,"
        f" {facts['corpus']['num_tokens']:,} tokens",
        f"shards       {facts['shards_done']:,} of {facts['shards_planned']:,} done,"
        f" {blocks['num_blocks']:,} blocks of {blocks['block_tokens']:,} tokens",
        f"targets      {facts['encoding']['name']}, K = {facts['encoding']['k']}, hidden states: {hidden}",
    ]
    if not facts["tokens_done"]:
        return lines
    lines.append(f"size         {facts['bytes']:,} bytes, {facts['bytes_per_token']:.2f} bytes/token")
    lines += [f"  {name:<15}{size:8.2f} bytes/token" for name, size in facts["bytes_per_token_by_array"].items()]
    lines += [f"tail mass    {mass:.4f} at T = {t}" for t, mass in facts["mean_tail_mass"].items()]
    loss, perplexity = facts["teacher_loss_nats"], facts["teacher_perplexity"]
    known = [] if loss is None else [f"loss {loss:.4f} nats"]
    known += [] if perplexity is None else [f"perplexity {perplexity:.2f}"]
    known.append(f"entropy {facts['teacher_entropy_nats']:.4f} nats on this text")
    return [*lines, "teacher      " + ", ".join(known)]
