"""Objects under one prefix of an object store: read, listed, and put under conditions.

In: a URL, such as ``s3://bucket/prefix``, and the store's own environment variables for credentials and endpoint. Out:
bytes by name, and errors of ours: ``bad-url``, ``store-refused`` for what lasts, ``store-failed`` for what may pass.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import from_url

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.failures import first_line

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ClientConfig
    from obstore.store import ObjectStore as Objects

SCHEMES = ("s3", "gs", "az", "hf")
_URL = re.compile(r"([a-z][a-z0-9]*)://(.+)")
_NO_BUCKET = "NoSuchBucket"
_AT_ONCE = 32
"""Requests under way when many objects are read."""


class Version(NamedTuple):
    """What a store calls the present content of an object."""

    e_tag: str | None
    version: str | None


class Listed(NamedTuple):
    """An object in a listing."""

    name: str
    """Relative to the prefix."""
    num_bytes: int


class ReadableStore(Protocol):
    """Where a cache can be read."""

    url: str

    def get(self, name: str) -> bytes | None:
        """Content of an object; None if there is none."""
        ...

    def get_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Contents of objects in the order of ``names``, in as few round trips as the store allows."""
        ...

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """Every object whose name begins with ``prefix``, a folder's name and a slash."""
        ...


def home_folder() -> Path:
    """What this program keeps for a user between runs lies below: ``$KDPIPE_HOME``, or ``~/.cache/kdpipe``."""
    return Path(os.environ.get("KDPIPE_HOME") or "~/.cache/kdpipe").expanduser()


def is_url(path: object) -> bool:
    """Whether a path names a store: ``SCHEME://...``."""
    return _URL.fullmatch(str(path)) is not None


def open_store(url: str) -> ReadableStore:
    """The store at ``url``, to be read; BadInputError ``bad-url``."""
    if url.startswith("hf://"):
        from cache_spec.hub import HubStore

        return HubStore(url)
    return ObjectStore(url)


class ObjectStore:
    """Objects under a prefix of S3, Google Cloud Storage, Azure or what speaks their language."""

    def __init__(self, url: str) -> None:
        matched = _URL.fullmatch(url)
        if matched is None or matched[1] not in SCHEMES:
            expected = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise BadInputError("bad-url", url, expected=f"an address that begins with one of {expected}")
        self.url = url.rstrip("/")

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        return type(self), (self.url,)

    @cached_property
    def _objects(self) -> Objects:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        # The default limit of 30 s for a whole request would cut off a large shard on a slow line.
        options: ClientConfig = {
            "allow_http": endpoint.startswith("http://"),
            "read_timeout": "60s",
            "timeout": "15m",
        }
        try:
            return from_url(self.url, client_options=options)
        except (BaseError, UnknownConfigurationKeyError, ValueError) as error:
            raise BadInputError("bad-url", self.url, found=_told(error)) from None

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        place = f"{self.url}/{name}"
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            hint = "check the store's credentials in the environment"
            raise BadInputError("store-refused", place, found=_told(error), hint=hint) from None
        except (FileNotFoundError, BaseError) as error:
            if isinstance(error, FileNotFoundError) or _NO_BUCKET in str(error):
                raise BadInputError("store-refused", place, expected="a bucket that is there") from None
            hint = "run the same command again when the store answers"
            raise KdpipeError("store-failed", place, found=_told(error), hint=hint) from None

    def get(self, name: str) -> bytes | None:
        """Content of an object; None if there is none."""
        found = self.get_versioned(name)
        return None if found is None else found[0]

    def get_versioned(self, name: str) -> tuple[bytes, Version] | None:
        """Content of an object and what the store calls it; None if there is none."""
        with self._asking(name):
            try:
                result = obstore.get(self._objects, name)
            except FileNotFoundError as error:
                if _NO_BUCKET in str(error):
                    raise
                return None
            meta = result.meta
            return bytes(result.bytes()), Version(meta["e_tag"], meta["version"])

    def head(self, name: str) -> Version | None:
        """What the store calls an object's present content; None if there is none."""
        with self._asking(name):
            try:
                meta = obstore.head(self._objects, name)
            except FileNotFoundError:  # of an answer without a body: a missing bucket looks the same
                return None
            return Version(meta["e_tag"], meta["version"])

    def get_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Contents of objects in the order of ``names``, many requests at once."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from pool.map(self.get, names)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """Every object whose name begins with ``prefix``, a folder's name and a slash."""
        with self._asking(prefix):
            for page in obstore.list(self._objects, prefix=prefix or None):
                yield from (Listed(meta["path"], meta["size"]) for meta in page)

    def put(self, name: str, data: bytes) -> None:
        """Write an object, or another one's place."""
        with self._asking(name):
            obstore.put(self._objects, name, data, use_multipart=False)

    def put_new(self, name: str, data: bytes) -> Version | None:
        """Write an object that is not there; None if one is, unless it is this very one.

        A request whose answer was lost is sent again and then meets its own object.
        """
        with self._asking(name):
            try:
                put = obstore.put(self._objects, name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return self._ours(name, data)
            return Version(put["e_tag"], put["version"])

    def replace(self, name: str, data: bytes, seen: Version) -> Version | None:
        """Write in the place of the content called ``seen``; None if it is another by now, unless it is this one."""
        version: UpdateVersion = {}
        if seen.e_tag is not None:
            version["e_tag"] = seen.e_tag
        if seen.version is not None:
            version["version"] = seen.version
        with self._asking(name):
            try:
                put = obstore.put(self._objects, name, data, mode=version, use_multipart=False)
            except (PreconditionError, AlreadyExistsError, FileNotFoundError):
                return self._ours(name, data)
            return Version(put["e_tag"], put["version"])

    def _ours(self, name: str, data: bytes) -> Version | None:
        found = self.get_versioned(name)
        return found[1] if found is not None and found[0] == data else None

    def delete(self, names: Iterable[str]) -> None:
        """Take objects away; those that are not there are no error."""
        with self._asking(""):
            obstore.delete(self._objects, list(names))


def _told(error: BaseException) -> str:
    """What a store says, without the debugging form that follows it."""
    return first_line(error).split("Debug source:")[0].strip()
