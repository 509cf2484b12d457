"""``kdpipe verify --deep``: run the teacher again on random batches of a cache and compare.

In: a whole cache and its teacher. Out: problems, none if the teacher still says what the cache holds.

Legend of axes: B blocks, T tokens, K kept, S draws, J points, D teacher width, W windows.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.address import CopySettings
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.topk import Head
from cache_spec.errors import BadInputError
from cache_spec.imported import refuse_import
from cache_spec.layout import array_specs
from cache_spec.manifest import Manifest
from cache_spec.masking import REPLACEMENTS, SELECTED
from cache_spec.reader import CacheReader
from cache_spec.targets import Array, HeadTargets, HiddenTargets, PointTargets
from cache_spec.validate import Problem
from pipeline.masking import Masks
from pipeline.shard import encode_blocks, encoder_of
from pipeline.source import TRANSCODED_FROM, TRANSCODED_STATES
from pipeline.teacher import load_teacher
from pipeline.teacher_files import TeacherFiles, describe_teacher, resolve_teacher

# Another processor or thread count may round the last bits of a logit differently, in float32 and in half precision.
TOLERANCE_NATS = {"float32": 0.02, "float16": 0.05, "bfloat16": 0.25}
TRANSCODED_TOLERANCE_NATS = {"float16": 0.05, "int8": 0.25}
"""Of a cache that was made without a teacher, by the type of the hidden states that it was made from."""
MOVED_DRAWS_PER_NAT = 4.0
"""Share of draws that may move to another token, for each nat of tolerance: those next to a boundary do."""


def compare_with_teacher(
    cache: Path | str,
    teacher: str | None,
    *,
    gguf_file: str | None,
    num_batches: int,
    copy: CopySettings | None = None,
) -> list[Problem]:
    """Re-encode ``num_batches`` random batches, in the cache's own batch shape, and report what differs.

    Raises BadInputError ``other-teacher`` if the teacher's weights are not those of the manifest.
    """
    reader = CacheReader.open(cache, copy)
    manifest = reader.manifest
    files, compute = teacher_of(manifest, teacher, gguf_file), manifest.run
    running = load_teacher(files, device="auto", dtype=compute.dtype, compiled=compute.compiled)
    encoder = encoder_of(manifest, {name: reader.table(name) for name in manifest.tables}, running.device)
    blocks, batch = manifest.blocks, compute.batch_blocks
    starts = [
        start
        for shard in range(blocks.num_shards)
        for first, count in [blocks.shard_range(shard)]
        for start in range(first, first + count, batch)
    ]
    rng = np.random.default_rng(secrets.randbits(64))
    limit = TOLERANCE_NATS[compute.dtype]
    if TRANSCODED_FROM in manifest.provenance:
        limit = max(limit, TRANSCODED_TOLERANCE_NATS[manifest.provenance.get(TRANSCODED_STATES, "float16")])
    problems = []
    for start in sorted(rng.choice(starts, size=min(num_batches, len(starts)), replace=False).tolist()):
        first, count = blocks.shard_range(start // blocks.shard_blocks)
        chosen = range(start, min(start + batch, first + count))
        stored = {name: reader.read(name, chosen) for name in array_specs(manifest)}
        masks = None if manifest.masking is None else Masks(stored[SELECTED], stored[REPLACEMENTS])
        fresh = encode_blocks(manifest, running, encoder, stored["input_ids"], stored["block_lengths"], start, masks)
        for what, bound, off in _differences(manifest, reader.prepared, stored, fresh, limit):
            if not off <= bound:
                place = f"{cache} blocks {start} to {chosen[-1]}: {what}"
                problems.append(Problem("teacher-disagrees", place, f"within {bound:g}", f"{off:.3f}"))
    return problems


def teacher_of(manifest: Manifest, teacher: str | None, gguf_file: str | None) -> TeacherFiles:
    """The files of a cache's teacher, where it lies now; BadInputError ``other-teacher`` for other weights."""
    refuse_import(manifest.imported, f"cache {manifest.fingerprint[:16]}", "targets that a teacher was run for")
    if teacher is None and manifest.teacher.revision is None:
        hint = "say where the teacher lies with --teacher"
        raise BadInputError("unknown-teacher", manifest.teacher.name, expected="a folder", hint=hint)
    name = teacher or manifest.teacher.name
    files = resolve_teacher(name, revision=None if teacher else manifest.teacher.revision, gguf_file=gguf_file)
    info, _ = describe_teacher(files)
    if info.weights_sha256 != manifest.teacher.weights_sha256:
        expected, found = str(manifest.teacher.weights_sha256), str(info.weights_sha256)
        raise BadInputError("other-teacher", name, expected=f"weights {expected[:16]}", found=found[:16])
    return files


def _differences(
    manifest: Manifest, prepared: Any, stored: dict[str, Array], fresh: dict[str, Array], limit: float
) -> Iterator[tuple[str, float, float]]:
    """What is compared, how far it may be off, and how far it is: nats, or shares of one."""
    for name in ("block_loss", "block_entropy"):
        yield f"{name}, nats", limit, float(np.abs(stored[name] - fresh[name]).max())
    if manifest.hidden is not None:
        there, here = (
            part["hidden"].astype(np.float32) * (part["hidden_scale"][:, None] if "hidden_scale" in part else 1)
            for part in (stored, fresh)
        )
        yield "hidden, relative", limit, _relative(there, here)
    for at, temperature in enumerate(manifest.temperatures):
        left, right = (
            manifest.encoding.decode(part, manifest.geometry, at, "blocks", prepared) for part in (stored, fresh)
        )
        where = f"at temperature {temperature:g}"
        if isinstance(left, HiddenTargets) and isinstance(right, HiddenTargets):
            int8 = isinstance(manifest.encoding, Hidden) and manifest.encoding.dtype == "int8"
            # Two vectors that are nearly the same may be rounded to different codes.
            step = float(stored["last_hidden_scale"].max()) if int8 else 0.0
            yield "last_hidden, relative", limit + step, _relative(left.hidden_BTD, right.hidden_BTD)
            return
        if isinstance(left, PointTargets) and isinstance(right, PointTargets):
            moved = _distance(left.ids_BTJ, left.probs_BTJ, right.ids_BTJ, right.probs_BTJ)
            yield f"share of draws that moved {where}", min(0.5, MOVED_DRAWS_PER_NAT * limit), moved
        if isinstance(left, HeadTargets) and isinstance(right, HeadTargets):
            assert isinstance(manifest.encoding, Head)
            yield from _head_differences(manifest.encoding, left, right, limit, where)


def _head_differences(
    encoding: Head, left: HeadTargets, right: HeadTargets, limit: float, where: str
) -> Iterator[tuple[str, float, float]]:
    """Heads as roots of probabilities, which change by half a nat at most for each nat of a logit."""
    # Values that are nearly the same may be rounded to neighbouring steps.
    level, mass_step = 1 / encoding.levels, encoding.odds_step_nats / 4
    roots = [np.exp(targets.logprobs_BTK.astype(np.float64) / 2) for targets in (left, right)]
    yield "head", limit + level, _root_difference(left.ids_BTK, roots[0], right.ids_BTK, roots[1])
    masses = [1 / (1 + np.exp(-targets.tail_log_odds_BT.astype(np.float64))) for targets in (left, right)]
    yield f"tail mass {where}", limit + mass_step, float(np.abs(masses[0] - masses[1]).max())
    if left.prototype_BT is not None and right.prototype_BT is not None:
        yield "share of other prototypes", limit, float((left.prototype_BT != right.prototype_BT).mean())
    if left.residual_ids_BTS is not None and right.residual_ids_BTS is not None:
        assert left.residual_weights_BTS is not None
        assert right.residual_weights_BTS is not None
        # In units of all residual mass: another prototype, or a draw at a boundary, moves some of it.
        total = np.abs(left.residual_weights_BTS).sum(2).mean() or 1.0
        moved = _distance(
            left.residual_ids_BTS, left.residual_weights_BTS, right.residual_ids_BTS, right.residual_weights_BTS
        )
        yield f"share of residual draws that moved {where}", min(0.5, MOVED_DRAWS_PER_NAT * limit), moved / total


def _relative(there: Array, here: Array) -> float:
    there = there.astype(np.float32)
    return float((np.abs(there - here.astype(np.float32)) / (1 + np.abs(there))).max())


def _root_difference(ids: Array, roots: Array, other_ids: Array, other_roots: Array) -> float:
    """Largest difference of a token's root in two heads; one that is in one head only counts against the other's last.

    Tokens at the end of a head that are nearly equal may have changed places with others outside it.
    """
    k = ids.shape[-1]
    keys = [_keys(part).reshape(-1) for part in (ids, other_ids)]
    values = [part.reshape(-1, k) for part in (roots, other_roots)]
    _, left, right = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    differences = [np.abs(values[0].reshape(-1)[left] - values[1].reshape(-1)[right])]
    for own, common, other in ((0, left, 1), (1, right, 0)):
        alone = np.setdiff1d(np.arange(keys[own].size), common, assume_unique=True)
        differences.append(np.abs(values[own].reshape(-1)[alone] - values[other][alone // k, -1]))
    return max(float(part.max()) for part in differences if part.size)


def _distance(ids: Array, weights: Array, other_ids: Array, other_weights: Array) -> float:
    """Half of the summed difference of two signed measures, mean over rows: the share that lies elsewhere."""
    keys = np.concatenate([_keys(ids).reshape(-1), _keys(other_ids).reshape(-1)])
    values = np.concatenate([weights.reshape(-1), -other_weights.reshape(-1)]).astype(np.float64)
    _, at = np.unique(keys, return_inverse=True)
    return float(np.abs(np.bincount(at, values)).sum() / 2 / (ids.shape[0] * ids.shape[1]))


def _keys(ids: Array) -> Array:
    """One number for each (position, token), so that tokens of one position are compared, whatever their rank."""
    num_rows = ids.shape[0] * ids.shape[1]
    keys: Array = ids.reshape(num_rows, -1).astype(np.int64) + (np.arange(num_rows)[:, None] << 32)
    return keys
