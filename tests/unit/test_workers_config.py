"""Settings of workers: what excludes or needs what, told with the setting's name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import pytest
from distributed.spans import SpanMetadata, SpansSchedulerExtension
from pydantic import ValidationError

from pipeline.cluster import ForgetfulSpans, local_cluster, local_threads
from pipeline.workers_config import WorkersConfig
from tests.refusals import refused

TLS = {"tls_ca": Path("a"), "tls_cert": Path("b"), "tls_key": Path("c")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 1, "scheduler": "tcp://there:1"}, "give one of them"),
        (TLS, "tls_ca means nothing without scheduler"),
        ({"scheduler": "tls://there:1", "tls_ca": Path("a")}, "tls_ca needs tls_cert"),
        ({"workers_host": "10.0.0.1"}, "workers_host means nothing without workers"),
        ({"worker_threads": 2}, "worker_threads means nothing"),
        ({"dashboard": True}, "dashboard means nothing"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WorkersConfig(**settings)


def test_workers_share_the_cpus_of_one_machine_and_those_of_a_cluster_keep_theirs() -> None:
    assert local_threads(WorkersConfig(workers=1000)) == 1
    assert local_threads(WorkersConfig(workers=2, worker_threads=3)) == 3
    assert local_threads(WorkersConfig(scheduler="tls://there:1", **TLS)) is None


def test_without_the_package_for_certificates_workers_stay_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = refused("no-cryptography", local_cluster(1, host="192.0.2.1").__enter__)
    assert "--workers-host" in told
    assert "pip install cryptography" in told


def test_the_scheduler_keeps_no_note_of_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Any] = []
    monkeypatch.setattr(SpansSchedulerExtension, "observe_tasks", lambda *arguments: noted.append(arguments[-1]))
    ForgetfulSpans(cast(Any, None)).observe_tasks([], (), SpanMetadata(collections=[{"type": "Future"}]))
    assert noted == [{"collections": []}]
