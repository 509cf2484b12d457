"""``python -m benchmarks.faults``: kill captures, cut their power, fail their disk, change bytes, and count the losses.

In: how many of each, and an encoding. Out: JSON. A kill is a SIGKILL to the ``kdpipe cache-teacher`` process at a
random moment, followed by the same command again; its arrays must equal an undisturbed run's. A power loss is a state
that the disk may be in after a moment of a capture, when nothing lasts but what was synced, or some of it; such a
cache must be absent, or say that it is not finished, or be whole. A disk error is one call of a capture that is
refused or writes a part; the capture must say so, and go on when it is called again. A race is two to four writers of
one shard. A change is one byte of one file of the finished cache set to another value; ``kdpipe verify`` must find
it. Offline, on the embedded teacher.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.faults.changes import change_campaign
from benchmarks.faults.disk import disk_campaign
from benchmarks.faults.fuzz import fuzz_campaign
from benchmarks.faults.kills import capture_settings, kill_campaign
from benchmarks.faults.power import power_campaign
from benchmarks.faults.races import race_campaign
from cache_spec.encodings import ENCODINGS
from pipeline.encoding_config import DEFAULT_ENCODING


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--power-states", type=int, default=500)
    parser.add_argument("--power-resumes", type=int, default=20)
    parser.add_argument("--disk-errors", type=int, default=20)
    parser.add_argument("--races", type=int, default=50)
    parser.add_argument("--fuzzed", type=int, default=2_000)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--encoding", choices=ENCODINGS, default=DEFAULT_ENCODING)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report: dict[str, Any] = {"seed": options.seed, "encoding": options.encoding}
        kills = options.kills, options.tokens, options.workers, options.encoding
        report["kill"] = kill_campaign(folder, *kills, random.Random(options.seed))
        report["change"] = change_campaign(folder / "clean", options.changes, random.Random(options.seed))
        report["race"] = race_campaign(folder / "clean", folder, options.races, random.Random(options.seed))
        report["fuzz"] = fuzz_campaign(folder / "clean", folder, options.fuzzed, random.Random(options.seed))
        settings = capture_settings(options.tokens, options.encoding)
        report["power"] = power_campaign(folder, settings, options.power_states, options.power_resumes, options.seed)
        report["disk"] = disk_campaign(folder, settings, options.disk_errors, random.Random(options.seed))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
