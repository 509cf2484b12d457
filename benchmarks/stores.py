"""``python -m benchmarks.stores``: obstore beside s3fs on the same server: puts, gets and a listing.

In: sizes and counts. Out: JSON with the seconds of each, many requests at once as a capture and a training make them,
the best of some rounds, the libraries in turns. The server is moto's, on loopback, which serves requests one by one:
what differs is what a library costs. s3fs is measured where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from cache_spec.store import ObjectStore
from tests.object_stores import BUCKET, RunningS3, running_s3

_AT_ONCE = 8
_KIB = 1024


class _Client(Protocol):
    def put(self, name: str, data: bytes) -> None: ...

    def get(self, name: str) -> bytes | None: ...

    def count(self, prefix: str) -> int: ...


class _Obstore:
    def __init__(self) -> None:
        self.store = ObjectStore(f"s3://{BUCKET}/obstore")

    def put(self, name: str, data: bytes) -> None:
        self.store.put(name, data)

    def get(self, name: str) -> bytes | None:
        return self.store.get(name)

    def count(self, prefix: str) -> int:
        return sum(1 for _ in self.store.list(f"{prefix}/"))


class _S3fs:
    def __init__(self, server: RunningS3) -> None:
        names = server.environment
        self.files: Any = import_module("s3fs").S3FileSystem(
            key=names["AWS_ACCESS_KEY_ID"],
            secret=names["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=names["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
        )

    def put(self, name: str, data: bytes) -> None:
        self.files.pipe_file(f"{BUCKET}/s3fs/{name}", data)

    def get(self, name: str) -> bytes | None:
        data: bytes = self.files.cat_file(f"{BUCKET}/s3fs/{name}")
        return data

    def count(self, prefix: str) -> int:
        return len(self.files.find(f"{BUCKET}/s3fs/{prefix}"))


def measure(client: _Client, num_large: int, num_small: int, num_listed: int) -> dict[str, float]:
    """Seconds of each kind of work with one client."""
    found = {}
    for label, size, count in (("4_mib", 4 * _KIB * _KIB, num_large), ("64_kib", 64 * _KIB, num_small)):
        data = os.urandom(size)
        names = [f"{label}/{number}" for number in range(count)]
        found[f"put_{label}_s"] = _timed(partial(_put, client, data), names)
        found[f"get_{label}_s"] = _timed(partial(_get, client, size), names)
    if not client.count("listed"):
        _timed(partial(_put, client, b""), [f"listed/{number}" for number in range(num_listed)])
    begin = time.perf_counter()
    assert client.count("listed") == num_listed
    found["list_s"] = time.perf_counter() - begin
    return found


def _put(client: _Client, data: bytes, name: str) -> None:
    client.put(name, data)


def _get(client: _Client, size: int, name: str) -> None:
    data = client.get(name)
    assert data is not None
    assert len(data) == size


def _timed(work: Callable[[str], object], names: list[str]) -> float:
    begin = time.perf_counter()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(work, names):
            pass
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large", type=int, default=32, help="objects of 4 MiB")
    parser.add_argument("--small", type=int, default=256, help="objects of 64 KiB")
    parser.add_argument("--listed", type=int, default=5000, help="objects in the listing")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with running_s3() as server:
        os.environ.update(server.environment)
        clients: dict[str, _Client] = {"obstore": _Obstore()}
        report: dict[str, Any] = {"at_once": _AT_ONCE, **vars(options), "versions": {"obstore": version("obstore")}}
        try:
            report["versions"]["s3fs"] = version("s3fs")
            clients["s3fs"] = _S3fs(server)
        except PackageNotFoundError:
            report["versions"]["s3fs"] = None
        best: dict[str, dict[str, float]] = {name: {} for name in clients}
        for _ in range(options.rounds):
            for name, client in clients.items():
                for what, seconds in measure(client, options.large, options.small, options.listed).items():
                    best[name][what] = round(min(seconds, best[name].get(what, seconds)), 4)
    print(json.dumps({**report, **best}, indent=2))


if __name__ == "__main__":
    main()
