"""A finished cache in a store, read through plain files of its own: what is asked for is fetched, checked and kept.

In: a cache's URL. Out: a folder with its manifest and small files, and on demand receipts, tables and shard files. Each
has the digest that manifest or receipt names before it gets its name; an object that has not is asked for once more.

Local copies are made of one URL, manifest and seal: another cache at the same URL gets another folder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath

from cache_spec.address import CopySettings
from cache_spec.bounded import BoundedFolder
from cache_spec.errors import CacheError
from cache_spec.layout import ArraySpec
from cache_spec.manifest import MANIFEST_NAME, Manifest, sha256_hex
from cache_spec.receipts import (
    SEAL_NAME,
    Receipt,
    is_inside,
    parse_receipt,
    parse_seal,
    receipt_object,
    small_file_errors,
)
from cache_spec.store import ReadableStore, open_store
from cache_spec.tables import read_table, table_paths
from cache_spec.targets import Array

_AT_ONCE = 8
"""Small files under way when a copy is opened."""
_NAME_DIGITS = 24


class LocalCopy:
    """What was read so far of one cache in a store; safe to share between threads, its folder between processes."""

    def __init__(self, store: ReadableStore, manifest: bytes, seal: bytes, settings: CopySettings) -> None:
        self.url = store.url
        self.manifest = Manifest.from_json(manifest, f"{self.url}/{MANIFEST_NAME}")
        parse_seal(seal, self.manifest, f"{self.url}/{SEAL_NAME}")
        name = sha256_hex(b"\n".join([self.url.encode(), manifest, seal]))[:_NAME_DIGITS]
        self.limit_bytes = settings.copies_limit_bytes
        self.path = settings.copies / name
        self._store, self._identity = store, (manifest, seal)
        self._folder = BoundedFolder(settings.copies, settings.copies_limit_bytes)

    @classmethod
    def open(cls, url: str, settings: CopySettings) -> LocalCopy:
        """Fetch what every reader needs; CacheError for what is no finished cache, or a damaged one."""
        store = open_store(url)
        manifest, seal = _read_identity(store)
        if manifest is None:
            raise _no_cache(store)
        if seal is None:
            hint = "run the command that makes it again to finish it"
            raise CacheError("unfinished-cache", store.url, expected=f"an object {SEAL_NAME}", found="none", hint=hint)
        copy = cls(store, manifest, seal, settings)
        copy._fetch_small_files()
        return copy

    def receipt(self, shard: int) -> Receipt:
        """The receipt of a shard."""
        name = receipt_object(shard)

        def parsed(data: bytes) -> Receipt:
            return parse_receipt(data, self.manifest, shard, f"{self.url}/{name}")

        def read() -> bytes:
            return self._folder.read(self.path / name, lambda: self._fetched(name, "unfinished-cache", parsed))

        try:
            return parsed(read())
        except CacheError:  # an object that is so is refused before it gets here: a crash cut this file short
            self._folder.discard(self.path / name)
            return parsed(read())

    def open_shard(self, spec: ArraySpec, receipt: Receipt) -> int:
        """Descriptor of an array's file of a shard."""
        name, expected = spec.shard_path(receipt.shard), receipt.files[spec.name]

        def check(data: bytes) -> None:
            if len(data) != expected.num_bytes:
                found, place = len(data), f"{self.url}/{name}"
                raise CacheError("truncated-shard", place, expected=f"{expected.num_bytes} bytes", found=found)
            self._check_digest("shard-digest", name, data, expected.sha256)

        return self._folder.open(self.path / name, lambda: self._fetched(name, "missing-shard", check))

    def discard_shard(self, spec: ArraySpec, shard: int) -> None:
        """Let go of a file that turned out to be damaged here."""
        self._folder.discard(self.path / spec.shard_path(shard))

    def table(self, name: str) -> Array:
        """The values of a table."""
        paths = [path for path in table_paths(self.manifest) if PurePosixPath(path).parent.name == name]
        last = 2
        for attempt in range(last + 1):
            for path in paths:
                self._folder.read(self.path / path, lambda path=path: self._fetched(path, "missing-table"))  # type: ignore[misc]
            try:
                with self._named():
                    return read_table(self.path, self.manifest, name)
            except CacheError:  # damaged, here or there, or let go meanwhile
                if attempt == last:
                    self._refuse_change()
                    raise
                for path in paths:
                    self._folder.discard(self.path / path)
        raise AssertionError("the last attempt returns or raises")

    def num_bytes(self, prefix: str, names: Collection[str]) -> int:
        """Of those of ``names`` that the store has below ``prefix``."""
        return sum(listed.num_bytes for listed in self._store.list(prefix) if listed.name in names)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Let errors about the folder's files name the objects that they are of."""
        try:
            yield
        except CacheError as error:
            place = error.place.replace(str(self.path), self.url)
            raise CacheError(error.kind, place, expected=error.expected, found=error.found, hint=error.hint) from None

    def _fetch_small_files(self) -> None:
        """Have all files that the manifest lists; what does not lead into the folder is refused unread."""
        files = {name: digest for name, digest in self.manifest.files.items() if is_inside(name)}

        def fetch(name: str) -> None:
            path = self.path / name

            def check(data: bytes) -> None:
                self._check_digest("file-mismatch", name, data, files[name])

            def read() -> bytes:
                return self._folder.read(path, lambda: self._fetched(name, "missing-file", check))

            if sha256_hex(read()) != files[name]:
                self._folder.discard(path)
                read()

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(fetch, files))
        with self._named():
            for error in small_file_errors(self.path, self.manifest):
                raise error

    def _fetched(self, name: str, missing: str, check: Callable[[bytes], object] = lambda data: None) -> bytes:
        """Content of an object that passes ``check``; asked for twice before it is refused."""
        for is_last in (False, True):
            data = self._store.get(name)
            try:
                if data is None:
                    raise CacheError(missing, f"{self.url}/{name}", expected="an object of the cache", found="none")
                check(data)
                return data
            except CacheError:
                if is_last:
                    self._refuse_change()
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _check_digest(self, kind: str, name: str, data: bytes, expected: str) -> None:
        found = sha256_hex(data)
        if found != expected:
            raise CacheError(kind, f"{self.url}/{name}", expected=expected, found=found)

    def _refuse_change(self) -> None:
        """Raise CacheError ``cache-changed`` if the store holds another cache by now, or none."""
        manifest, seal = _read_identity(self._store)
        if (manifest, seal) == self._identity:
            return
        found = "no finished cache" if manifest is None or seal is None else "another cache"
        expected = f"cache {self.manifest.fingerprint[:12]} as it was when it was opened"
        hint = "whoever owns the store has changed it: start again on what is there now"
        raise CacheError("cache-changed", self.url, expected=expected, found=found, hint=hint)


def _read_identity(store: ReadableStore) -> tuple[bytes | None, bytes | None]:
    """Manifest and seal: what a cache is, and that it is finished."""
    return store.get(MANIFEST_NAME), store.get(SEAL_NAME)


def read_stored_manifest(url: str) -> Manifest:
    """The manifest of a cache in a store, finished or not; CacheError ``not-a-cache`` if there is none."""
    store = open_store(url)
    data = store.get(MANIFEST_NAME)
    if data is None:
        raise _no_cache(store)
    return Manifest.from_json(data, f"{store.url}/{MANIFEST_NAME}")


def _no_cache(store: ReadableStore) -> CacheError:
    return CacheError("not-a-cache", store.url, expected=f"an object {MANIFEST_NAME}", found="none")
