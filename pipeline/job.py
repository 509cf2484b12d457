"""The job that workers share: one file beside the cache, which each task names by its path and digest.

In: what the client resolved. Out: the file, and the check that a worker has all that the job needs. Nothing heavy is
imported here, so that a worker which lacks something can still say what.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from cache_spec.durable import replace_file
from cache_spec.errors import BadInputError

# What of the installed libraries decides bytes: the teacher's arithmetic, and the compression of what is kept.
_LIBRARIES = ("torch", "transformers", "numpy", "numcodecs")
_OWN_PACKAGES = ("cache_spec", "pipeline")


class JobRef(NamedTuple):
    """All that a task carries beside its shard's number."""

    path: str
    """The job's file, at one path on the client and all workers."""
    sha256: str
    """Digest of its bytes."""


class Committed(NamedTuple):
    """A task's result: what one committed shard counts."""

    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know to make any shard of one cache."""

    out: str
    """The cache's folder."""
    store: str | None
    """Address of the store that the shards go to; None where they go into the folder."""
    fingerprint: str
    """Of its manifest."""
    staged_key: str
    """Of the staged blocks."""
    teacher: str
    """Hub name, or a label of local files."""
    teacher_folder: str
    """Where the client found the teacher's files."""
    weight_files: tuple[str, ...]
    gguf_file: str | None
    revision: str | None
    """Commit of the hub repository, which a worker without the client's folder may take the teacher from."""
    weights_sha256: str
    device: str
    spread: bool
    """Whether the teacher takes all GPUs that a worker sees."""
    dtype: str
    compiled: bool
    num_threads: int | None
    """CPU threads of one worker; None leaves them as they are."""
    versions: dict[str, str]


def write_job(folder: Path, job: Job) -> JobRef:
    """Write the job's file into ``folder``, durably, under a name of its content."""
    data = json.dumps(asdict(job), indent=1, sort_keys=True).encode()
    digest = sha256(data).hexdigest()
    path = folder.resolve() / f"job-{digest[:16]}.json"
    replace_file(path, data)
    return JobRef(str(path), digest)


def read_job(ref: JobRef, place: str) -> Job:
    """The job, on a worker named ``place``; BadInputError ``worker-misses`` where its file is not the client's."""
    try:
        data = Path(ref.path).read_bytes()
    except OSError as error:
        raise _misses(place, "the cache's folder at the client's path", f"{error.strerror}: {ref.path}") from None
    if sha256(data).hexdigest() != ref.sha256:
        raise _misses(place, "the client's file", f"other bytes in {ref.path}")
    facts: dict[str, Any] = json.loads(data)
    return Job(**{**facts, "weight_files": tuple(facts["weight_files"])})


def check_worker(ref: JobRef, dask_worker: Any) -> None:
    """Run on a worker: refuse one that lacks a part of the job, or would make other bytes.

    Raises BadInputError ``worker-misses``, ``worker-versions``.
    """
    place = worker_place(dask_worker)
    job = read_job(ref, place)
    ours = versions()
    differing = [name for name in sorted(job.versions) if ours.get(name) != job.versions[name]]
    if differing:
        raise BadInputError(
            "worker-versions",
            place,
            expected=", ".join(f"{name} {job.versions[name]}" for name in differing),
            found=", ".join(f"{name} {ours.get(name)}" for name in differing),
            hint="install the client's versions there: others may write other bytes",
        )
    if not os.access(job.out, os.W_OK | os.X_OK):
        raise _misses(place, "leave to write the cache", f"{os.strerror(errno.EACCES)}: {job.out}")
    if job.revision is None and (missing := missing_weights(job)) is not None:
        raise _misses(place, "the teacher's files at the client's path", f"no {missing}")


def missing_weights(job: Job) -> Path | None:
    """The first weight file that is not in the client's folder as this machine sees it."""
    paths = (Path(job.teacher_folder) / name for name in job.weight_files)
    return next((path for path in paths if not path.is_file()), None)


def worker_place(worker: Any) -> str:
    """How errors name a worker: by address and host."""
    return f"worker {worker.address} on {socket.gethostname()}"


@cache
def versions() -> dict[str, str]:
    """Versions of all that decides bytes; our own one with a digest of the source."""
    root = Path(__file__).parents[1]
    digest = sha256()
    for path in sorted(path for name in _OWN_PACKAGES for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    own = f"{version('kdpipe')} (source {digest.hexdigest()[:12]})"
    return {"kdpipe": own, **{name: version(name) for name in _LIBRARIES}}


def _misses(place: str, expected: str, found: str) -> BadInputError:
    hint = "workers need the cache's folder, its staged blocks and the teacher on a shared file system"
    return BadInputError("worker-misses", place, expected=expected, found=found, hint=hint)
