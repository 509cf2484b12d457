"""A cache of very many shards: opening it, looking whether all of it is there, and finding that nothing is to be done.

In: a number of shards, and a folder for them (about 45 kB a shard on a disk of 4 kB blocks). Out: seconds, on warm
caches of the file system. The cache has the arrays of the default encoding; its one shard is multiplied.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.multiply import multiply
from cache_spec.reader import CacheReader
from cache_spec.receipts import read_manifest
from cache_spec.validate import verify_names
from pipeline import folder
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from pipeline.demo import TEACHER
from pipeline.demo_text import python_docs

_CHARS = 200


def measure(work: Path, num_shards: int, turns: int) -> dict[str, Any]:
    """The least of some turns: what else the machine does makes a turn longer, never shorter."""
    work.mkdir(parents=True, exist_ok=True)
    text, cache = work / "text.txt", work / "cache"
    text.write_text(next(iter(python_docs("train")))[1][:_CHARS], encoding="utf-8")
    config = CaptureConfig(
        teacher=str(TEACHER),
        text=(str(text),),
        out=cache,
        block_tokens=32,
        shard_blocks=1,
        batch_blocks=1,
        k=4,
        prototypes=2,
        device="cpu",
    )
    try:
        capture(config, quiet=True)
        multiply(cache, num_shards, link=False)
        manifest = read_manifest(cache)
        assert folder.is_finished(cache, manifest)  # notes the sizes, as a capture does at its end

        def open_and_verify() -> None:
            CacheReader.open(cache)
            assert verify_names(cache) == []

        def resume() -> None:
            assert capture(config, quiet=True)["shards_captured_now"] == 0

        return {
            "shards": num_shards,
            "files": num_shards * (len(CacheReader.open(cache).specs) + 1),
            "open_and_verify_names": _least(open_and_verify, turns),
            "nothing_to_do": _least(lambda: folder.is_finished(cache, manifest), turns),
            "same_command_again": _least(resume, turns),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _least(action: Callable[[], object], turns: int) -> dict[str, float]:
    seconds, cpu = [], []
    for _ in range(turns):
        began = time.perf_counter(), time.process_time()
        action()
        seconds.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return {"seconds": round(min(seconds), 3), "cpu_s": round(min(cpu), 3)}
