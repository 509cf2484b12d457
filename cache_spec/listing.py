"""What lies in a cache's folders, by name and by size: no shard file is opened, and each folder is gone through once.

In: a cache and its manifest. Out: names that are missing or too many, and sizes beside those of the receipts. The
latter are noted for a sealed cache in one file, ``.sizes``, which is no part of it and can be made again at any time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache_spec.durable import replace_file
from cache_spec.errors import CacheError
from cache_spec.layout import array_specs
from cache_spec.manifest import MANIFEST_NAME, Manifest
from cache_spec.receipts import RECEIPTS_FOLDER, SEAL_NAME, Receipt, Seal, read_receipts, receipt_name
from cache_spec.tables import table_paths
from cache_spec.targets import Array

SIZES_NAME = ".sizes"
_DIGEST_BYTES = 32


class Listing(NamedTuple):
    """What differs between a cache's folders and what should lie in them, as paths inside the cache."""

    missing: list[str]
    """Shard files and receipts that are not there."""
    stray: list[str]
    """Files that no rule accounts for; hidden ones (locks, leftovers of killed runs) are nobody's data."""


def list_cache(cache: Path, manifest: Manifest) -> Listing:
    """Compare the names in every folder of a cache with those that it should hold."""
    known = {MANIFEST_NAME, SEAL_NAME, *manifest.files, *table_paths(manifest)}
    shard_names = _shard_names(manifest)
    listing = Listing([], [])

    def note_strays(folder: str, names: Iterable[str]) -> None:
        paths = (f"{folder}/{name}".removeprefix("./") for name in sorted(names) if not name.startswith("."))
        listing.stray.extend(path for path in paths if path not in known)

    for top, folders, names in os.walk(cache):
        inside = os.path.relpath(top, cache)
        links = [name for name in folders if os.path.islink(os.path.join(top, name))]
        note_strays(inside, [*names, *links])
        of_shards = shard_names if inside == "." else {}
        folders[:] = [name for name in folders if not (name.startswith(".") or name in of_shards)]
    for folder, wanted in sorted(shard_names.items()):
        found = _names(cache / folder)
        listing.missing.extend(f"{folder}/{name}" for name in sorted(wanted - found))
        note_strays(folder, found - wanted)
    return listing


def whole_shards(cache: Path, manifest: Manifest) -> set[int]:
    """Shards whose receipt is valid and whose files are all there with their sizes; contents are not read."""
    receipts = {shard: _sizes(receipt) for shard, receipt in read_receipts(cache, manifest) if receipt is not None}
    if not receipts:
        return set()
    shards = np.array(sorted(receipts))
    expected = np.array([receipts[shard] for shard in shards.tolist()])
    return set(shards[(sizes_on_disk(cache, manifest, shards) == expected).all(1)].tolist())


def missing_receipts(cache: Path, manifest: Manifest) -> bool:
    """Whether a shard has none, by their names."""
    names = {receipt_name(shard) for shard in range(manifest.blocks.num_shards)}
    return not names <= _names(cache / RECEIPTS_FOLDER)


def sealed_sizes(cache: Path, manifest: Manifest, seal: Seal) -> Array | None:
    """Bytes of each shard file of a sealed cache, [shards, arrays in order of names]; None if they are not noted."""
    try:
        data = (cache / SIZES_NAME).read_bytes()
    except OSError:
        return None
    shape = manifest.blocks.num_shards, len(array_specs(manifest))
    digest, values = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if len(values) != 8 * shape[0] * shape[1] or digest != _digest(values, seal):
        return None
    return np.frombuffer(values, "<i8").reshape(shape)


def note_sizes(cache: Path, manifest: Manifest, seal: Seal) -> Array:
    """Read every receipt of a sealed cache, write ``.sizes``, and return what ``sealed_sizes`` then does.

    Raises CacheError ``unfinished-cache`` where a receipt is missing.
    """
    sizes = np.empty((manifest.blocks.num_shards, len(array_specs(manifest))), "<i8")
    for shard, receipt in read_receipts(cache, manifest):
        if receipt is None:
            raise CacheError("unfinished-cache", cache / RECEIPTS_FOLDER / receipt_name(shard))
        sizes[shard] = _sizes(receipt)
    values = sizes.tobytes()
    replace_file(cache / SIZES_NAME, _digest(values, seal) + values)
    return sizes


def sizes_on_disk(cache: Path, manifest: Manifest, shards: Iterable[int]) -> Array:
    """Bytes of the files of ``shards``, [shards, arrays in order of names]; -1 for one that is not there."""
    shards = list(shards)
    names: dict[int, list[str]] = {}
    columns = []
    for name, spec in sorted(array_specs(manifest).items()):
        num_axes = len(spec.row_shape)
        if num_axes not in names:
            names[num_axes] = [spec.shard_name(shard) for shard in shards]
        columns.append(_sizes_in(cache / name, names[num_axes]))
    return np.stack(columns, 1)


def _sizes_in(folder: Path, names: list[str]) -> Array:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return np.full(len(names), -1)
    stat = os.stat
    try:
        try:
            return np.array([stat(name, dir_fd=handle, follow_symlinks=False).st_size for name in names])
        except OSError:  # asked for at each name, this would cost all of them time
            return np.array([_size(name, handle) for name in names])
    finally:
        os.close(handle)


def _size(name: str, folder: int) -> int:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
    except OSError:
        return -1


def _sizes(receipt: Receipt) -> list[int]:
    return [file.num_bytes for _, file in sorted(receipt.files.items())]


def _digest(values: bytes, seal: Seal) -> bytes:
    return sha256(seal.receipts_sha256.encode() + values).digest()


def _shard_names(manifest: Manifest) -> dict[str, set[str]]:
    """Names of all shards' files in each folder; those of equally many axes are equal."""
    shards = range(manifest.blocks.num_shards)
    by_axes: dict[int, set[str]] = {}
    folders = {RECEIPTS_FOLDER: {receipt_name(shard) for shard in shards}}
    for name, spec in array_specs(manifest).items():
        num_axes = len(spec.row_shape)
        if num_axes not in by_axes:
            by_axes[num_axes] = {spec.shard_name(shard) for shard in shards}
        folders[name] = by_axes[num_axes]
    return folders


def _names(folder: Path) -> set[str]:
    """Of a folder that is none there are none; a link to one is none either."""
    try:
        return set() if folder.is_symlink() else set(os.listdir(folder))
    except OSError:
        return set()
