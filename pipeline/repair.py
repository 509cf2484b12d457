"""``kdpipe repair``: recompute what is bad in a cache, and nothing else.

In: a cache and its teacher. Out: the same cache, whole, or as whole as its own tokens allow. A shard is made again from
the tokens that it holds itself. Where these are damaged, the shard is taken out, so that the command that made the
cache makes it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cache_spec.commit import commit_shard
from cache_spec.durable import sync_folder, writing
from cache_spec.errors import CacheError
from cache_spec.manifest import Manifest
from cache_spec.masking import REPLACEMENTS, SELECTED
from cache_spec.receipts import RECEIPTS_FOLDER, SEAL_NAME, read_manifest, small_file_errors
from cache_spec.targets import Array
from cache_spec.validate import Problem, check_shard, verify_cache
from pipeline import folder
from pipeline.masking import Masks
from pipeline.recompute import teacher_of
from pipeline.shard import batches, encode_blocks, encoder_of, joined
from pipeline.source import TRANSCODED_FROM
from pipeline.teacher import load_teacher
from pipeline.teacher_description import teacher_description
from pipeline.teacher_files import TeacherFiles

_TOKENS = ("input_ids", "block_lengths")


def repair_cache(
    cache: Path, teacher: str | None, *, gguf_file: str | None, dry_run: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Find and recompute what is bad; returns what was done, and the problems that are left.

    ``teacher`` is where the teacher lies now; it is loaded only where a shard is to be recomputed. With ``dry_run``
    nothing is changed.
    Raises CacheError for a manifest or table that is broken, BadInputError for another teacher, and
    WouldLoseDataError for a cache that another process is writing.
    """
    read_manifest(cache)
    with folder.exclusive(cache) as manifest:
        assert manifest is not None
        if not folder.tables_whole(cache, manifest):
            hint = "run the command that made the cache again: it makes the tables again"
            raise CacheError("table-mismatch", cache, expected="tables as the manifest names them", hint=hint)
        again, lost = _bad_shards(cache, manifest, quiet)
        bad_files = [error.place for error in small_file_errors(cache, manifest)]
        facts = {"cache": str(cache), "files": bad_files, "recomputed": sorted(again), "taken_out": lost}
        if dry_run:
            return facts
        files = teacher_of(manifest, teacher, gguf_file) if again or bad_files else None
        if files is not None:
            folder.restore(
                cache, manifest, lambda: teacher_description(files, cache / folder.STAGING_NAME / "description")
            )
            folder.drop_staging(cache)
        if again or lost:
            folder.take_out(cache, [*again, *lost])
            with writing(cache):
                sync_folder(cache / RECEIPTS_FOLDER)
                sync_folder(cache)
        if again and files is not None:
            _recompute(cache, manifest, files, again, quiet)
        if not folder.missing_shards(cache, manifest) and not (cache / SEAL_NAME).exists():
            folder.seal(cache, manifest)
    return {**facts, "problems": [problem._asdict() for problem in verify_cache(cache)]}


def describe_repair(facts: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [f"written again: {place}" for place in facts["files"]]
    lines += [f"recomputed: shard {shard}" for shard in facts["recomputed"]]
    lines += [
        f"taken out: shard {shard}, whose own tokens are damaged: run the command that made the cache again"
        for shard in facts["taken_out"]
    ]
    problems = [Problem(**problem) for problem in facts.get("problems", [])]
    left = f"{len(problems)} problem(s) left" if "problems" in facts else "nothing was changed"
    return [*lines, *map(str, problems), f"{facts['cache']}: {left}"]


def _bad_shards(cache: Path, manifest: Manifest, quiet: bool) -> tuple[dict[int, dict[str, Array]], list[int]]:
    """Bad shards with the tokens that they hold, and those that have lost them."""
    again: dict[int, dict[str, Array]] = {}
    lost: list[int] = []
    needed = {*_TOKENS, *((SELECTED, REPLACEMENTS) if manifest.masking else ())}
    # Encoded from a teacher's stored states, which the teacher itself would not give bit for bit.
    transcoded = TRANSCODED_FROM in manifest.provenance
    for shard in tqdm(range(manifest.blocks.num_shards), desc="check", unit="shard", disable=quiet or None):
        found = check_shard(cache, manifest, shard)
        if not found.problems:
            continue
        of_tokens = {str(cache / name) for name in needed}
        spoilt = any(problem.place.startswith(tuple(f"{place}/" for place in of_tokens)) for problem in found.problems)
        if transcoded or spoilt or not needed <= found.arrays.keys():
            lost.append(shard)
        else:
            again[shard] = {name: found.arrays[name] for name in needed}
    return again, lost


def _recompute(
    cache: Path, manifest: Manifest, files: TeacherFiles, shards: dict[int, dict[str, Array]], quiet: bool
) -> None:
    teacher = load_teacher(files, device="auto", dtype=manifest.run.dtype, compiled=manifest.run.compiled)
    encoder = encoder_of(manifest, folder.read_tables(cache, manifest), teacher.device)
    for shard, tokens in tqdm(shards.items(), desc="recompute", unit="shard", disable=quiet or None):
        first = manifest.blocks.shard_range(shard)[0]
        parts = []
        for start, count in batches(manifest, shard):
            rows = {name: values[start - first : start - first + count] for name, values in tokens.items()}
            masks = Masks(rows[SELECTED], rows[REPLACEMENTS]) if manifest.masking else None
            ids_BT, lengths_B = (np.ascontiguousarray(rows[name]) for name in _TOKENS)
            parts.append(encode_blocks(manifest, teacher, encoder, ids_BT, lengths_B, start, masks))
        commit_shard(cache, manifest, shard, joined(parts))
