"""A cache goes to the Hub and comes back: few objects, few commits, and no revision with a half cache."""

from __future__ import annotations

import base64
import io
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cache_spec.errors import BadInputError, CacheError, KdpipeError, WouldLoseDataError
from cache_spec.hub import HubAddress, HubStore
from cache_spec.manifest import MANIFEST_NAME
from cache_spec.receipts import SEAL_NAME, receipt_object
from cache_spec.store import open_store
from pipeline import push_hub
from pipeline.cli import run
from pipeline.pull import pull
from pipeline.push import push
from pipeline.push_hub import STAGING_NAME, push_to_hub
from pipeline.transfer import Finished
from tests.hubs import RunningHub
from tests.unit.test_push import contents, written

# The Hub's library calls its own HTTP client in a way that this client advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PACK_BYTES = 4_000
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of two shards, with a table."""
    return written(tmp_path_factory.mktemp("pushed") / "cache")


@pytest.fixture
def repo(hub: RunningHub, request: pytest.FixtureRequest) -> str:
    return "lab/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[-60:].strip("-")


def sent(cache: Path, url: str, **given: Any) -> dict[str, Any]:
    return push_to_hub(Finished.open(cache), url, quiet=True, **{"pack_bytes": PACK_BYTES} | given)


def test_what_was_pushed_is_pulled_and_every_revision_is_whole_or_none(
    cache: Path, hub: RunningHub, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_hub, "_COMMIT_PACKS", 2)
    url = f"hf://datasets/{repo}"
    first = sent(cache, url)
    files = hub.tell("files", repo=repo)
    packs = [name for name in files if name.startswith("packs/")]
    assert len(packs) > 3
    assert set(files) - set(packs) == {"README.md", "packs.json", MANIFEST_NAME, SEAL_NAME}
    assert first["objects"] == first["sent_objects"] == len(files)
    commits = hub.tell("commits", repo=repo)
    assert len(commits) == 5
    for commit in commits[:-1]:
        assert not {MANIFEST_NAME, SEAL_NAME} & set(hub.tell("files", repo=repo, revision=commit))
    assert pull(url, tmp_path / "pulled", quiet=True)["received_shards"] == 2
    assert contents(tmp_path / "pulled") == contents(cache)
    hub.tell("clear")
    assert sent(cache, url)["sent_objects"] == 0
    assert not [request for request in hub.tell("requests") if request.startswith("PUT") or "/commit/" in request]
    assert not (cache / STAGING_NAME).exists()


def test_any_zip_reader_makes_the_cache_of_what_lies_on_the_hub(
    cache: Path, hub: RunningHub, repo: str, tmp_path: Path
) -> None:
    url = f"hf://datasets/{repo}"
    sent(cache, url)
    store = HubStore(url)
    for name in (MANIFEST_NAME, SEAL_NAME):
        (tmp_path / name).write_bytes(store.get(name) or b"")
    for name in hub.tell("files", repo=repo):
        if name.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(store.get(name) or b"")) as archive:
                archive.extractall(tmp_path)
    assert contents(tmp_path) == contents(cache)


def test_a_cache_fits_into_a_folder_of_a_branch(cache: Path, hub: RunningHub, repo: str, tmp_path: Path) -> None:
    sent(cache, f"hf://datasets/{repo}")
    other = written(tmp_path / "other", seed=1)
    url = f"hf://datasets/{repo}@second/caches/other"
    told = push(other, url, quiet=True)
    assert told["sent_objects"] == 5
    pull(url, tmp_path / "pulled", quiet=True)
    assert contents(tmp_path / "pulled") == contents(other)
    assert "caches/other/seal.json" in hub.tell("files", repo=repo, revision="second")
    assert "caches/other/seal.json" not in hub.tell("files", repo=repo)


def test_a_store_is_one_commit_and_goes_to_other_processes(cache: Path, hub: RunningHub, repo: str) -> None:
    sent(cache, f"hf://datasets/{repo}")
    expected = contents(cache)
    store = open_store(f"hf://datasets/{repo}")
    assert isinstance(store, HubStore)
    assert store.url == f"hf://datasets/{repo}@{hub.tell('commits', repo=repo)[-1]}"
    hub.tell("clear")
    again = pickle.loads(pickle.dumps(store))
    assert not hub.tell("requests")
    assert {listed.name: listed.num_bytes for listed in again.list()} == {n: len(data) for n, data in expected.items()}
    assert [listed.name for listed in again.list("receipts/")] == [receipt_object(0), receipt_object(1)]
    for name, data in expected.items():
        assert again.get(name) == data
    assert again.get("nothing") is None


def test_a_cache_is_verified_where_it_lies(
    cache: Path, hub: RunningHub, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDPIPE_HOME", str(tmp_path))
    sent(cache, f"hf://datasets/{repo}")
    assert run(["verify", f"hf://datasets/{repo}", "--json"]) == 0


def test_neighbours_are_read_in_one_request(cache: Path, hub: RunningHub, repo: str) -> None:
    sent(cache, f"hf://datasets/{repo}", pack_bytes=1 << 30)
    store = open_store(f"hf://datasets/{repo}")
    expected = contents(cache)
    names = [listed.name for listed in store.list() if listed.name in expected and ".json" not in listed.name]
    hub.tell("clear")
    assert list(store.get_many([*names, "nothing", names[0]])) == [
        *(expected[n] for n in names),
        None,
        expected[names[0]],
    ]
    # Tables and shards lie on both sides of the receipts.
    assert len([request for request in hub.tell("requests") if "/content/" in request]) <= 3


@pytest.mark.parametrize(
    ("pattern", "skip", "num_left"),
    [("PUT /upload", 0, 5), ("PUT /upload", 3, 3), ("/commit/", 0, 0), ("/preupload/", 1, 4)],
)
def test_a_push_that_fails_leaves_no_cache_and_goes_on(
    cache: Path, hub: RunningHub, repo: str, tmp_path: Path, pattern: str, skip: int, num_left: int
) -> None:
    url = f"hf://datasets/{repo}"
    hub.tell("fail", pattern=pattern, status=403, skip=skip)
    with pytest.raises(BadInputError) as caught:
        sent(cache, url)
    assert caught.value.kind == "store-refused"
    assert "\n" not in str(caught.value)
    with pytest.raises(CacheError) as none:
        pull(url, tmp_path / "pulled", quiet=True)
    assert none.value.kind == "not-a-cache"
    hub.tell("clear")
    sent(cache, url)
    assert len([request for request in hub.tell("requests") if request.startswith("PUT")]) == num_left
    pull(url, tmp_path / "pulled", quiet=True)
    assert contents(tmp_path / "pulled") == contents(cache)


def test_a_killed_push_goes_on_and_leaves_nothing_staged(
    cache: Path, hub: RunningHub, repo: str, tmp_path: Path
) -> None:
    url = f"hf://datasets/{repo}"
    hub.tell("fail", pattern="PUT /upload")
    command = [sys.executable, "-m", "pipeline.cli", "push", str(cache), url]
    pushing = subprocess.Popen(command, cwd=ROOT, env=os.environ | hub.environment, stderr=subprocess.DEVNULL)
    while not any(request.startswith("HANGS") for request in hub.tell("requests")):
        assert pushing.poll() is None
        time.sleep(0.05)
    with pytest.raises(WouldLoseDataError) as caught:
        push(cache, url, quiet=True)
    assert caught.value.kind == "cache-in-use"
    pushing.kill()
    pushing.wait()
    hub.tell("clear")
    assert any((cache / STAGING_NAME).iterdir())
    push(cache, url, quiet=True)
    assert not (cache / STAGING_NAME).exists()
    pull(url, tmp_path / "pulled", quiet=True)
    assert contents(tmp_path / "pulled") == contents(cache)


@pytest.mark.parametrize(
    "pattern", ["GET /api", "/preupload/", "objects/batch", "PUT /upload", "POST .*/commit/", "/resolve/"]
)
def test_a_request_too_many_is_asked_again_when_the_hub_says(
    cache: Path, hub: RunningHub, repo: str, tmp_path: Path, pattern: str
) -> None:
    hub.tell("fail", pattern=pattern, status=429, headers={"RateLimit": '"api";r=0;t=0', "Retry-After": "0"})
    url = f"hf://datasets/{repo}"
    sent(cache, url, pack_bytes=1 << 30)
    pull(url, tmp_path / "pulled", quiet=True)
    assert contents(tmp_path / "pulled") == contents(cache)


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_damaged_pack_is_found(cache: Path, hub: RunningHub, repo: str, tmp_path: Path, is_gone: bool) -> None:
    url = f"hf://datasets/{repo}"
    sent(cache, url, pack_bytes=1_000)
    index = HubStore(url).index
    assert index is not None
    place = index.places["head_gaps/c.1.0.0"]
    whole = bytes(next(pack.num_bytes for pack in index.packs if pack.name == place.pack))
    data = None if is_gone else base64.b64encode(whole).decode()
    hub.tell("change", repo=repo, path=place.pack, data=data)
    with pytest.raises(CacheError) as caught:
        pull(url, tmp_path / "pulled", quiet=True)
    assert caught.value.kind == ("missing-shard" if is_gone else "shard-digest")
    assert caught.value.place.startswith(f"hf://datasets/{repo}@")
    assert not (tmp_path / "pulled" / SEAL_NAME).exists()


def test_another_cache_and_another_push_are_not_overwritten(
    cache: Path, hub: RunningHub, repo: str, tmp_path: Path
) -> None:
    url = f"hf://datasets/{repo}"
    sent(cache, url)
    before = hub.tell("files", repo=repo)
    with pytest.raises(WouldLoseDataError) as caught:
        sent(written(tmp_path / "other", seed=1), url)
    assert caught.value.kind == "other-cache"
    assert hub.tell("files", repo=repo) == before


def test_a_dataset_is_private_where_that_is_asked(cache: Path, hub: RunningHub, repo: str) -> None:
    assert sent(cache, f"hf://datasets/{repo}", dry_run=True)["sent_bytes"] > 0
    assert not [request for request in hub.tell("requests") if "create" in request]
    sent(cache, f"hf://datasets/{repo}", private=True)
    assert sent(cache, f"hf://datasets/{repo}", private=True)["sent_objects"] == 0
    sent(cache, f"hf://datasets/{repo}-public")
    with pytest.raises(BadInputError) as caught:
        sent(cache, f"hf://datasets/{repo}-public", private=True)
    assert caught.value.kind == "public-dataset"


def test_the_card_says_what_the_cache_is(cache: Path, hub: RunningHub, repo: str) -> None:
    url = f"hf://datasets/{repo}"
    sent(cache, url)
    card = (HubStore(url).get("README.md") or b"").decode()
    for said in ("tiny-teacher", "made-up.txt", "bytes a token", "licences of both", f"kdpipe pull {url} "):
        assert said in card


@pytest.mark.parametrize(
    "url",
    [
        "hf://x",
        "hf://models/a/b",
        "hf://datasets/a",
        "hf://datasets/a/b/../c",
        "hf://datasets/../b",
        "hf://datasets/a/b@",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BadInputError) as caught:
        HubAddress.parse(url)
    assert caught.value.kind == "bad-url"


def test_an_address_has_its_parts() -> None:
    address = HubAddress.parse("hf://datasets/org/name@refs%2Fpr%2F1/a/b/")
    assert address == HubAddress("org/name", "refs/pr/1", "a/b")
    assert str(address) == "hf://datasets/org/name@refs%2Fpr%2F1/a/b"


def test_what_is_not_there_is_refused_in_one_line(cache: Path, hub: RunningHub) -> None:
    for url in ("hf://datasets/lab/none", "hf://datasets/lab/none@branch"):
        with pytest.raises(BadInputError) as caught:
            open_store(url)
        assert caught.value.kind == "store-refused"
    with pytest.raises(BadInputError) as caught:
        sent(cache, f"hf://datasets/lab/none@{'0' * 40}")
    assert caught.value.kind == "bad-url"


def test_a_hub_that_is_not_reached_is_one_line(hub: RunningHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(KdpipeError) as caught:
        open_store("hf://datasets/lab/none")
    assert caught.value.kind == "store-failed"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInputError) as offline:
        open_store("hf://datasets/lab/none")
    assert offline.value.kind == "hub-offline"
    assert "HF_HUB_OFFLINE" in str(offline.value)
