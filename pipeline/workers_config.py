"""Settings of where a capture's shards are made: in this process, on local workers or on a dask cluster.

In: values from flags and recipes. Out: checked fields of ``CaptureConfig``; none of them changes a byte of the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOOPBACK = "127.0.0.1"
_OF_A_SCHEDULER = ("tls_ca", "tls_cert", "tls_key")


class WorkersConfig(BaseModel):
    """Who makes the shards, and how much of their trouble is put up with."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    HEADINGS: ClassVar = {"workers": "Workers and clusters"}

    workers: int = Field(default=0, ge=0)
    """Worker processes on this machine; 0 runs in this process."""
    scheduler: str | None = None
    """Running dask cluster to make the shards on: tcp://HOST:PORT, tls://HOST:PORT or a scheduler file. Its workers
    must see the cache's folder at the same path."""
    tls_ca: Path | None = None
    """Certificate of the authority that signed the cluster's, for tls://.  [default: dask's configuration]"""
    tls_cert: Path | None = None
    """Certificate of this client, for tls://."""
    tls_key: Path | None = None
    """Key of this client, for tls://."""
    workers_host: str = LOOPBACK
    """Address that local workers listen on; any but loopback makes them speak TLS, with certificates of this run."""
    worker_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the teacher in each worker.  [default: a share of this machine's; on a cluster, as it is set]"""
    shard_retries: int = Field(default=3, ge=1)
    """Failures of one shard, or workers that it killed, after which it is given up and the others go on."""
    cluster_timeout: float = Field(default=120.0, gt=0)
    """Seconds without a scheduler that answers, or without any worker, after which the run stops."""
    dashboard: bool = False
    """Serve dask's dashboard on loopback, or say where the cluster's is."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        tls = [name for name in _OF_A_SCHEDULER if getattr(self, name) is not None]
        if self.scheduler is not None and self.workers:
            raise ValueError("workers are of this machine, scheduler is a cluster: give one of them")
        if tls and self.scheduler is None:
            raise ValueError(f"{tls[0]} means nothing without scheduler")
        if tls and len(tls) < len(_OF_A_SCHEDULER):
            missing = next(name for name in _OF_A_SCHEDULER if name not in tls)
            raise ValueError(f"{tls[0]} needs {missing} beside it")
        if self.workers_host != LOOPBACK and not self.workers:
            raise ValueError("workers_host means nothing without workers")
        if self.worker_threads is not None and not self.distributed:
            raise ValueError("worker_threads means nothing without workers or scheduler")
        if self.dashboard and not self.distributed:
            raise ValueError("dashboard means nothing without workers or scheduler")
        return self

    @property
    def distributed(self) -> bool:
        """Whether shards are made by dask workers."""
        return bool(self.workers) or self.scheduler is not None
