"""An S3 server of a test's own, on loopback, in a process that may be stopped, frozen or killed.

In: nothing, or a port. Out: a running server with one bucket, and the environment in which clients find it. Requests
are served one after another: what the server checks before a conditional put still holds when it puts.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cache_spec.store import ObjectStore
from tests.processes import free_port

BUCKET = "bucket"
_START_S = 60.0


@dataclass(frozen=True)
class RunningS3:
    """A server that answers, with one empty bucket."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """What tells clients of it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }


def upload(cache: Path, prefix: str) -> ObjectStore:
    """Put every file of a cache below a prefix of the bucket."""
    store = ObjectStore(f"s3://{BUCKET}/{prefix}")
    for path in sorted(cache.rglob("*")):
        name = path.relative_to(cache).as_posix()
        if path.is_file() and not path.name.startswith("."):
            store.put(name, path.read_bytes())
    return store


@contextmanager
def running_s3() -> Iterator[RunningS3]:
    """A server and its bucket; everything in it ends with the block."""
    port = free_port()
    command = [sys.executable, "-m", "tests.object_stores", str(port)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "the server did not start"
        url = f"http://127.0.0.1:{port}/{BUCKET}"
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=_START_S):
            pass
        yield RunningS3(port, process)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _serve(port: int) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", port, DomainDispatcherApplication(create_backend_app))
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
