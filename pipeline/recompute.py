"""``kdpipe verify --deep``: run the teacher again on random batches of a cache and compare.

In: a whole cache and its teacher. Out: problems, none if the teacher still says what the cache holds.

Legend of axes: B blocks, T tokens, K kept.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np

from cache_spec.errors import BadInputError
from cache_spec.layout import array_specs
from cache_spec.reader import CacheReader
from cache_spec.shardfile import Array
from cache_spec.topk import decode_gaps
from cache_spec.validate import Problem
from pipeline.capture import encode_blocks
from pipeline.teacher import load_teacher
from pipeline.teacher_files import describe_teacher, resolve_teacher

# Another processor or thread count may round the last bits of a logit differently, in float32 and in half precision.
TOLERANCE_NATS = {"float32": 0.02, "bfloat16": 0.25, "float16": 0.05}


def compare_with_teacher(cache: Path, teacher: str | None, *, gguf_file: str | None, num_batches: int) -> list[Problem]:
    """Re-encode ``num_batches`` random batches, in the cache's own batch shape, and report what differs.

    Raises BadInputError ``other-teacher`` if the teacher's weights are not those of the manifest.
    """
    reader = CacheReader.open(cache)
    manifest = reader.manifest
    name = teacher or manifest.teacher.name
    files = resolve_teacher(name, revision=None if teacher else manifest.teacher.revision, gguf_file=gguf_file)
    info, _ = describe_teacher(files)
    if info.weights_sha256 != manifest.teacher.weights_sha256:
        expected, found = manifest.teacher.weights_sha256, info.weights_sha256
        raise BadInputError("other-teacher", name, expected=f"weights {expected[:16]}", found=found[:16])
    running = load_teacher(files, device="auto", dtype=manifest.compute.dtype)
    blocks, batch = manifest.blocks, manifest.compute.batch_blocks
    starts = [
        start
        for shard in range(blocks.num_shards)
        for first, count in [blocks.shard_range(shard)]
        for start in range(first, first + count, batch)
    ]
    rng = np.random.default_rng(secrets.randbits(64))
    problems = []
    for start in sorted(rng.choice(starts, size=min(num_batches, len(starts)), replace=False).tolist()):
        first, count = blocks.shard_range(start // blocks.shard_blocks)
        chosen = range(start, min(start + batch, first + count))
        stored = {name: reader.read(name, chosen) for name in array_specs(manifest)}
        fresh = encode_blocks(manifest, running, stored["input_ids"], stored["block_lengths"], start)
        worst = _worst_difference(stored, fresh, manifest.encoding.step_nats)
        limit = TOLERANCE_NATS[manifest.compute.dtype]
        if not worst <= limit:
            place = f"{cache} blocks {start} to {chosen[-1]}"
            problems.append(Problem("teacher-disagrees", place, f"within {limit} nats", f"{worst:.3f}"))
    return problems


def _worst_difference(stored: dict[str, Array], fresh: dict[str, Array], step_nats: float) -> float:
    """Largest difference in nats, by rank: neighbours in rank that are nearly equal may have changed places."""
    head = np.abs(decode_gaps(stored["head_gaps"], step_nats) - decode_gaps(fresh["head_gaps"], step_nats))
    others = [np.abs(stored[n] - fresh[n]) for n in ("log_normaliser", "block_loss", "block_entropy")]
    return float(max(head.max(), *(part.max() for part in others)))
