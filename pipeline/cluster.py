"""Where workers come from: processes of this machine, or a dask cluster that runs already.

In: settings of workers. Out: a connected client. Local workers are reached over loopback only, unless they are told
otherwise, and then they speak TLS. docs/decisions/0018 has the reason of each setting.
"""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from dask.distributed import Client, LocalCluster, Security
from dask.system import CPU_COUNT
from distributed.scheduler import DEFAULT_EXTENSIONS
from distributed.spans import SpanMetadata, SpansSchedulerExtension

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.failures import first_line
from pipeline.workers_config import LOOPBACK, WorkersConfig

_LOCAL_SETTINGS = {
    # The client counts failures itself: it alone knows which errors are worth another try.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.worker-ttl": "5 minutes",
    "distributed.scheduler.work-stealing": True,
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.no-workers-timeout": None,
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.worker.lifetime.duration": None,
    "distributed.worker.profile.enabled": False,
    "distributed.diagnostics.nvml": False,
    "distributed.admin.low-level-log-length": 100,
}
DASHBOARD_PORT = 8787


@contextmanager
def connected(config: WorkersConfig, num_shards: int) -> Iterator[Client]:
    """A client of the workers that the settings name.

    Raises KdpipeError ``no-scheduler``, BadInputError ``no-cryptography``, ``no-dashboard``.
    """
    # Dask gives it a level of its own, whatever is asked of 'distributed'; what it would say, the campaign tells.
    logging.getLogger("distributed.client").setLevel(logging.NOTSET)
    if config.scheduler is not None:
        with _running_cluster(config) as client:
            yield client
        return
    num_workers = min(config.workers, num_shards)
    with (
        local_cluster(num_workers, host=config.workers_host, dashboard=config.dashboard) as cluster,
        Client(cluster, timeout=config.cluster_timeout, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def local_cluster(num_workers: int, *, host: str = LOOPBACK, dashboard: bool = False) -> Iterator[LocalCluster]:
    """Worker processes that leave Ctrl-C to this one: they end with it, and say nothing of it."""
    security = None if host == LOOPBACK else _temporary_security()
    if dashboard and importlib.util.find_spec("bokeh") is None:
        raise BadInputError("no-dashboard", "--dashboard", expected="bokeh", hint="pip install bokeh")
    # The processes inherit what is ignored; only a main thread may change it.
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    # Without a dashboard there is still a web server: it stays on loopback and serves nothing.
    served: dict[str, Any] = (
        {} if dashboard else {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}
    )
    web = f"{LOOPBACK}:{DASHBOARD_PORT if dashboard else 0}"
    try:
        with dask.config.set({**_LOCAL_SETTINGS, **served}):
            cluster = LocalCluster(
                n_workers=num_workers,
                threads_per_worker=1,
                processes=True,
                host=host,
                security=security,
                scheduler_kwargs={
                    "dashboard": dashboard,
                    "dashboard_address": web,
                    "extensions": {**DEFAULT_EXTENSIONS, "spans": ForgetfulSpans},
                },
                worker_dashboard_address=None if host == LOOPBACK else f"{LOOPBACK}:0",
                memory_limit=0,
                silence_logs=logging.CRITICAL,
            )
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
    with cluster:
        yield cluster


class ForgetfulSpans(SpansSchedulerExtension):
    """Dask's spans note what each submitted task is of, for as long as the scheduler runs: half a kB a shard."""

    def observe_tasks(self, tss: Any, code: Any, span_metadata: Any) -> Any:
        return super().observe_tasks(tss, code, SpanMetadata(collections=[]))


def local_threads(config: WorkersConfig) -> int | None:
    """CPU threads of each worker: an equal share of this machine's, or what is asked for; None leaves them alone."""
    if config.worker_threads is not None or config.scheduler is not None:
        return config.worker_threads
    return max(1, CPU_COUNT // config.workers)


def _temporary_security() -> Security:
    if importlib.util.find_spec("cryptography") is None:
        raise BadInputError(
            "no-cryptography", "--workers-host", expected="the package that makes certificates",
            hint="pip install cryptography, or leave the workers on loopback",
        )  # fmt: skip
    security: Security = Security.temporary()
    return security


@contextmanager
def _running_cluster(config: WorkersConfig) -> Iterator[Client]:
    assert config.scheduler is not None
    options: dict[str, Any] = {"timeout": config.cluster_timeout, "set_as_default": False, "direct_to_workers": False}
    if config.tls_ca is not None:
        options["security"] = Security(
            tls_ca_file=str(config.tls_ca),
            tls_client_cert=str(config.tls_cert),
            tls_client_key=str(config.tls_key),
            require_encryption=True,
        )
    is_file = "://" not in config.scheduler
    place = f"scheduler {config.scheduler}"
    if is_file and not Path(config.scheduler).is_file():
        expected = "tcp://HOST:PORT, tls://HOST:PORT or a scheduler file"
        raise BadInputError("no-scheduler", place, expected=expected, found="no such file")
    try:
        client = Client(**{"scheduler_file" if is_file else "address": config.scheduler}, **options)
    except (OSError, TypeError, ValueError, RuntimeError, KeyError, ImportError) as error:
        hint = "check that it runs, its address, and for tls:// the certificates"
        raise KdpipeError("no-scheduler", place, found=first_line(error), hint=hint) from None
    with client:
        yield client
