"""Tasks of simulated shards for worker processes: no teacher, so that processes start fast.

In: a folder, as the path of a job's reference. Out: an empty file for each begun shard, and whatever the name of the
task says.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from pathlib import Path

from pipeline.job import Committed, JobRef

POISONED = 3


def begun_task(ref: JobRef, shard: int) -> Committed:
    (Path(ref.path) / f"{shard}-{secrets.token_hex(4)}").touch()
    return Committed(16, 100)


def slow_task(ref: JobRef, shard: int) -> Committed:
    time.sleep(0.2)
    return begun_task(ref, shard)


def deadly_task(ref: JobRef, shard: int) -> Committed:
    """The poisoned shard kills its worker."""
    committed = begun_task(ref, shard)
    if shard == POISONED:
        os.kill(os.getpid(), signal.SIGKILL)
    return committed


def times_begun(folder: Path, shard: int) -> int:
    return len(list(folder.glob(f"{shard}-*")))
