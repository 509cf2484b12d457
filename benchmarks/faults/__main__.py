"""``python -m benchmarks.faults``: do to captures and caches whatever may be done to them, and count the losses.

In: which campaigns, all if none is named, and how large: short by default, ``--full`` for the numbers of the table of
goals, or ``--count``. Out: JSON with the counts of each, and exit status 1 if anything went wrong in any. Offline, on
tiny teachers.

    python -m benchmarks.faults --full
    python -m benchmarks.faults --only worker-kills --count 50 --seed 1

Kills are SIGKILLs of real processes, forked from one that has imported everything, so that they die in their work. A
power loss is a state that the disk may be in after a moment of a capture, when nothing lasts but what was synced, or
some of it. A disk fault is one call that is refused or done by half. Damage is done to finished caches. Each module
says what counts as wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.faults.cluster import cluster_campaign
from benchmarks.faults.damage import NUM_DOCUMENTS, damage_campaign
from benchmarks.faults.disk import disk_campaign
from benchmarks.faults.flips import flip_campaign
from benchmarks.faults.fuzz import fuzz_campaign
from benchmarks.faults.hostile import hostile_campaign
from benchmarks.faults.kills import kill_campaign
from benchmarks.faults.machine import machine_campaign
from benchmarks.faults.other import other_campaign
from benchmarks.faults.power import power_campaign
from benchmarks.faults.races import race_campaign
from benchmarks.faults.small import SmallCaptures
from benchmarks.faults.steps import step_campaign


class Campaign(NamedTuple):
    """One kind of harm."""

    goal: int
    """Its row in the table of goals."""
    run: Callable[[SmallCaptures, int, random.Random], dict[str, Any]]
    short: int
    full: int
    """How many kills, states, flips, ...; more than there are means all."""
    num_documents: int = 10


CAMPAIGNS = {
    "kills": Campaign(1, kill_campaign, 10, 600, 80),
    "worker-kills": Campaign(1, partial(cluster_campaign, victim="worker"), 2, 400, 100),
    "steps": Campaign(2, step_campaign, 10, 2_000),
    "client-kills": Campaign(3, partial(cluster_campaign, victim="client"), 2, 100, 100),
    "scheduler-kills": Campaign(3, partial(cluster_campaign, victim="scheduler"), 2, 100, 100),
    "nanny-kills": Campaign(3, partial(cluster_campaign, victim="nanny"), 2, 100, 100),
    "power": Campaign(4, power_campaign, 100, 5_000),
    "flips": Campaign(5, flip_campaign, 100, 10_000),
    "damage": Campaign(6, damage_campaign, 60, 1_000_000, NUM_DOCUMENTS),
    "disk-full": Campaign(7, partial(disk_campaign, fault="ENOSPC"), 10, 1_000_000),
    "disk-error": Campaign(7, partial(disk_campaign, fault="EIO"), 10, 1_000_000),
    "disk-short": Campaign(7, partial(disk_campaign, fault="short"), 5, 1_000_000, 40),
    "races": Campaign(8, race_campaign, 5, 500),
    "hostile": Campaign(9, hostile_campaign, 1_000, 1_000),
    "other": Campaign(10, other_campaign, 1_000, 1_000),
    "machine": Campaign(11, machine_campaign, 60, 10_000),
    "fuzz": Campaign(12, fuzz_campaign, 500, 1_000_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS), metavar="NAME")
    parser.add_argument("--full", action="store_true", help="the numbers of the table of goals")
    parser.add_argument("--count", type=int, help="this many of each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(1)
    report: dict[str, Any] = {"seed": options.seed}
    for name in options.only:
        campaign = CAMPAIGNS[name]
        count = options.count or (campaign.full if options.full else campaign.short)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            small = SmallCaptures(Path(folder) / "small", campaign.num_documents)
            found = campaign.run(small, count, random.Random(options.seed))
        report[name] = {"goal": campaign.goal, "seconds": round(time.perf_counter() - began, 1), **found}
    print(json.dumps(report, indent=2))
    if any(found["wrong"] for found in report.values() if isinstance(found, dict)):
        sys.exit(1)


if __name__ == "__main__":
    main()
