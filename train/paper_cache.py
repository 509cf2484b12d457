"""A recipe's file against the cache that a student is to learn from: the keys that only a cache can answer.

In: a checked file, the flags, a cache's manifest. Out: settings that follow from the cache, or the key that it fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from cache_spec.address import as_address
from cache_spec.errors import BadInputError
from cache_spec.local_copy import read_stored_manifest
from cache_spec.manifest import MANIFEST_NAME, Manifest
from cache_spec.receipts import read_manifest
from train.paper import Mapped, Paper, capture_command
from train.paper_masked import refuse_other_masking


def cache_settings(paper: Paper, flags: Mapping[str, Any]) -> Mapped:
    """The cache, and the blocks of a pass where the file counts tokens.

    Raises ``no-cache`` with the command that makes it, ``other-teacher``, ``other-masking``,
    ``undeclared-temperature`` or ``pooled-hidden-states``; a setting that a flag gives is not compared.
    """
    cache = as_address(flags.get("cache") or paper.cache)
    if not isinstance(cache, str) and not (cache / MANIFEST_NAME).is_file():
        hint = f"the teacher does not run in training; make the cache with: {capture_command(paper)}"
        raise BadInputError("no-cache", cache, expected="a finished cache (--cache)", found="none", hint=hint)
    manifest = read_stored_manifest(cache) if isinstance(cache, str) else read_manifest(cache)
    _refuse_other_teacher(paper, manifest, flags)
    refuse_other_masking(paper, manifest.masking, flags)
    if "temperature" not in flags:
        try:
            manifest.temperature_index(paper["temperature"])
        except BadInputError as error:
            raise paper.refusal(
                error.kind, "temperature", expected=error.expected, found=f"{paper['temperature']:g}", hint=error.hint
            ) from None
    if paper["alpha_cos"] > 0 and "cosine_weight" not in flags:
        window = None if manifest.hidden is None else manifest.hidden.window
        if window != 1:
            found = "no hidden states" if window is None else f"means over {window} tokens"
            raise paper.refusal(
                "pooled-hidden-states",
                "alpha_cos",
                expected="a cache of each token's hidden state",
                found=found,
                hint="capture with --hidden-window 1, or say with --cosine-weight that you mean another loss",
            )
    mapped: Mapped = {"data_file": {"cache": str(cache)}}
    if paper["tokens_per_batch"] > 0:
        mean_tokens = manifest.corpus.num_tokens / manifest.blocks.num_blocks
        mapped["batch_size"] = {}
        mapped["tokens_per_batch"] = {"batch_blocks": max(1, round(paper["tokens_per_batch"] / mean_tokens))}
    return mapped


def _refuse_other_teacher(paper: Paper, manifest: Manifest, flags: Mapping[str, Any]) -> None:
    hint = "give the cache of this recipe's teacher"
    if manifest.teacher.model_type != paper["teacher_type"]:
        expected = f"{manifest.teacher.model_type}, as in the cache"
        raise paper.refusal("other-teacher", "teacher_type", expected=expected, found=paper["teacher_type"], hint=hint)
    # A folder's name stands for its path in a cache, so that moving it changes nothing.
    wanted = flags.get("teacher") or paper["teacher_name"]
    if PurePath(wanted).name != PurePath(manifest.teacher.name).name:
        expected = f"{manifest.teacher.name}, as in the cache"
        raise paper.refusal("other-teacher", "teacher_name", expected=expected, found=wanted, hint=hint)
