"""A capture over several hosts with TLS: one of them is cut off, then dies, and the cache comes out the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.capture import capture
from pipeline.config import CaptureConfig
from tests.certificates import Authority, Certificate
from tests.clusters import ENVIRONMENT, Host, running_cluster, wait_until
from tests.hosts import Network, network
from tests.integration.test_capture import contents
from tests.models import make_folder, write_words

CUT_S = 2.0
"""Four times what a worker of a small cluster waits between two heartbeats."""
STRANGERS = """
import json, sys
from cache_spec.errors import KdpipeError
from pipeline.cluster import connected
from pipeline.workers_config import WorkersConfig

for tls in json.loads(sys.argv[2]):
    try:
        with connected(WorkersConfig(scheduler=sys.argv[1], cluster_timeout=1, **tls), 1):
            print("let in")
    except KdpipeError as error:
        print(error)
"""


HANDSHAKES = """
import socket, ssl, sys

host, *ports = sys.argv[1:]
context = ssl._create_unverified_context()
for port in ports:
    try:
        with socket.create_connection((host, int(port)), 10) as plain, context.wrap_socket(plain) as spoken:
            print(spoken.recv(1))
    except ssl.SSLError as error:
        print(error.reason)
"""
LOCAL = """
import sys
from pipeline.cluster import connected
from pipeline.workers_config import WorkersConfig

with connected(WorkersConfig(workers=2, workers_host=sys.argv[1]), 2) as client:
    print(client.submit(pow, 2, 10).result(), client.scheduler.address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with network("scheduler", "steady", "cut", "client") as made:
        yield made


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, hosts: Network) -> CaptureConfig:
    """Settings of a capture that one process has made."""
    folder = tmp_path_factory.mktemp("captures")
    config = CaptureConfig(
        teacher=str(make_folder(folder / "teacher", spread=4.0, n_layer=1)),
        text=(str(write_words(folder / "text.jsonl", num_documents=30)),),
        out=folder / "clean",
        encoding="topk",
        k=4,
        block_tokens=16,
        batch_blocks=1,
        shard_blocks=1,
        hidden_window=8,
        device="cpu",
    )
    capture(config, quiet=True)
    return config


def start(host: Host, log: Path, *words: str) -> subprocess.Popen[bytes]:
    with open(log, "wb") as told:
        return subprocess.Popen(
            [*host.enter, sys.executable, *words], env={**os.environ, **ENVIRONMENT}, stdout=told, stderr=told
        )


def start_capture(host: Host, config: CaptureConfig, out: Path, *flags: str) -> subprocess.Popen[bytes]:
    """The same capture by the command, into another folder."""
    settings = {**config.model_dump(mode="json", exclude_unset=True), "text": config.text[0], "out": out}
    given = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return start(host, out.with_suffix(".log"), "-m", "pipeline.cli", "cache-teacher", *given, *flags)


def start_strangers(
    host: Host, address: str, ours: Certificate, theirs: Certificate, log: Path
) -> subprocess.Popen[bytes]:
    """Clients without a certificate, with one of another authority, and with that and the right idea of ours."""
    known = {"tls_ca": str(theirs.authority), "tls_cert": str(theirs.certificate), "tls_key": str(theirs.key)}
    tries = [{}, known, {**known, "tls_ca": str(ours.authority)}]
    return start(host, log, "-c", STRANGERS, address, json.dumps(tries))


def receipts(cache: Path) -> int:
    return len(list(cache.glob("receipts/0*.json")))


def more(cache: Path, than: int) -> bool:
    return receipts(cache) > than


@pytest.mark.slow
def test_a_host_that_is_cut_off_goes_on_and_one_that_dies_costs_nothing(
    hosts: Network, clean: CaptureConfig, tmp_path: Path
) -> None:
    ours = Authority(tmp_path, "ours").certify("node")
    theirs = Authority(tmp_path, "theirs").certify("stranger")
    scheduler, client = hosts.hosts["scheduler"], hosts.hosts["client"]
    cache = tmp_path / "cache"
    with running_cluster(tmp_path, 0, scheme="tls", options=ours.dask_options, host=scheduler) as cluster:
        capturing = start_capture(client, clean, cache, "--scheduler", cluster.address, *ours.options)
        cluster.processes.append(capturing)
        steady, cut = (cluster.start_worker(hosts.hosts[name]) for name in ("steady", "cut"))

        wait_until(partial(more, cache, 4))
        steady.send_signal(signal.SIGSTOP)
        wait_until(partial(more, cache, receipts(cache)))  # the other one is at work too
        hosts.cut("cut")
        strangers = start_strangers(client, cluster.address, ours, theirs, tmp_path / "strangers.log")
        cluster.processes.append(strangers)
        time.sleep(CUT_S / 2)  # what it still knew of is made
        before = receipts(cache)
        time.sleep(CUT_S / 2)
        assert receipts(cache) == before
        assert cut.poll() is None
        hosts.mend("cut")
        wait_until(partial(more, cache, before))
        cut.kill()
        steady.send_signal(signal.SIGCONT)

        assert receipts(cache) < receipts(clean.out)
        assert strangers.wait() == 0
        assert capturing.wait() == 0, cache.with_suffix(".log").read_text()
    assert contents(cache) == contents(clean.out)
    told = (tmp_path / "strangers.log").read_text().splitlines()
    assert len(told) == 3
    assert all(line.startswith(f"no-scheduler: scheduler {cluster.address}") for line in told), told


def test_local_workers_that_leave_loopback_listen_where_they_are_told_and_speak_tls_alone(
    hosts: Network, tmp_path: Path
) -> None:
    host, other = hosts.hosts["steady"], hosts.hosts["client"]
    command = [*host.enter, sys.executable, "-c", LOCAL, host.address]
    environment = {**os.environ, **ENVIRONMENT}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as local:
        assert local.stdout is not None
        result, address = local.stdout.readline().split()
        assert result == "1024"
        assert address.startswith(f"tls://{host.address}:")

        command = [*host.enter, "ss", "--no-header", "--listening", "--tcp", "--numeric"]
        listening = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        open_to = [line.split()[3].rsplit(":", 1) for line in listening]
        assert {place for place, _ in open_to} == {host.address, "127.0.0.1"}
        ports = [int(port) for place, port in open_to if place == host.address]
        assert len(ports) == 5  # the scheduler, two workers and their nannies
        done = subprocess.run([*other.enter, sys.executable, "-c", HANDSHAKES, host.address, *map(str, ports)],
                              check=True, capture_output=True, text=True)  # fmt: skip
        assert done.stdout.split() == ["TLSV13_ALERT_CERTIFICATE_REQUIRED"] * len(ports)
        local.communicate("")
    assert local.returncode == 0
