"""Writers of one shard in an object store, their requests in any order, some of them killed: one whole shard remains.

In: two or three writers, each with bytes of its own (or equal ones), and a random order of their requests. Out: the
receipt, and objects that are its, every one; or no receipt, and the next writer makes the shard whole.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import obstore.store
import pytest

from cache_spec.commit import PackedShard, pack_shard
from cache_spec.errors import KdpipeError
from cache_spec.layout import array_specs
from cache_spec.manifest import Manifest, canonical_json, sha256_hex
from cache_spec.receipts import Receipt, receipt_object
from cache_spec.store import ObjectStore
from cache_spec.store_commit import publish_to_store, stored_receipt
from tests.synthetic import make_manifest, make_rows, shard_rows

_REQUESTS = ("get", "head", "get_versioned", "put", "put_new", "replace")


class Killed(BaseException):
    """A writer ends between two requests."""


class InMemory(ObjectStore):
    """A store in this process that keeps its conditions; each request waits until ``turn`` returns."""

    def __init__(self, objects: obstore.store.MemoryStore, turn: Callable[[], None] = lambda: None) -> None:
        super().__init__("s3://bucket/cache")
        self.__dict__["_objects"] = objects
        self.turn = turn

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in _REQUESTS:
            return found

        def waiting(*args: Any) -> Any:
            self.turn()
            return found(*args)

        return waiting


class Turns:
    """Threads take one step each time they are let, in a random order; some are killed at a random step."""

    def __init__(self, bodies: list[Callable[[Callable[[], None]], None]], rng: random.Random) -> None:
        self._rng = rng
        self._waiting = [threading.Semaphore(0) for _ in bodies]
        self._arrived = [threading.Semaphore(0) for _ in bodies]
        self._ended = [False] * len(bodies)
        self._kills = [rng.randrange(60) for _ in bodies]
        self._steps = [0] * len(bodies)
        self._threads = [
            threading.Thread(target=self._run, args=(at, body), daemon=True) for at, body in enumerate(bodies)
        ]

    def _run(self, at: int, body: Callable[[Callable[[], None]], None]) -> None:
        try:
            body(lambda: self._step(at))
        except (Killed, KdpipeError):
            pass
        finally:
            self._ended[at] = True
            self._arrived[at].release()

    def _step(self, at: int) -> None:
        self._arrived[at].release()
        self._waiting[at].acquire()
        self._steps[at] += 1
        if self._steps[at] == self._kills[at]:
            raise Killed

    def play(self) -> None:
        for thread, arrived in zip(self._threads, self._arrived, strict=True):
            thread.start()
            arrived.acquire()
        at = 0
        while left := [n for n, ended in enumerate(self._ended) if not ended]:
            # Long runs of one writer and sleeps of the others: what a frozen machine looks like.
            if at not in left or self._rng.random() < 0.2:
                at = self._rng.choice(left)
            self._waiting[at].release()
            self._arrived[at].acquire()


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return make_manifest(num_blocks=2, shard_blocks=2)


@pytest.fixture(scope="module")
def packed(manifest: Manifest) -> list[PackedShard]:
    """The same shard as three machines would make it that do not round alike."""
    return [pack_shard(manifest, 0, shard_rows(manifest, make_rows(manifest, seed), 0)) for seed in (1, 2, 3)]


def writer(
    objects: obstore.store.MemoryStore, manifest: Manifest, content: PackedShard, returned: list[Receipt]
) -> Callable[[Callable[[], None]], None]:
    """What one writer does, its every request when it is its turn."""
    return lambda turn: returned.append(publish_to_store(InMemory(objects, turn), manifest, content))


def whole(store: ObjectStore, manifest: Manifest, receipt: Receipt) -> bool:
    return all(
        sha256_hex(store.get(spec.shard_path(0)) or b"") == receipt.files[name].sha256
        for name, spec in array_specs(manifest).items()
    )


@pytest.mark.parametrize("equal", [False, True])
def test_whatever_the_order_of_requests_a_receipt_stands_for_its_own_objects(
    manifest: Manifest, packed: list[PackedShard], equal: bool
) -> None:
    killed = committed = 0
    for seed in range(150):
        rng = random.Random(seed)
        objects = obstore.store.MemoryStore()
        returned: list[Receipt] = []

        contents = [packed[0]] * 3 if equal else packed
        Turns([writer(objects, manifest, content, returned) for content in contents[: rng.choice([2, 3])]], rng).play()
        store = InMemory(objects)
        receipt = stored_receipt(store, manifest, 0)
        killed += receipt is None
        committed += receipt is not None
        assert all(earlier == receipt for earlier in returned), seed  # what was acknowledged stays
        last = publish_to_store(store, manifest, contents[0])
        assert receipt in (None, last), seed
        assert whole(store, manifest, last), seed
    assert killed > 5, "no order left the shard open"
    assert committed > 50


def test_a_writer_that_slept_changes_nothing_of_what_a_later_one_committed(
    manifest: Manifest, packed: list[PackedShard]
) -> None:
    objects = obstore.store.MemoryStore()
    store = InMemory(objects)
    name = receipt_object(0)
    steps = 0

    def sleeps() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            publish_to_store(store, manifest, packed[1])

    assert publish_to_store(InMemory(objects, sleeps), manifest, packed[0]) == packed[1].receipt
    receipt = stored_receipt(store, manifest, 0)
    assert receipt == packed[1].receipt
    assert whole(store, manifest, receipt)
    assert store.get(name) == receipt.to_json()


def test_a_claim_is_no_receipt(manifest: Manifest) -> None:
    store = InMemory(obstore.store.MemoryStore())
    store.put(receipt_object(0), canonical_json({"claim": "0" * 32}))
    assert stored_receipt(store, manifest, 0) is None


def test_a_writer_whose_claim_was_taken_says_so(manifest: Manifest, packed: list[PackedShard]) -> None:
    objects = obstore.store.MemoryStore()
    store = InMemory(objects)
    original = store.put_new

    def taken(name: str, data: bytes) -> Any:
        if name.startswith("input_ids"):
            store.put(receipt_object(0), canonical_json({"claim": "1" * 32}))
        return original(name, data)

    store.put_new = taken  # type: ignore[method-assign]
    with pytest.raises(KdpipeError) as caught:
        publish_to_store(store, manifest, packed[0])
    assert caught.value.kind == "shard-taken"
    assert publish_to_store(InMemory(objects), manifest, packed[0]) == packed[0].receipt
