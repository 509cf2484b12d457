"""Power losses at each step of a capture: what is left is absent, unfinished or whole, and a resume makes it whole."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import cache_spec.commit
import cache_spec.durable
from benchmarks.faults.power import power_campaign
from benchmarks.faults.small import SmallCaptures


class _Unsynced:
    """``os``, where a sync does nothing."""

    def __getattr__(self, name: str) -> Any:
        return (lambda handle: None) if name == "fsync" else getattr(os, name)


@pytest.mark.slow
def test_what_a_power_loss_leaves_is_absent_or_unfinished_or_whole(tmp_path: Path) -> None:
    found = power_campaign(SmallCaptures(tmp_path / "small", 4), 100, random.Random(0))
    assert found["wrong"] == 0, found["first_wrong"]
    assert found["states"] == 100
    assert found["resumed"] == 1
    assert min(found["absent"], found["unfinished"], found["finished"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "without",
    [
        mock.patch.object(cache_spec.commit, "sync_folder", return_value=None),
        mock.patch.object(cache_spec.durable, "os", _Unsynced()),
    ],
    ids=["names", "bytes"],
)
def test_a_commit_that_does_not_sync_is_found_out(tmp_path: Path, without: Any) -> None:
    with without:
        found = power_campaign(SmallCaptures(tmp_path / "small", 4), 200, random.Random(0))
    assert found["wrong"] > 0
