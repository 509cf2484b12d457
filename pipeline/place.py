"""Where a capture's shards go: into the cache's own folder, or into an object store.

In: the folder that a capture works in, and the store's address where there is one. Out: which shards are committed,
commits, and the seal. With a store, the folder keeps the manifest, the small files, the tables and the staged blocks,
and the store has all but the staged blocks; receipts and shards are in the store alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

from cache_spec.commit import PackedShard, publish_shard
from cache_spec.durable import make_folder, replace_file
from cache_spec.errors import CacheError, WouldLoseDataError
from cache_spec.layout import array_specs
from cache_spec.manifest import MANIFEST_NAME, Manifest, differences, sha256_hex
from cache_spec.receipts import SEAL_NAME, Receipt, make_seal, parse_seal, read_receipt, receipt_object
from cache_spec.store import ObjectStore
from cache_spec.store_commit import publish_to_store, require_conditions, stored_receipt, stored_receipts
from cache_spec.tables import table_paths
from pipeline import folder


class Place(Protocol):
    """What a capture needs of the place of its shards."""

    name: str
    """How summaries and messages call it."""

    def find(self, local: Manifest | None) -> Manifest | None:
        """The manifest of the cache that was begun there, ``local`` being that of the folder."""
        ...

    def begin(self, manifest: Manifest) -> None:
        """Make the place ready for the shards of the cache in the folder."""
        ...

    def is_finished(self, manifest: Manifest) -> bool:
        """Whether the cache is sealed and nothing of it is missing; contents of shards are not read."""
        ...

    def reopen(self, manifest: Manifest) -> list[int]:
        """Shards still to be made, after taking away the seal and the receipts that stand for nothing."""
        ...

    def receipt(self, manifest: Manifest, shard: int) -> Receipt | None:
        """The receipt of a committed shard."""
        ...

    def publish(self, manifest: Manifest, packed: PackedShard) -> Receipt:
        """Commit a packed shard; returns its receipt, an earlier one's if it was there first."""
        ...

    def seal(self, manifest: Manifest) -> None:
        """Seal a cache whose shards are all committed, and drop what was staged for it."""
        ...

    def summary(self, manifest: Manifest, *, captured: int) -> dict[str, Any]:
        """What a finished cache says for itself."""
        ...


def place_of(out: Path, store: str | None) -> Place:
    """The place of the shards of a capture that works in ``out``."""
    return InFolder(out) if store is None else InStore(out, ObjectStore(store))


class InFolder:
    """Shards lie beside the manifest."""

    def __init__(self, out: Path) -> None:
        self.out, self.name = out, str(out)

    def find(self, local: Manifest | None) -> Manifest | None:
        return local

    def begin(self, manifest: Manifest) -> None:
        pass

    def is_finished(self, manifest: Manifest) -> bool:
        return folder.is_finished(self.out, manifest)

    def reopen(self, manifest: Manifest) -> list[int]:
        return folder.reopen(self.out, manifest)

    def receipt(self, manifest: Manifest, shard: int) -> Receipt | None:
        return read_receipt(self.out, manifest, shard)

    def publish(self, manifest: Manifest, packed: PackedShard) -> Receipt:
        return publish_shard(self.out, manifest, packed)

    def seal(self, manifest: Manifest) -> None:
        folder.seal(self.out, manifest)

    def summary(self, manifest: Manifest, *, captured: int) -> dict[str, Any]:
        return folder.summary(self.out, manifest, captured=captured)


class InStore:
    """Shards, receipts and seal lie in an object store; the manifest and what it names lie there and in the folder."""

    def __init__(self, out: Path, store: ObjectStore) -> None:
        self.out, self.store, self.name = out, store, store.url

    def find(self, local: Manifest | None) -> Manifest | None:
        data = self.store.get(MANIFEST_NAME)
        if data is None:
            return local
        manifest = Manifest.from_json(data, f"{self.name}/{MANIFEST_NAME}")
        if local is not None and local.fingerprint != manifest.fingerprint:
            raise WouldLoseDataError(
                "other-cache",
                self.out,
                expected=f"what belongs to {self.name}",
                found="; ".join(differences(manifest, local)),
                hint="choose another folder, or another address",
            )
        if local != manifest:
            self._fetch(manifest, data)
        return manifest

    def _fetch(self, manifest: Manifest, data: bytes) -> None:
        """Take over a cache that was begun elsewhere; the manifest comes last."""
        names = [*manifest.files, *table_paths(manifest)]
        for name, content in zip(names, self.store.get_many(names), strict=True):
            place = f"{self.name}/{name}"
            if content is None:
                raise CacheError("missing-file", place, expected="what the manifest names")
            if name in manifest.files and sha256_hex(content) != manifest.files[name]:
                raise CacheError("file-mismatch", place, expected=manifest.files[name], found=sha256_hex(content))
            make_folder((self.out / name).parent)
            replace_file(self.out / name, content)
        replace_file(self.out / MANIFEST_NAME, data)

    def begin(self, manifest: Manifest) -> None:
        require_conditions(self.store)
        data = (self.out / MANIFEST_NAME).read_bytes()
        if self.store.get(MANIFEST_NAME) == data:
            return
        for name in [*manifest.files, *table_paths(manifest)]:
            self.store.put(name, (self.out / name).read_bytes())
        if self.store.put_new(MANIFEST_NAME, data) is None:
            hint = "run the same command again: it goes on with what is there"
            raise WouldLoseDataError("cache-in-use", self.name, found="another capture that began it", hint=hint)

    def is_finished(self, manifest: Manifest) -> bool:
        data = self.store.get(SEAL_NAME)
        if data is None:
            return False
        parse_seal(data, manifest, f"{self.name}/{SEAL_NAME}")
        return not self._missing(manifest) and folder.tables_whole(self.out, manifest)

    def reopen(self, manifest: Manifest) -> list[int]:
        missing = self._missing(manifest)
        if missing:
            stale = [receipt_object(shard) for shard, receipt in missing.items() if receipt is not None]
            self.store.delete([SEAL_NAME, *stale])
        return sorted(missing)

    def _missing(self, manifest: Manifest) -> dict[int, Receipt | CacheError | None]:
        """Shards that have no receipt, or one that stands for nothing."""
        sizes = dict(self.store.list())
        specs = array_specs(manifest)
        shards = range(manifest.blocks.num_shards)
        begun = [shard for shard in shards if receipt_object(shard) in sizes]
        missing: dict[int, Receipt | CacheError | None] = dict.fromkeys(shards)
        for shard, receipt in zip(begun, stored_receipts(self.store, manifest, begun), strict=True):
            if isinstance(receipt, Receipt) and all(
                sizes.get(specs[name].shard_path(shard)) == file.num_bytes for name, file in receipt.files.items()
            ):
                del missing[shard]
            else:
                missing[shard] = receipt
        return missing

    def receipt(self, manifest: Manifest, shard: int) -> Receipt | None:
        return stored_receipt(self.store, manifest, shard)

    def publish(self, manifest: Manifest, packed: PackedShard) -> Receipt:
        return publish_to_store(self.store, manifest, packed)

    def seal(self, manifest: Manifest) -> None:
        digest = hashlib.sha256()
        shards = range(manifest.blocks.num_shards)
        for shard, receipt in zip(shards, stored_receipts(self.store, manifest, shards), strict=True):
            if not isinstance(receipt, Receipt):
                raise receipt or CacheError("unfinished-cache", self.name, found=f"no receipt of shard {shard}")
            digest.update(receipt.to_json())
        self.store.put(SEAL_NAME, make_seal(manifest, digest.hexdigest()).to_json())
        folder.drop_staging(self.out)

    def summary(self, manifest: Manifest, *, captured: int) -> dict[str, Any]:
        sizes = dict(self.store.list())
        num_bytes = sum(sizes.get(path, 0) for path in _value_paths(manifest))
        return folder.counts(self.name, manifest, num_bytes, captured=captured)


def _value_paths(manifest: Manifest) -> list[str]:
    """Every object of a cache that holds values."""
    shards = range(manifest.blocks.num_shards)
    return [*(spec.shard_path(s) for spec in array_specs(manifest).values() for s in shards), *table_paths(manifest)]
