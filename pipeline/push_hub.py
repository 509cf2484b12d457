"""``kdpipe push`` to the Hugging Face Hub, within what the Hub bears: few large objects, few commits.

In: a finished cache and ``hf://datasets/ORG/NAME``. Out: its files in packs, an index of them, a card; manifest and
seal come with the last commit, so that every revision has the whole cache or none. Packs are written beside the cache,
a few at a time, and deleted when they are sent. A pack is a function of the cache: what the Hub has is not sent again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import filelock
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    parse_ratelimit_headers,
)
from tqdm import tqdm

from cache_spec.durable import make_folder, writing
from cache_spec.errors import BadInputError, WouldLoseDataError
from cache_spec.hub import MAIN, REPO_TYPE, HubAddress, HubStore, asking
from cache_spec.manifest import MANIFEST_NAME, sha256_hex
from cache_spec.packs import INDEX_NAME, PACKS_FOLDER, Pack, PackIndex, write_pack
from cache_spec.receipts import SEAL_NAME
from pipeline.card import dataset_card
from pipeline.transfer import Finished, Item, in_batches, refuse_another

PACK_BYTES = 2 << 30
_PACK_FILES = 50_000
# The Hub takes files of 50 GB at most.
_MAX_PACK_BYTES = 50 * 10**9
_STAGED_PACKS = 2
"""Packs that are on disk, and sent, at the same time."""
_COMMIT_PACKS = 40
"""Packs in one commit; the Hub advises to stay below 100 files."""
_PATHS_AT_ONCE = 500
_SMALL_BYTES = 1 << 20
STAGING_NAME = ".kdpipe-push"
_CARD_NAME = "README.md"
_PLAIN = (INDEX_NAME, MANIFEST_NAME, SEAL_NAME)
_TRIES = 4
_LONGEST_WAIT_S = 330
"""A little more than the window over which the Hub counts requests."""
_MAY_PASS = (429, 500, 502, 503, 504)
Result = TypeVar("Result")


class _Head(NamedTuple):
    """The branch that is pushed to, as it is now."""

    commit: str
    is_private: bool


def push_to_hub(
    cache: Finished,
    url: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    pack_bytes: int = PACK_BYTES,
) -> dict[str, Any]:
    """Send a finished cache in packs of about ``pack_bytes``; returns what was sent and the commit that holds it.

    Raises WouldLoseDataError where another cache lies, or where another process pushes this one, BadInputError
    ``public-dataset`` for a dataset that is there and not private as was asked.
    """
    address = HubAddress.parse(url)
    if address.is_pinned:
        raise BadInputError("bad-url", url, expected="a branch, not a commit, to push to")
    plans = list(_plans(cache, pack_bytes))
    if not are_progress_bars_disabled():
        disable_progress_bars()
    pushing = _PushToHub(cache, address, plans, quiet)
    if dry_run:
        return pushing.dry_run(private)
    with _staging(cache.path) as staging:
        return pushing.run(staging, private)


def _plans(cache: Finished, pack_bytes: int) -> Iterator[list[Item]]:
    """Which files go into each pack: a shard's stay together, unless they are too many bytes."""
    num_shards = cache.manifest.blocks.num_shards
    # Receipts lie next to each other: a reader gets many of them at once.
    alone = [*cache.other_items(), *(cache.receipt_item(shard) for shard in range(num_shards))]
    groups = ([[item] for item in alone], (cache.shard_items(shard) for shard in range(num_shards)))
    plan: list[Item] = []
    size = 0
    for group in (group for part in groups for group in part):
        group_bytes = sum(item.num_bytes for item in group)
        if plan and (size + group_bytes > pack_bytes or len(plan) + len(group) > _PACK_FILES):
            yield plan
            plan, size = [], 0
        if group_bytes > _MAX_PACK_BYTES:
            hint = "make the cache with fewer --shard-blocks"
            raise BadInputError(
                "too-large", group[0].name, expected=f"shards of at most {_MAX_PACK_BYTES} bytes", hint=hint
            )
        plan += group
        size += group_bytes
    yield plan


@contextmanager
def _staging(cache: Path) -> Iterator[Path]:
    """A folder beside the cache for packs on their way, held by this process and gone in the end."""
    path, lock = cache / STAGING_NAME, filelock.FileLock(cache / f"{STAGING_NAME}.lock")
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            hint = "another process pushes it; wait for it, or stop it"
            raise WouldLoseDataError("cache-in-use", cache, hint=hint) from None
    try:
        # What a push that was killed left.
        shutil.rmtree(path, ignore_errors=True)
        make_folder(path)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()


class _PushToHub:
    def __init__(self, cache: Finished, address: HubAddress, plans: list[list[Item]], quiet: bool) -> None:
        self.cache, self.address, self.plans, self.quiet = cache, address, plans, quiet
        self.api, self.branch, self.place = HfApi(), address.revision or MAIN, str(address)
        # Caches never share a pack's name: what lies under one is this pack, or part of nothing.
        stem = sha256_hex(cache.manifest_bytes + cache.seal_bytes)[:16]
        self.names = [f"{PACKS_FOLDER}/{stem}-{number:05d}.zip" for number in range(len(plans))]

    def dry_run(self, private: bool) -> dict[str, Any]:
        """What would be sent."""
        head = self._head()
        there = self._there(head, private)
        missing = [plan for name, plan in zip(self.names, self.plans, strict=True) if name not in there]
        return self._facts(
            None, len(missing), sum(item.num_bytes for plan in missing for item in plan), sum(map(_size, self.plans))
        )

    def run(self, staging: Path, private: bool) -> dict[str, Any]:
        """Send what is missing."""
        head = self._head()
        if head is None:
            with asking(self.place):
                create = partial(self.api.create_repo, self.address.repo, repo_type=REPO_TYPE, exist_ok=True)
                _again(partial(create, private=private or None))
                if self.branch != MAIN:
                    self.api.create_branch(self.address.repo, repo_type=REPO_TYPE, branch=self.branch, exist_ok=True)
            head = self._head()
            assert head is not None
        there = self._there(head, private)
        commit, packs, sent_objects, sent_bytes = head.commit, [], 0, 0
        waiting: list[CommitOperationAdd] = []
        with tqdm(total=len(self.plans), unit="pack", desc="push", disable=self.quiet or None) as bar:
            for batch in in_batches(zip(self.names, self.plans, strict=True), _STAGED_PACKS):
                made = [self._pack(name, plan, there.get(name), staging) for name, plan in batch]
                packs += [pack for pack, _ in made]
                sending = [(pack, operation) for pack, operation in made if operation is not None]
                if sending:
                    self._upload([operation for _, operation in sending])
                    waiting += [operation for _, operation in sending]
                    sent_objects += len(sending)
                    sent_bytes += sum(pack.num_bytes for pack, _ in sending)
                    for pack, _ in sending:
                        (staging / Path(pack.name).name).unlink(missing_ok=True)
                if len(waiting) >= _COMMIT_PACKS:
                    commit, waiting = self._commit(waiting, commit, "Packs of a kdpipe cache"), []
                bar.update(len(batch))
        total = sum(pack.num_bytes for pack in packs)
        last = {} if self._is_whole(there) else self._last_files(packs, total, there)
        if last or waiting:
            waiting += [self._operation(name, data) for name, data in last.items()]
            commit = self._commit(waiting, commit, f"kdpipe cache {self.cache.manifest.fingerprint[:12]}")
        return self._facts(commit, sent_objects + len(last), sent_bytes + sum(map(len, last.values())), total)

    def _facts(self, commit: str | None, sent_objects: int, sent_bytes: int, num_bytes: int) -> dict[str, Any]:
        return {
            "cache": str(self.cache.path),
            "url": self.place,
            "fingerprint": self.cache.manifest.fingerprint,
            "objects": len(self.plans) + len(_PLAIN) + 1,
            "bytes": num_bytes,
            "sent_objects": sent_objects,
            "sent_bytes": sent_bytes,
            "dry_run": commit is None,
            "commit": commit,
        }

    def _head(self) -> _Head | None:
        """The branch as it is; None if there is no such dataset or branch."""
        with asking(self.place):
            try:
                found = _again(lambda: self.api.dataset_info(self.address.repo, revision=self.branch))
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None
        assert found.sha is not None
        return _Head(found.sha, bool(found.private))

    def _there(self, head: _Head | None, private: bool) -> dict[str, str]:
        """Name to digest of what the branch holds of this cache; a refusal where it holds another."""
        if head is None:
            return {}
        if private and not head.is_private:
            hint = "make the dataset private on the Hub, or leave out --private"
            raise BadInputError("public-dataset", self.place, expected="a private dataset", hint=hint)
        store = HubStore(str(self.address._replace(revision=head.commit)))
        has_manifest, has_seal = refuse_another(store, self.cache)
        there = dict.fromkeys([name for name, has in ((MANIFEST_NAME, has_manifest), (SEAL_NAME, has_seal)) if has], "")
        for names in in_batches([*self.names, INDEX_NAME, _CARD_NAME], _PATHS_AT_ONCE):
            paths = {self.address.path(name): name for name in names}
            with asking(self.place):
                found = _again(
                    partial(
                        self.api.get_paths_info,
                        self.address.repo,
                        list(paths),
                        revision=head.commit,
                        repo_type=REPO_TYPE,
                    )
                )
            for file in found:
                if isinstance(file, RepoFile):
                    there[paths[file.path]] = file.lfs.sha256 if file.lfs is not None else ""
        return there

    def _is_whole(self, there: dict[str, str]) -> bool:
        return {*self.names, *_PLAIN} <= there.keys()

    def _pack(
        self, name: str, plan: list[Item], sha256: str | None, staging: Path
    ) -> tuple[Pack, CommitOperationAdd | None]:
        """A pack, and what sends it; nothing sends it if the Hub has it."""
        files = [(item.name, item.num_bytes, self.cache.pieces(item)) for item in plan]
        if sha256 is not None:
            pack = write_pack(name, files, None)
            if pack.sha256 == sha256:
                return pack, None
            files = [(item.name, item.num_bytes, self.cache.pieces(item)) for item in plan]
        path = staging / Path(name).name
        with writing(path), open(path, "wb") as out:
            pack = write_pack(name, files, out)
        # A small file may be sent with the commit itself: its bytes must be there until then.
        operation = self._operation(name, path.read_bytes() if pack.num_bytes <= _SMALL_BYTES else path)
        operation.upload_info.sha256 = bytes.fromhex(pack.sha256)
        return pack, operation

    def _operation(self, name: str, content: bytes | Path) -> CommitOperationAdd:
        return CommitOperationAdd(self.address.path(name), content)

    def _upload(self, operations: list[CommitOperationAdd]) -> None:
        with asking(self.place):
            self.api.preupload_lfs_files(
                self.address.repo, additions=operations, repo_type=REPO_TYPE, revision=self.branch
            )

    def _commit(self, operations: list[CommitOperationAdd], parent: str, message: str) -> str:
        with asking(self.place):
            # The parent is named: of two pushes at once, one is refused.
            made = _again(
                lambda: self.api.create_commit(
                    self.address.repo,
                    operations,
                    commit_message=message,
                    repo_type=REPO_TYPE,
                    revision=self.branch,
                    parent_commit=parent,
                )
            )
        assert made.oid is not None
        return str(made.oid)

    def _last_files(self, packs: list[Pack], total: int, there: dict[str, str]) -> dict[str, bytes]:
        """What makes a cache of the packs; a card that somebody wrote stays."""
        plain = {MANIFEST_NAME: self.cache.manifest_bytes, SEAL_NAME: self.cache.seal_bytes}
        sizes = {name: len(data) for name, data in plain.items()}
        index = PackIndex(fingerprint=self.cache.manifest.fingerprint, plain=sizes, packs=tuple(packs))
        card = dataset_card(self.cache.manifest, total, self.place).encode()
        return {
            **({} if _CARD_NAME in there else {_CARD_NAME: card}),
            INDEX_NAME: index.to_json(),
            **plain,
        }


def _size(plan: list[Item]) -> int:
    return sum(item.num_bytes for item in plan)


def _again(call: Callable[[], Result]) -> Result:
    """Call, and call again after what may pass, when the Hub says; the library does so only for some requests."""
    for tries_left in reversed(range(_TRIES)):
        try:
            return call()
        except HfHubHTTPError as error:
            headers = error.response.headers
            limit = parse_ratelimit_headers(headers)
            after = headers.get("Retry-After", "")
            wait_s = limit.reset_in_seconds if limit and not limit.remaining else int(after) if after.isdigit() else 2
            if error.response.status_code not in _MAY_PASS or not tries_left or wait_s > _LONGEST_WAIT_S:
                raise
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")
