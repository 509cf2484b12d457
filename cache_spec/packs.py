"""Packs: many files of a cache in a few large objects, for stores that count files.

In: names and bytes of files, in the order in which they are read. Out: plain zip archives without compression, which
any zip reader unpacks, and one index that says where in them each file's bytes lie: a range of bytes is enough.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable
from functools import cached_property
from typing import BinaryIO, Literal, NamedTuple

from pydantic import Field, ValidationError

from cache_spec.errors import CacheError
from cache_spec.manifest import Sha256, load_sealed, seal_json
from cache_spec.record import Record

INDEX_NAME = "packs.json"
PACKS_FOLDER = "packs"
# A zip archive's date of nothing: equal files make equal packs.
_NO_DATE = (1980, 1, 1, 0, 0, 0)


class Place(NamedTuple):
    """Where the bytes of a file lie."""

    pack: str
    offset: int
    num_bytes: int


class Pack(Record):
    """One archive."""

    name: str = Field(pattern=rf"^{PACKS_FOLDER}/[0-9a-z-]+\.zip$")
    num_bytes: int = Field(ge=1)
    sha256: str = Sha256
    files: dict[str, tuple[int, int]]
    """Path in the cache to offset and size of its bytes in the archive."""


class PackIndex(Record):
    """What lies where; sealed as the manifest is."""

    format: Literal["kdpipe-packs"] = "kdpipe-packs"
    format_version: Literal[1] = 1
    fingerprint: str = Sha256
    plain: dict[str, int]
    """Path to size of the files that lie beside the packs: manifest and seal."""
    packs: tuple[Pack, ...]

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each packed file lies, in the order in which they lie there."""
        found = [(name, Place(pack.name, *place)) for pack in self.packs for name, place in pack.files.items()]
        return dict(sorted(found, key=lambda each: each[1]))

    def to_json(self) -> bytes:
        """Sealed, as it is stored."""
        return seal_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, data: bytes, place: object) -> PackIndex:
        """Read an index strictly; CacheError ``broken-json``, ``digest-mismatch``, ``bad-packs``."""
        try:
            index = cls.model_validate_json(json.dumps(load_sealed(data, place)))
        except ValidationError as error:
            raise CacheError("bad-packs", place, found=error.errors()[0]["msg"]) from None
        for pack in index.packs:
            for name, (offset, size) in pack.files.items():
                if offset < 0 or size < 0 or offset + size > pack.num_bytes:
                    raise CacheError("bad-packs", f"{place}: {name}", expected=f"bytes inside {pack.name}")
        return index


class _Sink:
    """Hashes and counts what is written to it; it cannot seek, so that what is hashed is what is there in the end."""

    def __init__(self, out: BinaryIO | None) -> None:
        self.out, self.digest, self.num_bytes = out, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        if self.out is not None:
            self.out.write(data)
        return len(data)

    def flush(self) -> None:
        if self.out is not None:
            self.out.flush()


def write_pack(name: str, files: Iterable[tuple[str, int, Iterable[bytes]]], out: BinaryIO | None) -> Pack:
    """Write an archive of files, each its path, size and pieces; without ``out`` only say what it would be."""
    sink, places = _Sink(out), {}
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for path, num_bytes, pieces in files:
            info = zipfile.ZipInfo(path, _NO_DATE)
            info.file_size = num_bytes
            with archive.open(info, "w") as member:
                places[path] = (sink.num_bytes, num_bytes)
                for piece in pieces:
                    member.write(piece)
            assert sink.num_bytes >= places[path][0] + num_bytes, path
    return Pack(name=name, num_bytes=sink.num_bytes, sha256=sink.digest.hexdigest(), files=places)
