"""Manifests, receipts and seals that nobody wrote: small files of a whole cache, changed at random and read.

In: how many, of caches of all encodings. Out: counts. Reading must end in a ``CacheError``, or well; half of the
changes are of bytes, the other half of values within the JSON, sealed again so that they get past the digest.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.small import ENCODINGS, SmallCaptures
from benchmarks.faults.tally import Tally
from cache_spec.errors import CacheError
from cache_spec.layout import array_specs, zarr_metadata
from cache_spec.manifest import MANIFEST_NAME, seal_json
from cache_spec.receipts import SEAL_NAME, read_manifest, read_receipt, read_seal, receipt_path

_STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, -0.0, 0.5, 1e308, "", "..", "/", "a/../b", "\x00", "é",
    "\ud800", "0" * 64, "f" * 64, [], [[]], {}, {"": {}}, [None] * 100, "x" * 10_000,
)  # fmt: skip
_NAMES = ("digest", "fingerprint", "name", "k", "format", "", "__class__", "files", "shape")


def fuzz_campaign(small: SmallCaptures, inputs: int, rng: random.Random) -> dict[str, Any]:
    """Read ``inputs`` changed small files of caches, each encoding in its turn."""
    place = small.folder / "fuzzed"
    (place / receipt_path(Path(), 0)).parent.mkdir(parents=True)
    caches = [_Files.of(small.clean(encoding), place) for encoding in ENCODINGS]
    kinds: Counter[str] = Counter()
    tally = Tally()
    for number in range(inputs):
        cache = caches[number % len(caches)]
        name = rng.choice(list(cache.contents))
        data = _changed(cache.contents[name], rng)
        (place / name).write_bytes(data)
        try:
            cache.readers[name]()
            kinds["read"] += 1
        except CacheError as error:
            kinds[error.kind] += 1
        except Exception as error:
            tally.check(False, f"{name}: {error!r:.200} of {data!r:.400}")
    shutil.rmtree(place)
    return tally.report(inputs=inputs, kinds=dict(kinds.most_common()))


class _Files(NamedTuple):
    """Small files of one cache, and what reads each where a changed one lies."""

    contents: dict[Path, bytes]
    readers: dict[Path, Callable[[], object]]

    @classmethod
    def of(cls, cache: Path, place: Path) -> _Files:
        manifest = read_manifest(cache)

        def whole_manifest() -> None:
            found = read_manifest(place)
            array_specs(found)
            zarr_metadata(found)

        readers: dict[Path, Callable[[], object]] = {
            Path(MANIFEST_NAME): whole_manifest,
            Path(SEAL_NAME): lambda: read_seal(place, manifest),
            receipt_path(Path(), 0): lambda: read_receipt(place, manifest, 0),
        }
        return cls({name: (cache / name).read_bytes() for name in readers}, readers)


def _changed(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return _other_bytes(data, rng)
    body = json.loads(data)
    del body["digest"]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        body = _other_value(body, rng)
    try:
        return seal_json(body)
    except (ValueError, AttributeError, TypeError):
        # What has no canonical form is written as Python would.
        return json.dumps(body).encode()


def _other_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, end = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
        what = rng.randrange(5)
        if what == 0 and at < len(changed):
            changed[at] ^= rng.randrange(1, 256)
        elif what == 1:
            del changed[at : min(end, at + rng.choice((1, 10, 1 << 20)))]
        elif what == 2:
            changed[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        elif what == 3:
            changed[at:at] = changed[at:end][:1000]
        else:
            changed[at:at] = rng.choice(
                (b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"\\ud800", b"NaN", b"1e999", b"\xff")
            )
    return bytes(changed)


def _other_value(body: Any, rng: random.Random) -> Any:
    """A copy with one value, at any depth, that is another, gone, or new."""
    body = copy.deepcopy(body)
    at = body
    while True:
        if not isinstance(at, (dict, list)) or not at:
            return rng.choice(_STRANGE) if at is body else body
        key: Any = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        what = rng.randrange(4)
        if what == 0:
            del at[key]
        elif what == 1 and isinstance(at, dict):
            at[rng.choice(_NAMES)] = rng.choice(_STRANGE)
        elif what == 2 and isinstance(at, list):
            at.append(at[key])
        else:
            at[key] = rng.choice(_STRANGE)
        return body
