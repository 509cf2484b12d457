"""A cache's folder while the cache is being made: held by one process, resumable, nothing of others touched.

In: a folder, and the manifest, small files and tables of a cache. Out: a created or restored cache whose missing shards
are known, and at the end its seal and summary. Capture and transcoding both make their caches here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cache_spec.commit import PUBLISH_LOCK, create_cache
from cache_spec.durable import TEMPORARY_PREFIX, make_folder, remove_leftovers, replace_file, taken_lock, writing
from cache_spec.errors import CacheError, WouldLoseDataError
from cache_spec.layout import array_specs, zarr_metadata
from cache_spec.listing import SIZES_NAME, missing_receipts, note_sizes, sealed_sizes, sizes_on_disk, whole_shards
from cache_spec.manifest import MANIFEST_NAME, Manifest, canonical_json, sha256_hex
from cache_spec.receipts import (
    RECEIPTS_FOLDER,
    SEAL_NAME,
    Seal,
    read_manifest,
    read_seal,
    receipt_path,
    small_file_errors,
    write_seal,
)
from cache_spec.tables import read_table, table_digests, table_paths, write_tables
from cache_spec.targets import Array

LOCK_NAME = ".lock"
STAGING_NAME = ".kdpipe-staging"
_OWN_NAMES = "own-names.json"

Tables = Mapping[str, Array]


@contextmanager
def exclusive(out: Path) -> Iterator[Manifest | None]:
    """Hold the folder for this process; gives the manifest of the cache in it, None where there is none yet.

    Raises WouldLoseDataError for a folder in use, or one that holds something else.
    """
    if out.exists() and not out.is_dir():
        raise WouldLoseDataError("not-a-folder", out)
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    # A run killed before its manifest leaves only what it had named before, beside what it staged.
    ours = {LOCK_NAME, PUBLISH_LOCK, STAGING_NAME}
    if STAGING_NAME in names:
        ours |= {*_named(out), *(name for name in names if name.startswith(TEMPORARY_PREFIX))}
    foreign = names - ours
    if foreign and MANIFEST_NAME not in names:
        raise WouldLoseDataError("not-a-cache", out, expected="an empty folder or a cache", found=min(foreign))
    make_folder(out)
    lock = taken_lock(out, LOCK_NAME, "cache-in-use")
    try:
        manifest = read_manifest(out) if (out / MANIFEST_NAME).exists() else None
        _remove_leftovers(out, _named(out) if manifest is None else _names(manifest))
        yield manifest
    finally:
        lock.release()


def create(out: Path, manifest: Manifest, files: Mapping[str, bytes], tables: Tables) -> Manifest:
    """Start a cache: small files (path to content), metadata, tables, and then the manifest, which is returned."""
    # What a run killed before its manifest left may be of other settings; it is nobody's data yet.
    for name in _named(out):
        path = out / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    make_folder(out / STAGING_NAME)
    manifest = manifest.model_copy(update={"files": {name: sha256_hex(data) for name, data in files.items()}})
    replace_file(out / STAGING_NAME / _OWN_NAMES, canonical_json(sorted(_names(manifest))))
    _write(out, files)
    return create_cache(out, manifest, tables)


def restore(out: Path, manifest: Manifest, files: Callable[[], Mapping[str, bytes]]) -> None:
    """Write missing or changed small files again; CacheError if they cannot be made the same."""
    if next(small_file_errors(out, manifest), None) is None:
        return
    _write(out, {**files(), **zarr_metadata(manifest)})
    for error in small_file_errors(out, manifest):
        raise error


def restore_tables(out: Path, manifest: Manifest, tables: Callable[[], Tables]) -> None:
    """Make missing or changed tables again; CacheError ``table-mismatch`` if they do not come out the same."""
    if tables_whole(out, manifest):
        return
    made = tables()
    digests = table_digests(made)
    for name, digest in manifest.tables.items():
        if digests[name] != digest:
            hint = "put the table back from a copy of the cache, or choose another --out"
            raise CacheError(
                "table-mismatch", out / name, expected=digest, found=f"{digests[name]}, made again", hint=hint
            )
    write_tables(out, manifest, made)


def tables_whole(out: Path, manifest: Manifest) -> bool:
    """Whether every table is there with the values that the manifest names."""
    try:
        read_tables(out, manifest)
    except CacheError:
        return False
    return True


def read_tables(out: Path, manifest: Manifest) -> dict[str, Array]:
    """Every table of a cache as stored, by name; CacheError for one that is missing or changed."""
    return {name: read_table(out, manifest, name) for name in sorted(manifest.tables)}


def is_finished(out: Path, manifest: Manifest) -> bool:
    """Whether the cache is sealed and nothing of it is missing or cut; contents of shards are not read."""
    try:
        seal = read_seal(out, manifest)
        if seal is None or missing_receipts(out, manifest) or not tables_whole(out, manifest):
            return False
        sizes = _sealed_sizes(out, manifest, seal)
    except CacheError:
        return False
    return np.array_equal(sizes, sizes_on_disk(out, manifest, range(len(sizes))))


def _sealed_sizes(out: Path, manifest: Manifest, seal: Seal) -> Array:
    sizes = sealed_sizes(out, manifest, seal)
    return note_sizes(out, manifest, seal) if sizes is None else sizes


def missing_shards(out: Path, manifest: Manifest) -> list[int]:
    """Shards still to be made; a receipt whose files are gone or cut counts for nothing."""
    return sorted(set(range(manifest.blocks.num_shards)) - whole_shards(out, manifest))


def reopen(out: Path, manifest: Manifest) -> list[int]:
    """Shards still to be made, after taking away the seal and the receipts that stand for nothing."""
    todo = missing_shards(out, manifest)
    take_out(out, todo)
    return todo


def take_out(out: Path, shards: Iterable[int]) -> None:
    """Take away the seal and the receipts of shards: they do not exist any more."""
    with writing(out):
        for stale in [out / SEAL_NAME, out / SIZES_NAME, *(receipt_path(out, shard) for shard in shards)]:
            stale.unlink(missing_ok=True)


def seal(out: Path, manifest: Manifest) -> None:
    """Seal a cache whose shards are all committed, and drop what was staged for it and what killed workers left."""
    _remove_leftovers(out, _names(manifest))
    note_sizes(out, manifest, write_seal(out, manifest))
    drop_staging(out)


def drop_staging(out: Path) -> None:
    """Delete what was staged for a cache that is finished."""
    shutil.rmtree(out / STAGING_NAME, ignore_errors=True)


def summary(cache: Path, manifest: Manifest, *, captured: int) -> dict[str, Any]:
    """What a finished cache says for itself."""
    seal = read_seal(cache, manifest)
    assert seal is not None
    num_bytes = int(_sealed_sizes(cache, manifest, seal).sum())
    num_bytes += sum((cache / path).stat().st_size for path in table_paths(manifest))
    return counts(str(cache), manifest, num_bytes, captured=captured)


def counts(name: str, manifest: Manifest, num_bytes: int, *, captured: int) -> dict[str, Any]:
    """What is said of a finished cache called ``name``, whose values take ``num_bytes``."""
    return {
        "cache": name,
        "fingerprint": manifest.fingerprint,
        "encoding": manifest.encoding.name,
        "documents": manifest.corpus.num_documents,
        "tokens": manifest.corpus.num_tokens,
        "blocks": manifest.blocks.num_blocks,
        "shards": manifest.blocks.num_shards,
        "shards_captured_now": captured,
        "bytes": num_bytes,
        "bytes_per_token": round(num_bytes / manifest.corpus.num_tokens, 2),
    }


def _remove_leftovers(out: Path, names: Iterable[str]) -> None:
    remove_leftovers([out, *(out / name for name in names if (out / name).is_dir())])


def _names(manifest: Manifest) -> set[str]:
    """Names in a cache's folder of everything that is written before its manifest, and of its receipts."""
    paths = [*array_specs(manifest), *manifest.tables, *manifest.files, RECEIPTS_FOLDER, "zarr.json"]
    return {path.split("/")[0] for path in paths}


def _named(out: Path) -> list[str]:
    """Names that a run wrote down before it made files of these names; none where it did not come so far."""
    try:
        names = json.loads((out / STAGING_NAME / _OWN_NAMES).read_bytes())
    except (OSError, ValueError):
        return []
    return [name for name in names if isinstance(name, str) and "/" not in name and name not in ("", ".", "..")]


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        make_folder((out / name).parent)
        replace_file(out / name, data)
