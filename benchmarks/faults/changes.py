"""Bytes of a finished cache that change: one at a time, to another value.

In: a cache and how many. Out: counts of those that ``verify`` finds.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from cache_spec.validate import verify_cache


def change_campaign(cache: Path, changes: int, rng: random.Random) -> dict[str, Any]:
    """Change one random byte at a time, anywhere in the cache's files, each file's bytes being equally likely."""
    files = [p for p in sorted(cache.rglob("*")) if p.is_file() and not p.relative_to(cache).as_posix().startswith(".")]
    weights = [p.stat().st_size for p in files]
    # Half of the changes are spread over files, so that small ones, such as receipts, are met as often as shards.
    missed = []
    assert verify_cache(cache) == []
    for number in range(changes):
        path = rng.choice(files) if number % 2 else rng.choices(files, weights)[0]
        data = path.read_bytes()
        position = rng.randrange(len(data))
        changed = bytearray(data)
        changed[position] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        if not verify_cache(cache):
            missed.append(f"{path.relative_to(cache)} byte {position}")
        path.write_bytes(data)
    return {"changes": changes, "detected": changes - len(missed), "missed": missed}
