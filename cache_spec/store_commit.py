"""Commit one shard in an object store, where there is no lock: a claim, every array's object, then the receipt.

In: a packed shard. Out: its objects and, in the claim's place, its receipt. Any writer may be killed, or sleep and
wake up, between any two requests. The claim says whose shard it is; each write is conditional on what was seen there
before, and a writer that finds other bytes than its own looks at its claim between seeing and replacing them. So no
writer that lost its claim changes what a later one wrote, and none but the last claimant's receipt is accepted.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator

from cache_spec.commit import PackedShard
from cache_spec.errors import BadInputError, CacheError, KdpipeError
from cache_spec.layout import array_specs
from cache_spec.manifest import Manifest, canonical_json
from cache_spec.receipts import Receipt, parse_receipt, receipt_object
from cache_spec.store import ObjectStore, Version

_CLAIM = b'{"claim":'


def is_claim(data: bytes | None) -> bool:
    """Whether what lies under a receipt's name is only a claim."""
    return data is not None and data.startswith(_CLAIM)


def stored_receipt(store: ObjectStore, manifest: Manifest, shard: int) -> Receipt | None:
    """The receipt of a shard, checked against the manifest; None if there is none, or only a claim."""
    return _receipt(store, manifest, shard, store.get(receipt_object(shard)))


def stored_receipts(
    store: ObjectStore, manifest: Manifest, shards: Iterable[int]
) -> Iterator[Receipt | CacheError | None]:
    """The receipts of shards in their order; an error in the place of one that is broken, None for one that is not."""
    shards = list(shards)
    for shard, data in zip(shards, store.get_many(map(receipt_object, shards)), strict=True):
        try:
            yield _receipt(store, manifest, shard, data)
        except CacheError as error:
            yield error


def _receipt(store: ObjectStore, manifest: Manifest, shard: int, data: bytes | None) -> Receipt | None:
    if data is None or is_claim(data):
        return None
    return parse_receipt(data, manifest, shard, f"{store.url}/{receipt_object(shard)}")


def publish_to_store(store: ObjectStore, manifest: Manifest, packed: PackedShard) -> Receipt:
    """Commit a packed shard; returns its receipt, an earlier one's if it was there first.

    Raises KdpipeError ``shard-taken`` when another writer claimed the shard meanwhile, and has not committed it.
    """
    if _committed(store, manifest, packed):
        return packed.receipt
    earlier = stored_receipt(store, manifest, packed.receipt.shard)
    if earlier is None:
        place = f"{store.url} shard {packed.receipt.shard}"
        hint = "run the same command again: it takes what the other one made"
        raise KdpipeError("shard-taken", place, found="another writer of this shard", hint=hint)
    return earlier


def _committed(store: ObjectStore, manifest: Manifest, packed: PackedShard) -> bool:
    """Claim, write and commit; False as soon as the shard is another's."""
    name = receipt_object(packed.receipt.shard)
    claim = canonical_json({"claim": secrets.token_hex(16)})
    claimed = store.put_new(name, claim)
    if claimed is None:
        found = store.get_versioned(name)
        if found is None or not is_claim(found[0]):
            return False
        claimed = store.replace(name, claim, found[1])
        if claimed is None:
            return False
    for array, spec in array_specs(manifest).items():
        path, data = spec.shard_path(packed.receipt.shard), packed.files[array]
        if store.put_new(path, data) is not None:
            continue
        # What a killed writer left. Seen first, then the claim, then replaced as seen: the order keeps sleepers out.
        seen = store.head(path)
        if store.get(name) != claim or seen is None or store.replace(path, data, seen) is None:
            return False
    return store.replace(name, packed.receipt.to_json(), claimed) is not None


def require_conditions(store: ObjectStore) -> None:
    """BadInputError ``no-conditions`` for a store that writes whatever is there already."""
    if not keeps_conditions(store):
        expected = "a store that puts an object only where there is none, or the one that was seen"
        raise BadInputError("no-conditions", store.url, expected=expected, hint="capture to a folder, then push it")


def keeps_conditions(store: ObjectStore) -> bool:
    """Whether a store does not write whatever is there already: tried with an object that is taken away again."""
    name = f".probe-{secrets.token_hex(8)}"
    try:
        first = store.put_new(name, b"1")
        kept = first is not None and store.put_new(name, b"2") is None
        second = store.replace(name, b"3", first or Version(None, None))
        return kept and second is not None and store.replace(name, b"4", first or Version(None, None)) is None
    finally:
        store.delete([name])
