"""``kdpipe pull``: a finished cache comes from a store into a folder.

In: the address of a cache and a folder. Out: the same cache there, each file compared with its digest before it gets
its name; the seal comes last, so that a pull that was killed leaves an unfinished cache, and the same command goes on.
Nothing that a store lists is believed: every name follows from the manifest.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cache_spec.commit import PackedShard, publish_shard
from cache_spec.durable import make_folder, publish_new, replace_file, sync_folder, writing
from cache_spec.errors import CacheError, WouldLoseDataError
from cache_spec.layout import array_specs
from cache_spec.listing import whole_shards
from cache_spec.manifest import MANIFEST_NAME, Manifest, differences, sha256_hex
from cache_spec.reader import CacheReader
from cache_spec.receipts import (
    RECEIPTS_FOLDER,
    SEAL_NAME,
    is_inside,
    parse_receipt,
    parse_seal,
    receipt_object,
    small_file_errors,
)
from cache_spec.store import ReadableStore, open_store
from cache_spec.tables import read_table, table_names
from pipeline import folder
from pipeline.transfer import Item, check, in_batches, shard_items

_AT_ONCE = 4
"""Shards that are in memory at the same time."""
_RECEIPTS_AT_ONCE = 256


def pull(url: str, out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Bring a finished cache; returns what was brought.

    Raises CacheError for what is missing, unfinished or damaged at the store, WouldLoseDataError for a folder that
    holds something else, BadInputError ``cannot-write``.
    """
    store = open_store(url)
    manifest_bytes = store.get(MANIFEST_NAME)
    if manifest_bytes is None:
        raise CacheError("not-a-cache", store.url, expected=f"a folder with {MANIFEST_NAME}")
    manifest = Manifest.from_json(manifest_bytes, f"{store.url}/{MANIFEST_NAME}")
    for name in manifest.files:
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or not is_inside(name) or name in (MANIFEST_NAME, SEAL_NAME):
            raise CacheError("unsafe-path", f"{store.url}/{MANIFEST_NAME}: {name}", expected="a path inside the cache")
    seal_bytes = store.get(SEAL_NAME)
    if seal_bytes is None:
        hint = "finish it where it is made, then pull it"
        raise CacheError("unfinished-cache", store.url, expected=f"a cache with {SEAL_NAME}", hint=hint)
    expected = parse_seal(seal_bytes, manifest, f"{store.url}/{SEAL_NAME}").receipts_sha256
    with folder.exclusive(out) as there:
        if there is not None and there.to_json() != manifest_bytes:
            told = differences(there, manifest)
            found = told[0] if told else "the same settings, captured another time"
            raise WouldLoseDataError("other-cache", out, expected=manifest.fingerprint[:12], found=found)
        pulled = _Pull(store, out, manifest, quiet)
        # Before anything else: it tells a pull that was killed from a folder of somebody's.
        make_folder(out / folder.STAGING_NAME)
        if there is None:
            replace_file(out / MANIFEST_NAME, manifest_bytes)
        make_folder(out / RECEIPTS_FOLDER)
        pulled.small_files()
        pulled.tables()
        digest = pulled.shards()
        if digest != expected:
            raise CacheError("seal-mismatch", f"{store.url}/{SEAL_NAME}", expected=expected, found=digest)
        replace_file(out / SEAL_NAME, seal_bytes)
        folder.drop_staging(out)
        CacheReader.open(out)
    facts = {"cache": str(out), "url": store.url, "fingerprint": manifest.fingerprint}
    return {**facts, "shards": manifest.blocks.num_shards, **pulled.counts}


def describe_pull(facts: dict[str, Any]) -> list[str]:
    """Lines for people."""
    brought = f"{facts['received_shards']:,} of {facts['shards']:,} shards, {facts['received_bytes']:,} bytes received"
    return [f"{facts['cache']}: {brought} from {facts['url']}"]


class _Pull:
    def __init__(self, store: ReadableStore, out: Path, manifest: Manifest, quiet: bool) -> None:
        self.store, self.out, self.manifest, self.quiet = store, out, manifest, quiet
        self.specs = array_specs(manifest)
        self.counts = {"received_shards": 0, "received_bytes": 0}

    def small_files(self) -> None:
        """Bring the small files that are missing or changed."""
        bad = {str(error.place) for error in small_file_errors(self.out, self.manifest)}
        names = [name for name in sorted(self.manifest.files) if {name, str(self.out / name)} & bad]
        for name, data in zip(names, self.store.get_many(names), strict=True):
            if data is None:
                raise CacheError("missing-file", f"{self.store.url}/{name}")
            check(Item(name, len(data), self.manifest.files[name]), len(data), sha256_hex(data), self._place(name))
            self._receive(data)
            make_folder((self.out / name).parent)
            replace_file(self.out / name, data)

    def tables(self) -> None:
        """Bring the tables that are missing or changed; each waits beside the cache until it can be compared whole."""
        staging = self.out / folder.STAGING_NAME
        for table, names in table_names(self.manifest).items():
            if self._has_table(self.out, table):
                continue
            for name in names:
                make_folder((staging / name).parent)
                data = self.store.get(name)
                if data is None:
                    raise CacheError("missing-table", self._place(name))
                self._receive(data)
                replace_file(staging / name, data)
            try:
                read_table(staging, self.manifest, table)
            except CacheError as error:
                place = self._place(Path(error.place).relative_to(staging).as_posix())
                raise CacheError(error.kind, place, expected=error.expected, found=error.found) from None
            for name in names:
                make_folder((self.out / name).parent)
                with writing(self.out / name):
                    (self.out / name).unlink(missing_ok=True)
                publish_new(staging / name, self.out / name)
                sync_folder((self.out / name).parent)

    def shards(self) -> str:
        """Bring the shards that are missing or cut; the digest of all receipts at the store."""
        whole = whole_shards(self.out, self.manifest)
        num_shards = self.manifest.blocks.num_shards
        if len(whole) < num_shards:
            # A seal says that nothing is missing.
            folder.take_out(self.out, [])
        digest = hashlib.sha256()
        with tqdm(total=num_shards, unit="shard", desc="pull", disable=self.quiet or None) as bar:
            for shards in in_batches(range(num_shards), _RECEIPTS_AT_ONCE):
                receipts: list[bytes] = []
                for shard, data in zip(shards, self.store.get_many(map(receipt_object, shards)), strict=True):
                    if data is None:
                        raise CacheError("unfinished-cache", self._place(receipt_object(shard)), expected="a receipt")
                    digest.update(data)
                    receipts.append(data)
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    for num_bytes in pool.map(self._shard, shards, receipts, [shard in whole for shard in shards]):
                        self.counts["received_shards"] += num_bytes > 0
                        self.counts["received_bytes"] += num_bytes
                        bar.update()
        return digest.hexdigest()

    def _shard(self, shard: int, data: bytes, is_whole: bool) -> int:
        """Bring one shard, unless it is there; bytes that were received for it."""
        name = receipt_object(shard)
        receipt = parse_receipt(data, self.manifest, shard, self._place(name))
        if is_whole:
            if (self.out / name).read_bytes() != data:
                raise WouldLoseDataError("other-cache", self.out / name, found="a shard that was captured another time")
            return 0
        items = shard_items(self.specs, receipt)
        files = {}
        for array, item, content in zip(self.specs, items, self.store.get_many([i.name for i in items]), strict=True):
            if content is None:
                raise CacheError("missing-shard", self._place(item.name))
            check(item, len(content), sha256_hex(content), self._place(item.name))
            files[array] = content
        with writing(self.out / name):
            # What is there of this shard was cut: its receipt would keep the whole one out.
            (self.out / name).unlink(missing_ok=True)
        for spec in self.specs.values():
            make_folder((self.out / spec.shard_path(shard)).parent)
        publish_shard(self.out, self.manifest, PackedShard(receipt, files))
        return receipt.num_bytes

    def _has_table(self, cache: Path, name: str) -> bool:
        try:
            read_table(cache, self.manifest, name)
        except CacheError:
            return False
        return True

    def _place(self, name: str) -> str:
        return f"{self.store.url}/{name}"

    def _receive(self, data: bytes) -> None:
        self.counts["received_bytes"] += len(data)
