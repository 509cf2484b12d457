"""``kdpipe push``: a finished cache goes where others can read it.

In: a cache folder and the address of a store. Out: the same files there. A shard's files come before its receipt, then
come tables, small files, the manifest and the seal: until then there is no cache, so that a reader sees all of it or
nothing. What is there already is not sent again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cache_spec.commit import PackedShard
from cache_spec.errors import BadInputError, WouldLoseDataError
from cache_spec.manifest import MANIFEST_NAME
from cache_spec.receipts import SEAL_NAME, receipt_object
from cache_spec.store import ObjectStore
from cache_spec.store_commit import is_claim, keeps_conditions, publish_to_store
from pipeline.transfer import Finished, Item, in_batches, refuse_another

_AT_ONCE = 4
"""Shards that are sent at the same time, and are in memory."""
_RECEIPTS_AT_ONCE = 256
Sent = tuple[int, bool]
"""Size of an object, and whether it was sent or there."""


def push(cache: Path, url: str, *, private: bool = False, dry_run: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Send a finished cache; returns what was sent and what was there. With ``dry_run`` nothing is sent.

    Raises CacheError for a cache that is not whole, WouldLoseDataError where another cache lies.
    """
    whole = Finished.open(cache)
    if url.startswith("hf://"):
        from pipeline.push_hub import push_to_hub

        return push_to_hub(whole, url, private=private, dry_run=dry_run, quiet=quiet)
    if private:
        raise BadInputError("bad-setting", "--private", expected="an address on the Hub, hf://…", found=url)
    return _Push(whole, ObjectStore(url), dry_run=dry_run, quiet=quiet).run()


def describe_push(facts: dict[str, Any]) -> list[str]:
    """Lines for people."""
    verb = "to send" if facts["dry_run"] else "sent"
    line = f"{facts['url']}: {facts['sent_objects']:,} objects of {facts['sent_bytes']:,} bytes {verb}"
    return [f"{line}, {facts['objects']:,} objects of {facts['bytes']:,} bytes in all"]


class _Push:
    def __init__(self, cache: Finished, store: ObjectStore, *, dry_run: bool, quiet: bool) -> None:
        self.cache, self.store, self.dry_run, self.quiet = cache, store, dry_run, quiet
        self.there: dict[str, int] = {}
        """Name to size of what the store holds."""
        self.keeps_conditions = False
        self.counts = {"objects": 0, "bytes": 0, "sent_objects": 0, "sent_bytes": 0}

    def run(self) -> dict[str, Any]:
        has_manifest, has_seal = refuse_another(self.store, self.cache)
        self.there = {listed.name: listed.num_bytes for listed in self.store.list()}
        # What is sealed has nothing to be claimed.
        if not self.dry_run and not has_seal:
            self.keeps_conditions = keeps_conditions(self.store)
        blocks = self.cache.manifest.blocks
        with tqdm(total=blocks.num_shards, unit="shard", desc="push", disable=self.quiet or None) as bar:
            for shards in in_batches(range(blocks.num_shards), _RECEIPTS_AT_ONCE):
                with ThreadPoolExecutor(_AT_ONCE) as pool:
                    for sent in pool.map(self._shard, shards, self._receipts(shards)):
                        self._count(sent)
                        bar.update()
        # Without a manifest nothing says that a file of equal size is this one.
        there = self.there if has_manifest else {}
        self._count([self._put_missing(item, there) for item in self.cache.other_items()])
        for name, data, is_there in (
            (MANIFEST_NAME, self.cache.manifest_bytes, has_manifest),
            (SEAL_NAME, self.cache.seal_bytes, has_seal),
        ):
            if not is_there:
                self._put_new(name, data)
            self._count([(len(data), not is_there)])
        facts = {"cache": str(self.cache.path), "url": self.store.url, "fingerprint": self.cache.manifest.fingerprint}
        return {**facts, **self.counts, "dry_run": self.dry_run}

    def _receipts(self, shards: list[int]) -> Iterator[bytes | None]:
        """What the store holds of these shards' receipts; a claim is none."""
        names = [receipt_object(shard) for shard in shards]
        known = [name for name in names if name in self.there]
        found = dict(zip(known, self.store.get_many(known), strict=True))
        return iter([None if is_claim(data := found.get(name)) else data for name in names])

    def _shard(self, shard: int, receipt: bytes | None) -> list[Sent]:
        """Send what is missing of a shard, its receipt last."""
        name, ours = receipt_object(shard), (self.cache.path / receipt_object(shard)).read_bytes()
        if receipt is not None and receipt != ours:
            raise self._other(name)
        items = self.cache.shard_items(shard)
        if receipt is not None:
            return [*(self._put_missing(item, self.there) for item in items), (len(ours), False)]
        if self.keeps_conditions:
            # As a capture commits it, which may be writing here too.
            files = {
                name: b"".join(self.cache.pieces(item)) for name, item in zip(self.cache.specs, items, strict=True)
            }
            packed = PackedShard(self.cache.receipt(shard), files)
            if publish_to_store(self.store, self.cache.manifest, packed) != packed.receipt:
                raise self._other(name)
            return [*((item.num_bytes, True) for item in items), (len(ours), True)]
        sent = [self._put_missing(item, {}) for item in items]
        self._put_new(name, ours)
        return [*sent, (len(ours), True)]

    def _put_missing(self, item: Item, there: dict[str, int]) -> Sent:
        if there.get(item.name) == item.num_bytes:
            return item.num_bytes, False
        if not self.dry_run:
            self.store.put(item.name, b"".join(self.cache.pieces(item)))
        return item.num_bytes, True

    def _put_new(self, name: str, data: bytes) -> None:
        if not self.dry_run and self.store.put_new(name, data) is None:
            raise self._other(name)

    def _other(self, name: str) -> WouldLoseDataError:
        hint = "push to another address, or delete what is there"
        return WouldLoseDataError("other-cache", f"{self.store.url}/{name}", found="another content", hint=hint)

    def _count(self, objects: Iterable[Sent]) -> None:
        for num_bytes, is_sent in objects:
            self.counts["objects"] += 1
            self.counts["bytes"] += num_bytes
            self.counts["sent_objects"] += is_sent
            self.counts["sent_bytes"] += num_bytes * is_sent
