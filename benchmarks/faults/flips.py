"""One flipped bit anywhere in a finished cache: shards, receipts, manifest, metadata, tables, seal, small files.

In: how many. Out: counts. ``verify`` must find each of them, and a reader must refuse, or give the very values of the
unharmed cache. Files are met equally often, small as they may be, every other time; else bytes are.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.small import ENCODINGS, SmallCaptures
from benchmarks.faults.tally import Tally
from cache_spec.errors import CacheError
from cache_spec.manifest import FORMAT
from cache_spec.reader import CacheReader
from cache_spec.validate import verify_cache

_BLOCKS = 6
"""Of each cache, in three shards."""


def values_read(cache: Path) -> dict[str, Any]:
    """All that a reader gives, by name; raises CacheError where it refuses."""
    reader = CacheReader.open(cache)
    blocks = range(reader.manifest.blocks.num_blocks)
    values: dict[str, Any] = {name: reader.read(name, blocks) for name in reader.specs}
    values |= {name: reader.table(name) for name in reader.manifest.tables}
    for temperature in reader.manifest.temperatures:
        batch = reader.batch(blocks, temperature)
        parts = {f"batch.{name}": getattr(batch, name) for name in ("input_ids_BT", "lengths_B", "hidden_BWD")}
        parts |= {f"targets.{name}": value for name, value in _fields(batch.targets).items()}
        values |= {f"{name} at {temperature:g}": value for name, value in parts.items()}
    return values


def _fields(targets: Any) -> dict[str, Any]:
    names = getattr(targets, "__dataclass_fields__", None) or targets._fields
    return {name: getattr(targets, name) for name in names}


def same_values(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def read_outcome(cache: Path, clean: dict[str, Any]) -> str:
    """What a reader makes of a harmed cache: it refuses, reads the same values, or others."""
    try:
        return "read_the_same" if same_values(values_read(cache), clean) else "read_others"
    except CacheError:
        return "refused"


def small_caches(small: SmallCaptures, folder: Path) -> dict[str, Path]:
    """A copy of one small cache of each encoding, for harm."""
    caches = {}
    for encoding in ENCODINGS:
        source = small.clean(encoding, limit_tokens=_BLOCKS * 16)
        caches[encoding] = Path(shutil.copytree(source, folder / encoding))
        assert verify_cache(source) == []
    return caches


def flip_campaign(small: SmallCaptures, flips: int, rng: random.Random) -> dict[str, Any]:
    """Flip one random bit at a time, and flip it back."""
    home, tally = small.folder / "flipped", Tally()
    caches = small_caches(small, home)
    clean = {encoding: values_read(cache) for encoding, cache in caches.items()}
    files = {
        encoding: [p for p in sorted(cache.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        for encoding, cache in caches.items()
    }
    sizes = {encoding: [path.stat().st_size for path in paths] for encoding, paths in files.items()}
    for number in range(flips):
        encoding = ENCODINGS[number % len(ENCODINGS)]
        paths = files[encoding]
        by_file = number // len(ENCODINGS) % 2
        path = rng.choice(paths) if by_file else rng.choices(paths, sizes[encoding])[0]
        data = path.read_bytes()
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
        what = f"{path.relative_to(home)} byte {at} bit {bit}"
        found = verify_cache(caches[encoding])
        tally.counts["detected"] += bool(found)
        tally.check(found, f"{what}: not detected")
        told = read_outcome(caches[encoding], clean[encoding])
        tally.counts[told] += 1
        tally.check(told != "read_others", f"{what}: other values read")
        path.write_bytes(data)
    for encoding, cache in caches.items():
        assert same_values(values_read(cache), clean[encoding])
    shutil.rmtree(home)
    return tally.report(flips=flips, caches=list(caches), format=FORMAT)
