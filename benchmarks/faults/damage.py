"""Whole pieces of a finished cache that are cut off, zeroed, exchanged or gone.

In: how many, or all: every file cut at every 4 KiB, every page of 4 KiB zeroed, every two shards of an array exchanged,
every file deleted. Out: counts. ``verify`` must find each; a reader must refuse, or give the values of the unharmed
cache: it does not hash whole files, but checks each chunk, and each file's size and end.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.flips import read_outcome, values_read
from benchmarks.faults.small import SmallCaptures
from benchmarks.faults.tally import Tally
from cache_spec.layout import array_specs
from cache_spec.receipts import read_manifest
from cache_spec.validate import verify_cache

PAGE_BYTES = 4096
_SETTINGS: dict[str, dict[str, Any]] = {"topk": {"k": 24, "hidden_window": 1}, "prototype": {"k": 24}, "hidden": {}}
_SIZES = {"block_tokens": 64, "batch_blocks": 8, "shard_blocks": 16, "limit_tokens": 64 * 56}
"""In four shards, the last one short."""
NUM_DOCUMENTS = 100
"""Of the text, enough for all shards."""


class Damage(NamedTuple):
    """One kind of harm to some files of a cache."""

    kind: str
    place: str
    paths: tuple[Path, ...]
    do: Callable[[], object]


def _damages(cache: Path) -> Iterator[Damage]:
    for path in sorted(path for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".")):
        data, name = path.read_bytes(), path.relative_to(cache).as_posix()
        yield Damage("deleted", name, (path,), path.unlink)
        for at in range(0, len(data), PAGE_BYTES):
            yield Damage("cut_off", f"{name} at {at}", (path,), partial(path.write_bytes, data[:at]))
            page = data[at : at + PAGE_BYTES]
            if any(page):
                zeroed = data[:at] + bytes(len(page)) + data[at + PAGE_BYTES :]
                yield Damage("zeroed", f"{name} at {at}", (path,), partial(path.write_bytes, zeroed))
    manifest = read_manifest(cache)
    for spec in array_specs(manifest).values():
        shards = [cache / spec.shard_path(shard) for shard in range(manifest.blocks.num_shards)]
        for left, right in itertools.combinations(shards, 2):
            first, second = left.read_bytes(), right.read_bytes()
            if first != second:
                what = f"{left.name} and {right.name} of {spec.name}"
                yield Damage("exchanged", what, (left, right), partial(_write_both, left, second, right, first))


def _write_both(left: Path, first: bytes, right: Path, second: bytes) -> None:
    left.write_bytes(first)
    right.write_bytes(second)


def damage_campaign(small: SmallCaptures, num_damages: int, rng: random.Random) -> dict[str, Any]:
    """Do ``num_damages`` of all there are, one at a time, each undone again."""
    home, tally = small.folder / "damaged", Tally()
    every: list[tuple[Path, dict[str, Any], Damage]] = []
    for encoding, kept in _SETTINGS.items():
        cache = Path(shutil.copytree(small.clean(encoding, **_SIZES, **kept), home / encoding))
        assert verify_cache(cache) == []
        clean = values_read(cache)
        every += [(cache, clean, damage) for damage in _damages(cache)]
    assert any(damage.kind == "exchanged" for _, _, damage in every), "the caches have one shard"
    chosen = sorted(rng.sample(range(len(every)), min(num_damages, len(every))))
    for cache, clean, damage in (every[number] for number in chosen):
        before = [path.read_bytes() for path in damage.paths]
        damage.do()
        tally.counts[damage.kind] += 1
        tally.check(verify_cache(cache), f"{cache.name}: {damage.kind} {damage.place}: not detected")
        told = read_outcome(cache, clean)
        tally.counts[f"{damage.kind}_reader_{told}"] += 1
        tally.check(told != "read_others", f"{cache.name}: {damage.kind} {damage.place}: other values read")
        for path, data in zip(damage.paths, before, strict=True):
            path.write_bytes(data)
    shutil.rmtree(home)
    return tally.report(damages=len(chosen), of=len(every))
