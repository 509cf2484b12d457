"""The files of docker/: what they name is in the repository, pinned, and open to this machine alone."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.compose import DOCKER, ROOT, arguments, compose, dockerfile, mounts

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FINAL = ("cpu", "cuda")
SERVICES: dict[str, dict[str, Any]] = compose()["services"]


def test_what_is_copied_is_there_and_is_all_that_a_build_needs() -> None:
    sources = {
        word for step in dockerfile() if step.name == "COPY" and step.stage == "build" for word in step.words[:-1]
    }
    assert all((ROOT / source).exists() for source in sources)
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert sources == needed | set(wheel["packages"]) | set(wheel["force-include"])
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in sent
    assert {line[1:] for line in sent if line.startswith("!")} == sources


def test_every_package_is_pinned_by_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    assert {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]} <= pins
    installs = [" ".join(step.words) for step in dockerfile() if step.name == "RUN" and "install" in step.words]
    pip = [command for command in installs if "pip" in command.split()]
    assert len(pip) == 2
    assert all("-c constraints.txt" in command for command in pip)
    assert all(not re.search(r"[<>=]=", command) for command in pip)


def test_the_base_image_is_one_version_of_python_that_the_package_allows() -> None:
    [image] = [word for word in arguments("ARG", ("",)) if word.startswith("PYTHON_IMAGE=")]
    version = re.fullmatch(r"PYTHON_IMAGE=python:(\d+\.\d+\.\d+)-slim-[a-z]+", image)
    assert version is not None
    assert version[1] in SpecifierSet(PROJECT["project"]["requires-python"])


def test_the_image_has_no_build_tools_and_runs_our_command_as_a_user() -> None:
    commands = " ".join(arguments("RUN", FINAL))
    assert not re.search(r"\b(pip|apt|apt-get|curl|wget|gcc)\b", commands)
    assert arguments("ENTRYPOINT", FINAL)[0] in PROJECT["project"]["scripts"]
    [user] = arguments("USER", FINAL)
    assert int(user.split(":")[0]) != 0
    made = commands.split()
    assert set(arguments("VOLUME", FINAL)) <= set(made)


def test_each_variant_is_a_stage_and_no_index_is_built_in() -> None:
    stages = [step.stage for step in dockerfile() if step.name == "FROM"]
    assert stages == ["build", "cpu", "cuda", "${VARIANT}"]
    assert "TORCH_INDEX=" in arguments("ARG", ("build",))
    texts = [path.read_text() for path in (*DOCKER.iterdir(), ROOT / ".dockerignore")]
    urls = {match for text in texts for match in re.findall(r"https?://([\w.-]+)", text)}
    assert urls == {"scheduler", "s3", "127.0.0.1"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_restarted_stopped_in_time_and_without_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["image"] == "kdpipe:cpu"
    assert (DOCKER / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    declared = {word.split("=")[0] for word in arguments("ARG", ("", "build"))}
    assert set(service["build"]["args"]) <= declared
    assert service["restart"]
    assert service["stop_grace_period"]
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert not {"privileged", "network_mode", "user"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_names_is_there(name: str) -> None:
    described, service = compose(), SERVICES[name]
    assert set(service["networks"]) <= set(described["networks"])
    folders = set(arguments("RUN", FINAL))
    for target, source in mounts(service).items():
        assert target in folders
        assert source in described["volumes"] or source.startswith(("./", "/"))
    for other, wanted in service.get("depends_on", {}).items():
        assert other in SERVICES
        assert wanted["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]


def test_ports_are_published_to_the_host_itself_and_the_schedulers_not_at_all() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8787:8787"]
    assert all("expose" not in service for service in SERVICES.values())


def test_whoever_writes_caches_shares_one_volume_and_inputs_are_read_only() -> None:
    for name in ("worker", "capture", "trainer"):
        assert mounts(SERVICES[name])["/caches"] == "caches"
        assert [volume for volume in SERVICES[name]["volumes"] if ":/inputs" in volume] == ["./inputs:/inputs:ro"]


def test_the_services_with_gpus_are_services() -> None:
    assert set(yaml.safe_load((DOCKER / "compose.cuda.yaml").read_text())["services"]) <= set(SERVICES)


def test_with_a_store_the_capture_writes_where_the_trainer_reads() -> None:
    text = (DOCKER / "compose.s3.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    assert set(services) - set(SERVICES) == {"s3"}
    said = {name: services[name]["command"] for name in ("capture", "trainer")}
    address = said["capture"][said["capture"].index("--store") + 1]
    assert said["trainer"][said["trainer"].index("--cache") + 1] == address
    # What the store changes is the address: all else is as without it.
    plain = [word for word in said["capture"] if word not in ("--store", address)]
    assert plain == SERVICES["capture"]["command"]
    assert [address if word == "/caches/cache" else word for word in SERVICES["trainer"]["command"]] == said["trainer"]
    for name in ("worker", "capture", "trainer"):
        assert {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(services[name]["environment"])
    assert "ports" not in services["s3"]
    assert re.search(r"\$\{S3_PASSWORD:\?", text), "a password is built in"
    assert re.fullmatch(r"\$\{S3_IMAGE:-[\w./-]+:[\w.-]+\}", services["s3"]["image"])
