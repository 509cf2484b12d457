"""What runs on a dask worker: one task is one shard, and only a job's name, a number and two counts travel.

In: a job's reference and a shard's number. Out: the shard, committed by the worker itself, and what it counts. The
teacher is loaded by the first task that needs it and stays until a job needs another.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dask.distributed import get_worker

from cache_spec.commit import pack_shard
from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.manifest import Manifest
from cache_spec.receipts import read_manifest
from pipeline.blocks import StagedBlocks, open_staged
from pipeline.encoders.spectrum import Encoder
from pipeline.failures import as_failure
from pipeline.folder import STAGING_NAME, read_tables
from pipeline.job import Committed, Job, JobRef, check_worker, missing_weights, read_job, worker_place
from pipeline.place import Place, place_of
from pipeline.shard import encoder_of, shard_arrays
from pipeline.teacher import Teacher, load_teacher
from pipeline.teacher_files import TeacherFiles, resolve_teacher

# Other failures to write, such as a stale handle of a network file system, may pass.
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class _Prepared:
    """A job as this process holds it."""

    job: Job
    place: Place
    manifest: Manifest
    staged: StagedBlocks
    teacher: Teacher
    encoder: Encoder


# One of each a process, by digest: a long-lived worker does not collect the teachers of all jobs that it ever served.
_prepared: dict[str, _Prepared] = {}
_teachers: dict[tuple[str, str, str], Teacher] = {}
_lock = threading.Lock()


def capture_task(ref: JobRef, shard: int) -> Committed:
    """Runs on a worker: commit one shard of the job, or find it committed.

    Every failure is raised as an error of ours, so that the client can read it whatever is installed there.
    """
    worker = get_worker()
    where = f"shard {shard}: {worker_place(worker)}"
    try:
        with _lock:  # a teacher reads one batch at a time; a worker's second thread commits the shard before
            prepared = _prepare(ref, worker)
            manifest, place = prepared.manifest, prepared.place
            receipt = place.receipt(manifest, shard)
            if receipt is None:
                if prepared.job.num_threads is not None:
                    torch.set_num_threads(prepared.job.num_threads)
                arrays = shard_arrays(manifest, prepared.staged, prepared.teacher, prepared.encoder, shard)
        if receipt is None:
            receipt = place.publish(manifest, pack_shard(manifest, shard, arrays))
    except BadInputError as error:
        cause = error.__cause__
        if error.kind != "cannot-write" or not isinstance(cause, OSError) or cause.errno in _LASTING:
            raise
        raise KdpipeError(error.kind, error.place, found=error.found) from None
    except KdpipeError:
        raise
    except Exception as error:
        failure = as_failure(error, where)
        raise failure or KdpipeError("worker-failed", where, found=repr(error)[:1000]) from None
    return Committed(receipt.num_blocks * manifest.blocks.block_tokens, receipt.num_bytes)


def _prepare(ref: JobRef, worker: Any) -> _Prepared:
    """The job as this process holds it; checked, read and loaded when it is first asked for."""
    if ref.sha256 not in _prepared:
        _prepared.clear()
        check_worker(ref, worker)
        place = worker_place(worker)
        job = read_job(ref, place)
        out = Path(job.out)
        manifest = read_manifest(out)
        if manifest.fingerprint != job.fingerprint:
            raise BadInputError("worker-misses", place, expected=f"cache {job.fingerprint}", found=manifest.fingerprint)
        teacher = _teacher(job, worker)
        encoder = encoder_of(manifest, read_tables(out, manifest), teacher.device)
        staged = open_staged(out / STAGING_NAME, job.staged_key)
        _prepared[ref.sha256] = _Prepared(job, place_of(out, job.store), manifest, staged, teacher, encoder)
    return _prepared[ref.sha256]


def _teacher(job: Job, worker: Any) -> Teacher:
    device = _device(job, worker.name)
    key = (job.weights_sha256, "spread" if job.spread else device, job.dtype)
    if key not in _teachers:
        _teachers.clear()
        if job.revision is not None and missing_weights(job) is not None:
            files = resolve_teacher(job.teacher, revision=job.revision, gguf_file=job.gguf_file)
        else:
            files = TeacherFiles(
                name=job.teacher,
                folder=Path(job.teacher_folder),
                weight_files=job.weight_files,
                gguf_file=job.gguf_file,
                revision=job.revision,
            )
        if files.weights_sha256 != job.weights_sha256:
            raise BadInputError(
                "worker-misses",
                worker_place(worker),
                expected=f"teacher {job.teacher} of sha256 {job.weights_sha256[:16]}",
                found=f"{files.weights_sha256[:16]} in {files.folder}",
            )
        try:
            _teachers[key] = load_teacher(
                files, device=device, dtype=job.dtype, spread=job.spread, compiled=job.compiled
            )
        except BadInputError as error:
            where = f"{worker_place(worker)}: {error.place}"
            raise BadInputError(
                error.kind, where, expected=error.expected, found=error.found, hint=error.hint
            ) from None
    return _teachers[key]


def _device(job: Job, worker_name: object) -> str:
    """Workers whose names are numbers, as local ones' are, take the GPUs they see in turn; others take their first."""
    if job.device == "cuda" and isinstance(worker_name, int) and torch.cuda.device_count():
        return f"cuda:{worker_name % torch.cuda.device_count()}"
    return job.device
