"""Several hosts on one machine: network namespaces behind a bridge, whose links can be cut.

In: names of hosts. Out: hosts with an address each, where processes are started with ``Host.enter`` before their
command. Nothing of this machine's own network is touched: bridge and links are in namespaces too. What is left of a
killed run is removed by the next one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clusters import Host

_PREFIX = "kdpipe-test-"
_RANGE = "192.0.2"
"""TEST-NET-1 of RFC 5737: nobody's."""
_BRIDGE = "bridge"


@dataclass(frozen=True)
class Network:
    """Hosts by name, and the bridge between them."""

    hub: str
    hosts: dict[str, Host]

    def cut(self, name: str) -> None:
        """Take a host's cable out of the bridge: whatever it sends is lost, and nobody is told."""
        _ip("-n", self.hub, "link", "set", name, "down")

    def mend(self, name: str) -> None:
        _ip("-n", self.hub, "link", "set", name, "up")


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """Hosts that see each other and nothing else; skips the test where they cannot be made."""
    _remove_stale()
    own = f"{_PREFIX}{os.getpid()}-"
    hub = f"{own}hub"
    hosts = {
        name: Host(f"{_RANGE}.{number}", ("ip", "netns", "exec", own + name))
        for number, name in enumerate(names, start=1)
    }
    try:
        _make_hub(hub)
        for name, host in hosts.items():
            _ip("netns", "add", own + name)
            _ip("-n", hub, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", own + name)
            _ip("-n", hub, "link", "set", name, "master", _BRIDGE, "up")
            _ip("-n", own + name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", own + name, "link", "set", device, "up")
        yield Network(hub, hosts)
    finally:
        for namespace in _namespaces(own):
            _remove(namespace)


def _make_hub(hub: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (iproute2)")
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", _BRIDGE, "type", "bridge")
        _ip("-n", hub, "link", "set", _BRIDGE, "up")
    except AssertionError as error:
        pytest.skip(f"no network namespaces with a bridge here: {error}")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


def _namespaces(prefix: str) -> list[str]:
    if shutil.which("ip") is None:
        return []
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(prefix)]


def _remove_stale() -> None:
    """Remove what runs have left whose process is gone."""
    for namespace in _namespaces(_PREFIX):
        if not Path("/proc", namespace.removeprefix(_PREFIX).split("-")[0]).exists():
            _remove(namespace)


def _remove(namespace: str) -> None:
    """End the processes of a namespace, and the namespace with its links."""
    with suppress(AssertionError):  # another run removes it too
        while pids := _ip("netns", "pids", namespace).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)
        _ip("netns", "delete", namespace)
