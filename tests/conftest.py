"""What holds for every test: no network, few threads, no leftovers of a user's settings."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from tests.hubs import RunningHub, running_hub
from tests.object_stores import RunningS3, running_s3

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("kdpipe", deadline=None)
hypothesis.settings.load_profile("kdpipe")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models are slower on more threads.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that would leave this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[RunningS3]:
    with running_s3() as server:
        yield server


@pytest.fixture
def s3(_s3_server: RunningS3, monkeypatch: pytest.MonkeyPatch) -> RunningS3:
    """An S3 server that all tests share, each below a prefix of its own, and the environment that leads to it."""
    for name, value in _s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture(scope="session")
def _hub_server() -> Iterator[RunningHub]:
    with running_hub() as server:
        yield server


@pytest.fixture
def hub(_hub_server: RunningHub, monkeypatch: pytest.MonkeyPatch) -> RunningHub:
    """A Hub that all tests share, each with data sets of its own; this process may reach it, and no other."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

    monkeypatch.setattr(constants, "ENDPOINT", _hub_server.url)
    template = f"{_hub_server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    _hub_server.tell("clear")
    close_session()
    return _hub_server
