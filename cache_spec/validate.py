"""Find everything that is wrong with a cache, not just the first thing.

In: a cache folder. Out: problems, each with a stable kind, the place, what was expected and what was found. A
finished cache without problems is bit for bit what was committed, and its arrays mean what ``SPEC.md`` says.

Legend of axes: B blocks, T tokens, K kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache_spec.commit import tokens_digest
from cache_spec.durable import TEMPORARY_PREFIX
from cache_spec.errors import CacheError
from cache_spec.layout import array_specs, zarr_metadata
from cache_spec.manifest import MANIFEST_NAME, Manifest, sha256_hex
from cache_spec.reader import ShardFile
from cache_spec.receipts import (
    RECEIPTS_FOLDER,
    SEAL_NAME,
    Receipt,
    read_manifest,
    read_receipt,
    read_seal,
    receipt_path,
    receipts_digest,
    small_file_errors,
    unfinished,
)
from cache_spec.shardfile import Array
from cache_spec.topk import decode_gaps

# Log masses are stored as float16: half a unit in the last place of the largest exponent below e^0.
_MASS_TOLERANCE = 2e-3


class Problem(NamedTuple):
    """One broken rule."""

    kind: str
    place: str
    expected: str | None
    found: str | None

    def __str__(self) -> str:
        return str(CacheError(self.kind, self.place, expected=self.expected, found=self.found))


class Problems(list[Problem]):
    """What was found so far."""

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Turn the CacheError of a failed check into an entry, and go on."""
        try:
            yield
        except CacheError as error:
            self.append(Problem(error.kind, error.place, error.expected, error.found))


def verify_cache(cache: Path, on_shard: Callable[[int], object] = lambda shard: None) -> list[Problem]:
    """All problems of a cache; an empty list means that it is finished and whole.

    Every byte of every file is read: digests first, then the meaning of each array. ``on_shard`` is called after
    each shard, for progress.
    """
    problems = Problems()
    with problems.collecting():
        manifest = read_manifest(cache)
        problems += (Problem(e.kind, e.place, e.expected, e.found) for e in small_file_errors(cache, manifest))
        problems += _metadata_problems(cache, manifest)
        problems += _stray_files(cache, manifest)
        tokens = hashlib.sha256()
        num_readable = num_tokens = 0
        for shard in range(manifest.blocks.num_shards):
            with problems.collecting():
                receipt = read_receipt(cache, manifest, shard)
                if receipt is not None:
                    arrays, unreadable = _read_shard(cache, manifest, receipt)
                    problems += unreadable
                    problems += _meaning_problems(manifest, receipt, arrays, cache)
                    if "input_ids" in arrays:
                        num_readable += "block_lengths" in arrays
                        num_tokens += int(arrays.get("block_lengths", np.zeros(1)).sum())
                        tokens.update(np.ascontiguousarray(arrays["input_ids"], dtype="<u4").tobytes())
            on_shard(shard)
        if num_readable == manifest.blocks.num_shards and tokens.hexdigest() != manifest.corpus.tokens_sha256:
            problems.append(Problem("corpus-mismatch", str(cache), manifest.corpus.tokens_sha256, tokens.hexdigest()))
        if num_readable == manifest.blocks.num_shards and num_tokens != manifest.corpus.num_tokens:
            expected, found = f"{manifest.corpus.num_tokens} tokens", f"{num_tokens} in block_lengths"
            problems.append(Problem("corpus-mismatch", str(cache), expected, found))
        seal = read_seal(cache, manifest)
        if seal is None:
            raise unfinished(cache, manifest)
        digest = receipts_digest(cache, manifest)
        if digest != seal.receipts_sha256:
            raise CacheError("seal-mismatch", cache / SEAL_NAME, expected=seal.receipts_sha256, found=digest)
    return problems


def _metadata_problems(cache: Path, manifest: Manifest) -> Iterator[Problem]:
    """Metadata must say what the manifest implies: a stock reader believes it, whatever its digest."""
    for name, data in sorted(zarr_metadata(manifest).items()):
        path = cache / name
        if name not in manifest.files:
            yield Problem("missing-file", str(path), "listed in the manifest", None)
            continue
        try:
            content = path.read_bytes()
            if path.is_symlink() or sha256_hex(content) != manifest.files[name]:
                continue  # reported with the other small files
            same = _said(json.loads(content)) == _said(json.loads(data))
        except OSError:
            continue  # reported as missing
        except (ValueError, RecursionError):
            same = False
        if not same:
            yield Problem("file-mismatch", str(path), "the metadata that the manifest implies", "other metadata")


def _said(metadata: object) -> object:
    """What a ``zarr.json`` says: some versions of zarr-python write empty members, others leave them out."""
    if not isinstance(metadata, dict):
        return metadata
    return {name: value for name, value in metadata.items() if value not in (None, [], {})}


def _stray_files(cache: Path, manifest: Manifest) -> Iterator[Problem]:
    """Files that no rule accounts for; hidden ones (locks, leftovers of killed runs) are nobody's data."""
    blocks = manifest.blocks
    known = {MANIFEST_NAME, SEAL_NAME, *manifest.files}
    known |= {f"{RECEIPTS_FOLDER}/{receipt_path(cache, shard).name}" for shard in range(blocks.num_shards)}
    known |= {spec.shard_path(s) for spec in array_specs(manifest).values() for s in range(blocks.num_shards)}
    for folder, folders, names in os.walk(cache):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name).relative_to(cache).as_posix()
            if path not in known and not name.startswith((TEMPORARY_PREFIX, ".")):
                yield Problem("unexpected-file", str(cache / path), "nothing here", None)


def _read_shard(cache: Path, manifest: Manifest, receipt: Receipt) -> tuple[dict[str, Array], list[Problem]]:
    """Every array of a shard whose file is whole, and the problems of those that are not."""
    arrays: dict[str, Array] = {}
    problems = Problems()
    for name, spec in array_specs(manifest).items():
        path = cache / spec.shard_path(receipt.shard)
        with problems.collecting():
            file = ShardFile(cache, spec, receipt)
            digest = sha256_hex(path.read_bytes())
            if digest != receipt.files[name].sha256:
                raise CacheError("shard-digest", path, expected=receipt.files[name].sha256, found=digest)
            arrays[name] = file.read_rows(receipt.num_blocks)
    return arrays, problems


def _meaning_problems(manifest: Manifest, receipt: Receipt, arrays: dict[str, Array], cache: Path) -> Iterator[Problem]:
    vocab_size = manifest.teacher.vocab_size

    def problem(kind: str, name: str, expected: object, found: object) -> Problem:
        return Problem(
            kind, str(cache / array_specs(manifest)[name].shard_path(receipt.shard)), str(expected), str(found)
        )

    for name in ("input_ids", "head_ids"):
        if name in arrays and arrays[name].max() >= vocab_size:
            yield problem("id-out-of-range", name, f"ids below {vocab_size}", arrays[name].max())
    if "input_ids" in arrays and tokens_digest(arrays["input_ids"]) != receipt.tokens_sha256:
        yield problem("tokens-mismatch", "input_ids", receipt.tokens_sha256, "another digest")
    if "head_ids" in arrays:
        ordered_BTK = np.sort(arrays["head_ids"], axis=-1)
        if (ordered_BTK[..., 1:] == ordered_BTK[..., :-1]).any():
            yield problem("repeated-id", "head_ids", "distinct ids in each head", "a repeated one")
    if "block_lengths" in arrays:
        lengths = arrays["block_lengths"]
        if not 1 <= lengths.min() <= lengths.max() <= manifest.blocks.block_tokens:
            yield problem("bad-length", "block_lengths", f"1 to {manifest.blocks.block_tokens}", lengths.tolist())
        is_last = receipt.first_block + receipt.num_blocks == manifest.blocks.num_blocks
        whole = lengths[:-1] if is_last and manifest.blocks.last_block == "keep" else lengths
        if (whole < manifest.blocks.block_tokens).any():
            yield problem("bad-length", "block_lengths", "full blocks but for a kept last one", lengths.tolist())
    for name in ("log_normaliser", "hidden", "block_loss", "block_entropy"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            yield problem("non-finite", name, "finite values", "NaN or infinity")
    if "log_tail_mass" in arrays:
        tails = arrays["log_tail_mass"]
        if np.isnan(tails).any() or tails.max() > _MASS_TOLERANCE:
            yield problem("bad-tail-mass", "log_tail_mass", "logs of masses from 0 to 1", tails.max())
    if {"head_gaps", "log_normaliser", "log_tail_mass"} <= set(arrays):
        yield from _mass_problems(manifest, arrays, problem)


def _mass_problems(
    manifest: Manifest, arrays: dict[str, Array], problem: Callable[[str, str, object, object], Problem]
) -> Iterator[Problem]:
    """Head and tail must sum to one at every temperature, up to quantisation."""
    step = manifest.encoding.step_nats
    try:
        logprobs_BTK = decode_gaps(arrays["head_gaps"], step)
    except CacheError as error:
        yield problem(error.kind, "head_gaps", error.expected, error.found)
        return
    for at, temperature in enumerate(manifest.temperatures):
        with np.errstate(over="ignore", invalid="ignore"):
            head_BT = np.exp(logprobs_BTK / temperature - arrays["log_normaliser"][:, at, :, None]).sum(-1)
            total_BT = head_BT + np.exp(arrays["log_tail_mass"][:, at].astype(np.float32))
        tolerance = np.expm1(step / 2 / temperature) + _MASS_TOLERANCE
        worst = np.abs(total_BT - 1).max()
        if not worst <= tolerance:
            yield problem("mass-not-one", "head_gaps", f"mass 1 within {tolerance:.4f} at T = {temperature:g}", worst)
