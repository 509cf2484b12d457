"""``python -m benchmarks.remote``: how long training waits for a cache in a store, against one on a local disk.

In: sizes of a made-up cache, and how long a step takes. Out: JSON: seconds that the consumer of batches waits in the
first window of shards, and the share of the time after it that it waits, in training order, in turns: from a folder;
from an S3 server on loopback with an empty copy, with a full one, and with an empty one and no shard fetched ahead.
Offline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from cache_spec.address import CopySettings
from cache_spec.read_ahead import ReadAhead
from cache_spec.reader import CacheReader
from tests.object_stores import running_s3, upload
from tests.synthetic import make_manifest, make_rows, write_cache
from train.batches import StepPlan, ahead, micro_batches

WINDOW_SHARDS = 4


def waited(reader: CacheReader, batch_blocks: int, step_s: float) -> dict[str, float]:
    """What a consumer waits whose steps take ``step_s`` each, over one epoch."""
    num_blocks = reader.manifest.blocks.num_blocks
    plan = StepPlan(num_blocks=num_blocks, batch_blocks=batch_blocks, accumulate=1, epochs=1)
    items = micro_batches(
        reader, plan, first_step=0, temperature=1.0, seed=0, window_shards=WINDOW_SHARDS, with_hidden=False
    )
    waits: list[float] = []
    began = last = time.perf_counter()
    with contextlib.closing(ahead(items)) as batches:
        for _ in batches:
            waits.append(time.perf_counter() - last)
            time.sleep(step_s)
            last = time.perf_counter()
    first_window = WINDOW_SHARDS * reader.manifest.blocks.shard_blocks // batch_blocks
    rest = waits[first_window:]
    return {
        "first_window_wait_s": sum(waits[:first_window]),
        "wait_share": sum(rest) / (sum(rest) + len(rest) * step_s),
        "longest_wait_s": max(rest),
        "seconds": last - began,
    }


@contextlib.contextmanager
def nothing_ahead() -> Iterator[None]:
    """Shards are fetched when they are read."""
    with mock.patch.object(CacheReader, "read_ahead", lambda reader, names: ReadAhead(None, names)):
        yield


def measure(options: argparse.Namespace) -> dict[str, Any]:
    manifest = make_manifest(
        num_blocks=options.shards * options.shard_blocks,
        shard_blocks=options.shard_blocks,
        block_tokens=options.block_tokens,
        vocab_size=options.vocabulary,
        k=options.k,
        temperatures=(1.0,),
    )
    found: dict[str, list[dict[str, float]]] = {"local": [], "cold": [], "warm": [], "cold_without_read_ahead": []}
    with TemporaryDirectory() as name, running_s3() as server, mock.patch.dict(os.environ, server.environment):
        folder = Path(name)
        write_cache(folder / "cache", manifest, make_rows(manifest))
        url = upload(folder / "cache", "benchmark").url

        def remote(copy: str) -> dict[str, float]:
            reader = CacheReader.open(url, CopySettings(copy_folder=folder / copy))
            return waited(reader, options.batch_blocks, options.step_ms / 1e3)

        for turn in range(options.turns):
            found["local"].append(
                waited(CacheReader.open(folder / "cache"), options.batch_blocks, options.step_ms / 1e3)
            )
            found["cold"].append(remote(f"copy-{turn}"))
            found["warm"].append(remote(f"copy-{turn}"))
            with nothing_ahead():
                found["cold_without_read_ahead"].append(remote(f"other-{turn}"))
        copied = sum(path.stat().st_size for path in (folder / "copy-0").rglob("c.*"))
    return {
        "settings": vars(options),
        "fetched_bytes": copied,
        **{
            name: {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
            for name, rows in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag, default in {
        "shards": 16,
        "shard-blocks": 16,
        "block-tokens": 256,
        "vocabulary": 1000,
        "k": 16,
        "batch-blocks": 8,
        "step-ms": 500,
        "turns": 3,
    }.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    print(json.dumps(measure(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
