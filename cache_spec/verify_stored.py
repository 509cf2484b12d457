"""Find everything that is wrong with a cache in a store: each object is fetched anew, looked at, and let go.

In: a cache's URL. Out: problems, as those of a folder, each with the object's place. No local copy is asked: it would
hide what is damaged in the store by now. Files of two shards are here at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from cache_spec.durable import make_folder, writing
from cache_spec.errors import CacheError
from cache_spec.layout import array_specs
from cache_spec.manifest import MANIFEST_NAME, Manifest
from cache_spec.receipts import RECEIPTS_FOLDER, SEAL_NAME, is_inside, read_manifest, receipt_object, refuse_endless
from cache_spec.store import ReadableStore, open_store
from cache_spec.tables import table_paths
from cache_spec.validate import Problem, known_files, verify_cache

_AT_ONCE = 8
_PREFIX = ".verify-"


def verify_stored(url: str, folder: Path, on_shard: Callable[[int], object] = lambda shard: None) -> list[Problem]:
    """All problems of a cache in a store; ``folder`` holds what is looked at.

    Raises KdpipeError ``store-failed`` where the store does not answer.
    """
    store = open_store(url)
    make_folder(folder)
    with TemporaryDirectory(dir=folder, prefix=_PREFIX) as name, ThreadPoolExecutor(_AT_ONCE) as pool:
        fetched = _Fetched(store, Path(name), pool)
        fetched.now([MANIFEST_NAME, SEAL_NAME])
        try:
            manifest = read_manifest(fetched.path)
        except CacheError:
            problems = verify_cache(fetched.path)
        else:
            names = {listed.name for listed in store.list()}
            try:
                refuse_endless(manifest, sum(name.startswith(f"{RECEIPTS_FOLDER}/") for name in names), url)
            except CacheError as error:
                return [Problem(error.kind, error.place, error.expected, error.found)]
            problems = _stray_objects(url, names - known_files(manifest))
            fetched.now([name for name in manifest.files if is_inside(name)])
            fetched.now([*table_paths(manifest), *map(receipt_object, range(manifest.blocks.num_shards))])
            shards = _Shards(fetched, manifest)

            def done(shard: int) -> None:
                shards.drop(shard)
                on_shard(shard)

            problems += verify_cache(fetched.path, done, shards.have)
        return [problem._replace(place=problem.place.replace(name, store.url)) for problem in problems]


class _Fetched:
    """Objects as files of a folder, just as the store has them; one that is missing there is missing here."""

    def __init__(self, store: ReadableStore, path: Path, pool: ThreadPoolExecutor) -> None:
        self._store, self.path, self._pool = store, path, pool

    def begin(self, names: Iterable[str]) -> list[Future[None]]:
        return [self._pool.submit(self._fetch, name) for name in names]

    def now(self, names: Iterable[str]) -> None:
        for future in self.begin(names):
            future.result()

    def _fetch(self, name: str) -> None:
        data, path = self._store.get(name), self.path / name
        if data is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


class _Shards:
    """The files of one shard, and of the next one on their way."""

    def __init__(self, fetched: _Fetched, manifest: Manifest) -> None:
        self._fetched, self._specs = fetched, array_specs(manifest).values()
        self._num_shards = manifest.blocks.num_shards
        self._under_way: dict[int, list[Future[None]]] = {}

    def have(self, shard: int) -> None:
        """Wait for a shard's files, and begin with those of the next."""
        for number in range(shard, min(shard + 2, self._num_shards)):
            if number not in self._under_way:
                self._under_way[number] = self._fetched.begin(spec.shard_path(number) for spec in self._specs)
        for future in self._under_way[shard]:
            future.result()

    def drop(self, shard: int) -> None:
        """Remove a shard's files."""
        del self._under_way[shard]
        for spec in self._specs:
            (self._fetched.path / spec.shard_path(shard)).unlink(missing_ok=True)


def _stray_objects(url: str, names: Iterable[str]) -> list[Problem]:
    """Objects that no rule accounts for; hidden ones are nobody's data."""
    return [
        Problem("unexpected-file", f"{url}/{name}", "nothing here", None)
        for name in sorted(names)
        if not any(part.startswith(".") for part in name.split("/"))
    ]
