"""The images and services of docker/ without a container engine: their files are parsed, their services are processes.

In: docker/Dockerfile, docker/compose.yaml. Out: instructions and services as written; processes on loopback that have
a service's entry point, arguments and environment, where names of services are 127.0.0.1, ports are free ones and the
folders of volumes lie below one folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.clusters import ENVIRONMENT, wait_until
from tests.processes import free_port

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_WORKER_PORT = "8788"
_OWN_FOLDER = "/tmp"


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, its continued lines joined."""

    name: str
    words: list[str]
    stage: str
    """The build stage that it belongs to; empty before the first."""


def dockerfile() -> list[Instruction]:
    """The instructions of docker/Dockerfile, in order."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    found: list[Instruction] = []
    stage = ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, rest = line.split(maxsplit=1)
        words = json.loads(rest) if rest.startswith("[") else shlex.split(rest)
        if name == "FROM":
            stage = words[-1]
        found.append(Instruction(name, words, stage))
    return found


def arguments(name: str, stages: tuple[str, ...]) -> list[str]:
    """All words of one kind of instruction in these stages."""
    return [word for step in dockerfile() if step.name == name and step.stage in stages for word in step.words]


def compose(**variables: str) -> dict[str, Any]:
    """docker/compose.yaml, its variables replaced by these or by their defaults."""

    def value(match: re.Match[str]) -> str:
        default: str | None = match[2]
        assert match[1] in variables or default is not None, f"{match[0]} has no default"
        return variables.get(match[1], default or "")

    loaded: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(value, (DOCKER / "compose.yaml").read_text()))
    return loaded


def mounts(service: Mapping[str, Any]) -> dict[str, str]:
    """What each folder of a service is: the name of a volume or a folder of the host."""
    return {target: source for source, target, *_ in (volume.split(":") for volume in service["volumes"])}


def _passes(check: list[str]) -> bool:
    if subprocess.run(check, capture_output=True).returncode == 0:
        return True
    time.sleep(0.5)  # what is checked may need the core
    return False


class Services:
    """Services of compose.yaml as processes, in the order that ``depends_on`` asks for."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.described: dict[str, dict[str, Any]] = compose(**variables)["services"]
        self.ports = {port: str(free_port()) for port in ("8786", "8787")}
        self.processes: dict[str, list[subprocess.Popen[bytes]]] = {}
        self.checks: dict[str, list[list[str]]] = {}

    def path(self, target: str) -> Path:
        """Where a folder of the containers lies."""
        return self.folder / target.strip("/")

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start the replicas of a service, once what it depends on is as asked; the last one comes back."""
        service = self.described[name]
        for other, wanted in service.get("depends_on", {}).items():
            self._wait(other, wanted["condition"])
        for number in range(int(service.get("deploy", {}).get("replicas", 1))):
            self._start(name, number)
        return self.processes[name][-1]

    def _wait(self, name: str, condition: str) -> None:
        if condition == "service_completed_successfully":
            assert self.processes[name][-1].wait() == 0, self.log(name)
        elif condition == "service_healthy":
            for check in self.checks[name]:
                wait_until(partial(_passes, check))
        else:
            assert condition == "service_started"
            assert self.processes[name]

    def _start(self, name: str, number: int) -> None:
        service = self.described[name]
        ports = {**self.ports, _WORKER_PORT: str(free_port())}
        own = self.folder / f"{name}-{number}"
        folders = {target: str(self.path(target)) for target in mounts(service)} | {_OWN_FOLDER: str(own)}
        for folder in folders.values():
            Path(folder).mkdir(exist_ok=True)

        def local(word: str) -> str:
            if word.startswith("/"):
                root = "/" + word.split("/")[1]
                assert root in folders, f"{name}: nothing is mounted at {word}"
                return folders[root] + word[len(root) :]
            for service_name in self.described:
                word = re.sub(rf"(?<![\w-]){service_name}(?![\w-])", "127.0.0.1", word)
            return re.sub(r"\b\d{4}\b", lambda match: ports.get(match[0], match[0]), word)

        [program] = service.get("entrypoint", arguments("ENTRYPOINT", ("cpu",)))
        command, *words = service["command"]
        image = dict(pair.split("=", 1) for pair in arguments("ENV", ("cpu",)))
        del image["PATH"]
        image["HF_HOME"] = str(self.path(image["HF_HOME"]))
        environment = {key: str(value) for key, value in service.get("environment", {}).items()}
        self.checks.setdefault(name, [])
        if "healthcheck" in service:
            kind, python, *rest = service["healthcheck"]["test"]
            assert (kind, python) == ("CMD", "python")
            self.checks[name].append([sys.executable, *map(local, rest)])
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [str(Path(sys.executable).parent / program), command, *map(local, words)],
                cwd=own,
                env={**os.environ, **ENVIRONMENT, **image, **environment},
                stdout=log,
                stderr=log,
            )
        self.processes.setdefault(name, []).append(process)

    def healthy(self, name: str) -> None:
        """Return when all replicas of a service pass its health check."""
        self._wait(name, "service_healthy")

    def stop(self, name: str) -> list[int]:
        """Stop a service by the image's signal; the exit codes of its replicas."""
        [number] = arguments("STOPSIGNAL", ("cpu",))
        for process in self.processes[name]:
            process.send_signal(signal.Signals[number])
        return [process.wait() for process in self.processes[name]]

    def log(self, name: str) -> str:
        """What a service has said."""
        return (self.folder / f"{name}.log").read_text()


@contextmanager
def services(folder: Path, **variables: str) -> Iterator[Services]:
    """Services that end with the test, whatever becomes of it."""
    made = Services(folder, **variables)
    try:
        yield made
    finally:
        for process in (process for replicas in made.processes.values() for process in replicas):
            process.kill()
            process.wait()
