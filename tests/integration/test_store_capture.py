"""A capture whose shards go to a real S3 server: the same cache as in a folder, after interruptions too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cache_spec import store_commit
from cache_spec.errors import BadInputError, WouldLoseDataError
from cache_spec.receipts import receipt_object
from cache_spec.store import ObjectStore
from cache_spec.validate import verify_cache
from pipeline.capture import capture
from pipeline.config import CaptureConfig, TranscodeConfig
from tests.integration.test_capture import SETTINGS, contents
from tests.models import make_folder, write_words
from tests.object_stores import BUCKET, RunningS3


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> CaptureConfig:
    """A cache in a folder, with a table and pooled hidden states."""
    folder = tmp_path_factory.mktemp("clean")
    teacher = make_folder(folder / "teacher", spread=4.0)
    text = write_words(folder / "text.jsonl")
    settings = {name: value for name, value in SETTINGS.items() if name != "k"}
    config = CaptureConfig(
        teacher=str(teacher), text=(str(text),), out=folder / "cache", **{**settings, "encoding": "hidden"}
    )
    capture(config, quiet=True)
    return config


@pytest.fixture
def url(s3: RunningS3, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KDPIPE_HOME", str(tmp_path / "home"))
    return f"s3://{BUCKET}/{request.node.name}"


def stored(clean: CaptureConfig, url: str, **settings: Any) -> CaptureConfig:
    return CaptureConfig(**{**clean.model_dump(exclude_unset=True), "out": url, **settings})


def fetched(url: str, folder: Path) -> Path:
    """Every object of a store as a file of a folder."""
    store = ObjectStore(url)
    names = [listed.name for listed in store.list()]
    for name, data in zip(names, store.get_many(names), strict=True):
        assert data is not None
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def interrupted_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], None]:
    """A capture ends before its shard of that number is published; what is returned puts an end to that."""
    original, seen = store_commit.publish_to_store, []

    def publish(*args: Any) -> Any:
        seen.append(1)
        if len(seen) > number:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr("pipeline.place.publish_to_store", publish)
    return lambda: monkeypatch.setattr("pipeline.place.publish_to_store", original)


def test_a_cache_in_a_store_is_the_one_in_a_folder(clean: CaptureConfig, url: str, tmp_path: Path) -> None:
    config = stored(clean, url)
    told = capture(config, quiet=True)
    assert told["cache"] == url
    assert config.out.is_relative_to(tmp_path / "home")
    cache = fetched(url, tmp_path / "fetched")
    assert contents(cache) == contents(clean.out)
    assert verify_cache(cache) == []
    assert not list(config.out.glob("receipts/*"))
    assert not list(config.out.glob("input_ids/c.*"))
    again = capture(config, quiet=True)
    assert again == {**told, "shards_captured_now": 0}


def test_another_machine_goes_on_where_one_stopped(
    clean: CaptureConfig, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = interrupted_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        capture(stored(clean, url), quiet=True)
    go_on()
    store = ObjectStore(url)
    assert store.get("seal.json") is None
    # One commit more was cut off between its claim and its receipt, one receipt lost a file, and one was damaged.
    store.put(receipt_object(2), b'{"claim":"of a killed writer"}\n')
    store.put("input_ids/c.2.0", b"half of an object")
    store.delete(["input_ids/c.1.0"])
    told = capture(stored(clean, str(tmp_path / "elsewhere"), store=url), quiet=True)
    assert told["shards_captured_now"] == told["shards"] - 1
    assert contents(fetched(url, tmp_path / "fetched")) == contents(clean.out)


def test_a_shard_that_lost_an_object_after_the_seal_is_made_again(
    clean: CaptureConfig, url: str, tmp_path: Path
) -> None:
    capture(stored(clean, url), quiet=True)
    ObjectStore(url).delete(["input_ids/c.1.0"])
    assert capture(stored(clean, url), quiet=True)["shards_captured_now"] == 1
    assert contents(fetched(url, tmp_path / "fetched")) == contents(clean.out)


def test_workers_commit_to_the_store_themselves(clean: CaptureConfig, url: str, tmp_path: Path) -> None:
    capture(stored(clean, url, workers=1, worker_threads=1), quiet=True)
    assert contents(fetched(url, tmp_path / "fetched")) == contents(clean.out)


def test_a_store_without_conditions_is_no_place_for_a_capture(
    clean: CaptureConfig, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_new(self: ObjectStore, name: str, data: bytes) -> Any:
        self.put(name, data)
        return self.head(name)

    monkeypatch.setattr(ObjectStore, "put_new", put_new)
    with pytest.raises(BadInputError) as caught:
        capture(stored(clean, url), quiet=True)
    assert caught.value.kind == "no-conditions"
    assert [listed.name for listed in ObjectStore(url).list()] == []


def test_another_cache_at_the_address_or_in_the_folder_stays(clean: CaptureConfig, url: str, tmp_path: Path) -> None:
    config = stored(clean, url)
    capture(config, quiet=True)
    before = dict(ObjectStore(url).list())
    with pytest.raises(WouldLoseDataError) as caught:
        capture(stored(clean, url, temperatures=(1.0,)), quiet=True)
    assert caught.value.kind == "other-settings"
    assert "temperatures" in str(caught.value)
    other = CaptureConfig(**{**clean.model_dump(exclude_unset=True), "out": tmp_path / "x", "block_tokens": 8})
    capture(other, quiet=True)
    with pytest.raises(WouldLoseDataError) as caught:
        capture(stored(clean, str(other.out), store=url), quiet=True)
    assert caught.value.kind == "other-cache"
    assert dict(ObjectStore(url).list()) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"out": "hf://datasets/me/cache"}, "the hub takes a finished cache"),
        ({"out": "work", "store": "bucket/name"}, "no address of a store"),
        ({"out": "s3://bucket/name", "store": "s3://bucket/other"}, "a folder where store is the address"),
    ],
)
def test_addresses_that_mean_nothing_are_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CaptureConfig(teacher="t", text=("x",), **settings)


def test_transcoding_writes_to_folders() -> None:
    with pytest.raises(ValidationError, match="a folder"):
        TranscodeConfig(cache=Path("c"), out="s3://bucket/name")
