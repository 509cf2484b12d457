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
from pipeline.shard import encode_blocks
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
    if teacher is None and manifest.teacher.revision is None:
        hint = "say where the teacher lies with --teacher"
        raise BadInputError("unknown-teacher", manifest.teacher.name, expected="a folder", hint=hint)
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
    """Largest difference in nats over all targets, and in units of one plus its size over hidden states.

    Tokens at the end of a head that are nearly equal may have changed places with others outside it.
    """
    heads = [decode_gaps(part["head_gaps"], step_nats).reshape(-1) for part in (stored, fresh)]
    floors = [part["head_gaps"].sum(1, dtype=np.int64).reshape(-1) * -step_nats for part in (stored, fresh)]
    k = stored["head_ids"].shape[-1]
    # One number for each (position, token): the same token of the same position is compared, whatever its rank.
    keys = [
        part["head_ids"].reshape(-1).astype(np.int64) + np.repeat(np.arange(len(floors[0])), k) * (1 << 32)
        for part in (stored, fresh)
    ]
    _, left, right = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    differences = [np.abs(heads[0][left] - heads[1][right])]
    for own, common, other in ((0, left, 1), (1, right, 0)):
        alone = np.setdiff1d(np.arange(len(keys[own])), common, assume_unique=True)
        differences.append(heads[own][alone] - floors[other][alone // k])
    differences += [np.abs(stored[n] - fresh[n]) for n in ("log_normaliser", "block_loss", "block_entropy")]
    differences.append(np.abs(np.exp(stored["log_tail_mass"]) - np.exp(fresh["log_tail_mass"])))
    if "hidden" in stored:
        there, here = (part["hidden"].astype(np.float32) for part in (stored, fresh))
        differences.append(np.abs(there - here) / (1 + np.abs(there)))
    return max(float(part.max()) for part in differences if part.size)
