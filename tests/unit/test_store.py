"""Objects on a real S3 server: conditions hold, and what a store refuses is one line of ours."""

from __future__ import annotations

import pytest

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.store import Listed, ObjectStore
from tests.object_stores import BUCKET, RunningS3


@pytest.fixture
def store(s3: RunningS3, request: pytest.FixtureRequest) -> ObjectStore:
    return ObjectStore(f"s3://{BUCKET}/{request.node.name}/")


def test_an_object_is_put_once_under_the_condition_that_it_is_new(store: ObjectStore) -> None:
    first = store.put_new("folder/x", b"one")
    assert first is not None
    assert store.put_new("folder/x", b"two") is None
    assert store.put_new("folder/x", b"one") == first  # a request that was sent twice meets its own object
    assert store.get("folder/x") == b"one"


def test_an_object_is_replaced_only_as_it_was_seen(store: ObjectStore) -> None:
    first = store.put_new("x", b"one")
    assert first is not None
    assert store.replace("x", b"two", first) is not None
    assert store.replace("x", b"three", first) is None
    store.delete(["x"])
    assert store.replace("x", b"four", first) is None
    assert store.get("x") is None


def test_a_listing_tells_names_below_a_folder_and_sizes(store: ObjectStore) -> None:
    for name in ("a/1", "a/2", "ab/3"):
        store.put(name, name.encode())
    assert sorted(store.list("a/")) == [Listed("a/1", 3), Listed("a/2", 3)]
    assert len(list(store.list())) == 3
    assert list(store.get_many(["a/2", "gone", "a/1"])) == [b"a/2", None, b"a/1"]
    store.delete(["a/1", "gone"])
    assert [listed.name for listed in store.list("a/")] == ["a/2"]


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "s3:/bucket/x"])
def test_a_url_of_no_store_is_refused(url: str) -> None:
    with pytest.raises(BadInputError) as caught:
        ObjectStore(url)
    assert caught.value.kind == "bad-url"


def test_a_bucket_that_is_not_there_is_no_empty_one(s3: RunningS3) -> None:
    store = ObjectStore("s3://no-such-bucket/x")
    for asked in (lambda: store.get("x"), lambda: store.put("x", b""), lambda: list(store.list())):
        with pytest.raises(BadInputError) as caught:
            asked()
        assert caught.value.kind == "store-refused"
        assert "\n" not in str(caught.value)


def test_a_server_that_does_not_answer_is_a_failure_that_may_pass(
    s3: RunningS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(KdpipeError) as caught:
        ObjectStore(f"s3://{BUCKET}/x").get("x")
    assert caught.value.kind == "store-failed"
    assert not isinstance(caught.value, BadInputError)
