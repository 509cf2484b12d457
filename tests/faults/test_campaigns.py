"""Each fault campaign, tiny: nothing is lost, torn, mistaken or accepted; and a loss that is there is counted."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks.faults import __main__ as faults
from benchmarks.faults import flips, hostile, kills
from benchmarks.faults.kills import Acknowledged, check_finished
from benchmarks.faults.small import SmallCaptures, digests
from benchmarks.faults.tally import Tally
from tests.conformance import changes

COUNTS = {
    "kills": 3, "steps": 4, "power": 10, "flips": 10, "damage": 10, "disk-full": 2, "disk-error": 3, "disk-short": 2,
    "races": 2, "hostile": 12, "other": 8, "machine": 20, "fuzz": 100,
}  # fmt: skip
ON_CLUSTERS = ["worker-kills", "client-kills", "scheduler-kills", "nanny-kills"]
OWN_TESTS = {"power"}
"""Campaigns with tests of their own."""


def test_every_campaign_has_a_tiny_count() -> None:
    assert {*COUNTS, *ON_CLUSTERS} == faults.CAMPAIGNS.keys()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallCaptures:
    return SmallCaptures(tmp_path_factory.mktemp("faults") / "small", num_documents=8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(COUNTS.keys() - OWN_TESTS))
def test_nothing_goes_wrong_in_a_tiny_campaign(small: SmallCaptures, name: str, tmp_path: Path) -> None:
    campaign = faults.CAMPAIGNS[name]
    if campaign.num_documents > 10 and name != "kills":
        small = SmallCaptures(tmp_path / "small", num_documents=40 if name == "damage" else 20)
    found = campaign.run(small, COUNTS[name], random.Random(0))
    assert found["wrong"] == 0, found["first_wrong"]
    assert COUNTS[name] in found.values() or found.get("steps", 0) > COUNTS[name]


@pytest.mark.slow
def test_nothing_goes_wrong_in_tiny_campaigns_on_clusters() -> None:
    # In a process of its own: where dask was used before, its threads are missing in what is forked.
    command = [sys.executable, "-m", "benchmarks.faults", "--only", *ON_CLUSTERS, "--count", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    report = json.loads(done.stdout)
    assert [report[name]["wrong"] for name in ON_CLUSTERS] == [0] * 4
    assert [report[name]["kills"] for name in ON_CLUSTERS] == [1] * 4


@pytest.mark.slow
def test_the_command_prints_counts_and_fails_where_something_went_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["faults", "--only", "flips", "--count", "3"])
    faults.main()
    report = json.loads(capsys.readouterr().out)
    assert (report["flips"]["flips"], report["flips"]["detected"], report["flips"]["goal"]) == (3, 3, 5)
    with mock.patch.object(flips, "verify_cache", side_effect=_blind()), pytest.raises(SystemExit):
        faults.main()
    assert json.loads(capsys.readouterr().out)["flips"]["wrong"] == 3


def _blind() -> Any:
    while True:
        yield []


def test_what_is_lost_torn_or_left_over_is_counted(small: SmallCaptures, tmp_path: Path) -> None:
    expected = digests(small.clean())
    cache = Path(shutil.copytree(small.clean(), tmp_path / "cache"))
    known, tally = Acknowledged(cache), Tally()
    known.look(tally, "first")
    check_finished(cache, expected, tally, "first")
    assert not tally.wrong
    (cache / "receipts" / "00000001.json").unlink()
    known.look(tally, "lost")
    shard = cache / "head_ids" / "c.0.0.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    Acknowledged(cache).look(tally, "torn")
    (cache / "more").write_text("")
    check_finished(cache, expected, tally, "more")
    assert [line.split(":")[0] for line in tally.wrong] == ["lost", "torn", "more", "more"]
    assert kills.moment(cache) == "killed_among_the_shards"


def test_a_cache_that_is_accepted_though_hostile_is_counted(small: SmallCaptures) -> None:
    with (
        mock.patch.object(hostile, "_cases", return_value={"a forgery": ("plain", _forged)}),
        mock.patch.object(hostile, "verify_cache", return_value=[]),
    ):
        found = hostile.hostile_campaign(small, 1, random.Random(0))
    assert (found["accepted"], found["wrong"]) == (1, 1)


def _forged(cache: Path) -> None:
    changes.values(cache, array="block_loss", at=[0], value=3.0)
    changes.reissue(cache)
