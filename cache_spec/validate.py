"""Find everything that is wrong with a cache, not just the first thing.

In: a cache folder. Out: problems, each with a stable kind, the place, what was expected and what was found. A
finished cache without problems is bit for bit what was committed, and its arrays mean what ``SPEC.md`` says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache_spec.commit import tokens_digest
from cache_spec.encodings.hidden import checked_scales
from cache_spec.encodings.topk import EMPTY_TAIL
from cache_spec.errors import CacheError
from cache_spec.layout import array_specs, target_arrays, zarr_metadata
from cache_spec.listing import list_cache
from cache_spec.manifest import MANIFEST_NAME, Manifest, sha256_hex
from cache_spec.masking import REPLACEMENTS, SELECTED, checked_masking, masking_errors
from cache_spec.reader import ShardFile
from cache_spec.receipts import (
    RECEIPTS_FOLDER,
    SEAL_NAME,
    Receipt,
    read_manifest,
    read_receipt,
    read_seal,
    receipt_object,
    receipts_digest,
    refuse_absurd,
    small_file_errors,
    unfinished,
)
from cache_spec.smallfile import read_small
from cache_spec.tables import read_table, table_paths
from cache_spec.targets import Array


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


def _nothing(shard: int) -> None:
    pass


def verify_cache(
    cache: Path, on_shard: Callable[[int], object] = _nothing, before_shard: Callable[[int], object] = _nothing
) -> list[Problem]:
    """All problems of a cache; an empty list means that it is finished and whole.

    Every byte of every file is read: digests first, then the meaning of each array. ``on_shard`` is called after
    each shard, for progress, and ``before_shard`` before its files are looked at.
    """
    problems = Problems()
    with problems.collecting():
        manifest = read_manifest(cache)
        refuse_absurd(cache, manifest)
        problems += (Problem(e.kind, e.place, e.expected, e.found) for e in small_file_errors(cache, manifest))
        problems += _metadata_problems(cache, manifest)
        for name in sorted(manifest.tables):
            with problems.collecting():
                read_table(cache, manifest, name)
        problems += (_stray(cache, path) for path in list_cache(cache, manifest).stray)
        tokens = hashlib.sha256()
        num_readable = num_tokens = 0
        for shard in range(manifest.blocks.num_shards):
            before_shard(shard)
            read = check_shard(cache, manifest, shard)
            problems += read.problems
            if "input_ids" in read.arrays:
                num_readable += "block_lengths" in read.arrays
                num_tokens += int(read.arrays.get("block_lengths", np.zeros(1)).sum())
                tokens.update(np.ascontiguousarray(read.arrays["input_ids"], dtype="<u4").tobytes())
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


def verify_names(cache: Path) -> list[Problem]:
    """The problems of a cache that show without opening a file of its shards: missing and stray ones.

    Manifest, seal and small files are read; receipts, tables and shards are looked for by their names alone.
    """
    problems = Problems()
    with problems.collecting():
        manifest = read_manifest(cache)
        refuse_absurd(cache, manifest)
        problems += (Problem(e.kind, e.place, e.expected, e.found) for e in small_file_errors(cache, manifest))
        problems += _metadata_problems(cache, manifest)
        for path in table_paths(manifest):
            if not (cache / path).is_file():
                problems.append(Problem("missing-table", str(cache / path), "a file", "none"))
        listing = list_cache(cache, manifest)
        problems += (_stray(cache, path) for path in listing.stray)
        for path in listing.missing:
            kind = "unfinished-cache" if path.startswith(f"{RECEIPTS_FOLDER}/") else "missing-shard"
            problems.append(Problem(kind, str(cache / path), "a file", "none"))
        if read_seal(cache, manifest) is None:
            raise unfinished(cache, manifest)
    return problems


def _stray(cache: Path, path: str) -> Problem:
    return Problem("unexpected-file", str(cache / path), "nothing here", None)


class ShardCheck(NamedTuple):
    """A shard that was read whole."""

    receipt: Receipt | None
    """None for a shard that was never committed, or whose receipt is broken."""
    arrays: dict[str, Array]
    """Those whose files are whole."""
    problems: list[Problem]


def check_shard(cache: Path, manifest: Manifest, shard: int) -> ShardCheck:
    """Read every byte of one shard; one that was never committed has no problems."""
    problems = Problems()
    receipt: Receipt | None = None
    arrays: dict[str, Array] = {}
    with problems.collecting():
        receipt = read_receipt(cache, manifest, shard)
        if receipt is not None:
            arrays, unreadable = _read_shard(cache, manifest, receipt)
            problems += unreadable
            problems += _meaning_problems(manifest, receipt, arrays, cache)
    return ShardCheck(receipt, arrays, problems)


def _metadata_problems(cache: Path, manifest: Manifest) -> Iterator[Problem]:
    """Metadata must say what the manifest implies: a stock reader believes it, whatever its digest."""
    for name, data in sorted(zarr_metadata(manifest).items()):
        path = cache / name
        if name not in manifest.files:
            yield Problem("missing-file", str(path), "listed in the manifest", None)
            continue
        try:
            content = read_small(path)
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


def known_files(manifest: Manifest) -> set[str]:
    """Every file that a finished cache has."""
    shards = range(manifest.blocks.num_shards)
    known = {MANIFEST_NAME, SEAL_NAME, *manifest.files, *table_paths(manifest), *map(receipt_object, shards)}
    return known | {spec.shard_path(shard) for spec in array_specs(manifest).values() for shard in shards}


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
    geometry = manifest.geometry

    def problem(kind: str, name: str, expected: object, found: object) -> Problem:
        return Problem(
            kind, str(cache / array_specs(manifest)[name].shard_path(receipt.shard)), str(expected), str(found)
        )

    if "input_ids" in arrays:
        if arrays["input_ids"].max() >= geometry.vocab_size:
            found = arrays["input_ids"].max()
            yield problem("id-out-of-range", "input_ids", f"ids below {geometry.vocab_size}", found)
        if tokens_digest(arrays["input_ids"]) != receipt.tokens_sha256:
            yield problem("tokens-mismatch", "input_ids", receipt.tokens_sha256, "another digest")
    if "block_lengths" in arrays:
        lengths = arrays["block_lengths"]
        if not 1 <= lengths.min() <= lengths.max() <= manifest.blocks.block_tokens:
            yield problem("bad-length", "block_lengths", f"1 to {manifest.blocks.block_tokens}", lengths.tolist())
        is_last = receipt.first_block + receipt.num_blocks == manifest.blocks.num_blocks
        whole = lengths[:-1] if is_last and manifest.blocks.last_block == "keep" else lengths
        if manifest.blocks.last_block != "each" and (whole < manifest.blocks.block_tokens).any():
            yield problem("bad-length", "block_lengths", "full blocks but for a kept last one", lengths.tolist())
    for name in ("hidden", "block_loss", "block_entropy"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            yield problem("non-finite", name, "finite values", "NaN or infinity")
    problems = Problems()
    if "hidden_scale" in arrays:
        with problems.collecting():
            place = cache / array_specs(manifest)["hidden_scale"].shard_path(receipt.shard)
            checked_scales(arrays["hidden_scale"], place)
    yield from problems
    yield from _masking_problems(manifest, arrays, f"{cache} shard {receipt.shard}")
    stored = {name: arrays[name] for name in target_arrays(manifest) if name in arrays}
    if len(stored) == len(target_arrays(manifest)):
        for error in manifest.encoding.check(stored, geometry, f"{cache} shard {receipt.shard}"):
            yield Problem(error.kind, error.place, error.expected, error.found)
    has_no_tail = manifest.imported is not None and manifest.imported.logprobs == "renormalised"
    if has_no_tail and "tail_log_odds" in stored and (stored["tail_log_odds"] != EMPTY_TAIL).any():
        yield problem("bad-tail-mass", "tail_log_odds", "empty tails of renormalised heads", "others")


def _masking_problems(manifest: Manifest, arrays: dict[str, Array], place: str) -> Iterator[Problem]:
    names = ("input_ids", "block_lengths", SELECTED, REPLACEMENTS)
    if manifest.masking is None or not arrays.keys() >= set(names):
        return
    problems = Problems()
    ids_BT, lengths_B, selected_BT, replacements_BT = (arrays[name] for name in names)
    with problems.collecting():
        checked_masking(selected_BT, replacements_BT, manifest.teacher.vocab_size, place)
    yield from problems
    for error in masking_errors(manifest.masking, ids_BT, lengths_B, selected_BT, replacements_BT, place):
        yield Problem(error.kind, error.place, error.expected, error.found)
