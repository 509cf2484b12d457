"""Caches on the Hugging Face Hub, read at one commit.

In: an address, ``hf://datasets/ORG/NAME[@REVISION][/FOLDER]``, and the Hub library's own settings (token, endpoint).
Out: bytes by name, out of packs or plain files, and errors of ours: ``bad-url``, ``hub-offline``, ``store-refused`` for
what lasts, ``store-failed`` for what may pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple
from urllib.parse import quote, unquote

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

from cache_spec.errors import BadInputError, CacheError, KdpipeError
from cache_spec.failures import first_line
from cache_spec.packs import INDEX_NAME, PackIndex, Place
from cache_spec.store import Listed

REPO_TYPE = "dataset"
MAIN = "main"
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/@]+))?((?:/[^/]+)*)/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The library's HTTP client has had several names; its base error is what the library's own derives from.
_CLIENT_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]
_REFUSED = (401, 403)
_TIMEOUT_S = 120.0
_AT_ONCE = 4
_RANGE_BYTES = 1 << 26
"""Files of a pack that follow each other are read in one request up to this size."""
_GAP_BYTES = 1 << 12
"""What lies between two files of an archive, and is read with them."""


class HubAddress(NamedTuple):
    """A folder of a dataset repository."""

    repo: str
    revision: str | None
    folder: str
    """Without slashes at its ends; empty for the repository itself."""

    @classmethod
    def parse(cls, url: str) -> HubAddress:
        """The parts of an address; BadInputError ``bad-url``."""
        matched = _ADDRESS.fullmatch(url)
        parts = matched[3].split("/") if matched else []
        if matched is None or {".", ".."} & {*parts, *matched[1].split("/")}:
            raise BadInputError("bad-url", url, expected="hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
        return cls(matched[1], unquote(matched[2]) if matched[2] else None, matched[3].strip("/"))

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def path(self, name: str) -> str:
        """Where a file lies in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://datasets/{self.repo}{revision}{f'/{self.folder}' if self.folder else ''}"


@contextmanager
def asking(place: str) -> Iterator[None]:
    """Turn what the Hub's library raises into one line."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise BadInputError("hub-offline", place, hint="unset HF_HUB_OFFLINE to reach the Hub") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        hint = "check its name, and that a token (HF_TOKEN, or hf auth login) may use it"
        expected = "a dataset and revision that are there"
        raise BadInputError("store-refused", place, expected=expected, found=first_line(error), hint=hint) from None
    except HFValidationError as error:
        raise BadInputError("bad-url", place, found=first_line(error)) from None
    except (_CLIENT_ERROR, OSError, RuntimeError, ValueError) as error:
        # An upload's failure comes wrapped in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in _REFUSED:
            hint = "check that the token (HF_TOKEN, or hf auth login) may write here"
            raise BadInputError("store-refused", place, found=first_line(cause), hint=hint) from None
        hint = "run the same command again when the Hub answers"
        raise KdpipeError("store-failed", place, found=first_line(cause), hint=hint) from None


class HubStore:
    """A cache in a dataset repository, as it was at one commit; BadInputError ``store-refused`` if there is none."""

    def __init__(self, url: str) -> None:
        address = HubAddress.parse(url)
        if not address.is_pinned:
            with asking(url):
                # The revision is resolved once: what is read later is of the same commit.
                found = HfApi().dataset_info(address.repo, revision=address.revision or MAIN)
            address = address._replace(revision=found.sha)
        self.address = address
        self.url = str(address)

    def __reduce__(self) -> tuple[type[HubStore], tuple[str]]:
        return type(self), (self.url,)

    @cached_property
    def index(self) -> PackIndex | None:
        """What the packs hold; None where there are none."""
        data = self._fetch(INDEX_NAME)
        return None if data is None else PackIndex.from_json(data, f"{self.url}/{INDEX_NAME}")

    def get(self, name: str) -> bytes | None:
        """Content of an object; None if there is none."""
        place = self._place(name)
        return self._fetch(name) if place is None else self._fetch(place.pack, place.offset, place.num_bytes)

    def get_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Contents of objects in the order of ``names``; neighbours in a pack are read in one request."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for contents in pool.map(self._read_run, _runs((name, self._place(name)) for name in names)):
                yield from contents

    def _place(self, name: str) -> Place | None:
        return self.index.places.get(name) if self.index is not None else None

    def _read_run(self, run: list[tuple[str, Place | None]]) -> list[bytes | None]:
        name, first = run[0]
        if first is None:
            return [self._fetch(name)]
        places = [place for _, place in run if place is not None]
        begin, end = first.offset, places[-1].offset + places[-1].num_bytes
        data = self._fetch(first.pack, begin, end - begin)
        if data is None:
            return [None] * len(run)
        return [data[place.offset - begin : place.offset - begin + place.num_bytes] for place in places]

    def _fetch(self, name: str, offset: int = 0, num_bytes: int | None = None) -> bytes | None:
        """A file of the repository, or ``num_bytes`` of it; None if it is not there."""
        if num_bytes == 0:
            return b""
        address, headers = self.address, build_hf_headers() | {"Accept-Encoding": "identity"}
        if num_bytes is not None:
            headers["Range"] = f"bytes={offset}-{offset + num_bytes - 1}"
        with asking(f"{self.url}/{name}"):
            path, endpoint = address.path(name), HfApi().endpoint
            url = hf_hub_url(address.repo, path, repo_type=REPO_TYPE, revision=address.revision, endpoint=endpoint)
            response = http_backoff("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S)
            try:
                hf_raise_for_status(response)
            except RemoteEntryNotFoundError:
                return None
            data: bytes = response.content
            if num_bytes is not None and len(data) != num_bytes:
                raise OSError(f"{len(data)} bytes where {num_bytes} were asked for")
        return data

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """Every object whose name begins with ``prefix``, a folder's name and a slash."""
        if self.index is None:
            raise CacheError("not-a-cache", self.url, expected=f"a folder with {INDEX_NAME}")
        sizes = self.index.plain | {name: place.num_bytes for name, place in self.index.places.items()}
        yield from (Listed(name, size) for name, size in sizes.items() if name.startswith(prefix))


def _runs(places: Iterable[tuple[str, Place | None]]) -> Iterator[list[tuple[str, Place | None]]]:
    """Files in runs of neighbours of one pack."""
    run: list[tuple[str, Place | None]] = []
    for name, place in places:
        if run and not _continues(run, place):
            yield run
            run = []
        run.append((name, place))
    if run:
        yield run


def _continues(run: list[tuple[str, Place | None]], place: Place | None) -> bool:
    first, last = run[0][1], run[-1][1]
    if place is None or first is None or last is None or place.pack != last.pack:
        return False
    gap = place.offset - (last.offset + last.num_bytes)
    return 0 <= gap <= _GAP_BYTES and place.offset + place.num_bytes - first.offset <= _RANGE_BYTES
