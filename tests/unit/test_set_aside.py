"""Training by force: another run's folder is moved aside whole, and nothing but a run of ours is ever touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cache_spec.errors import WouldLoseDataError
from train import set_aside
from train.config import TrainConfig


def refuse(kind: str) -> WouldLoseDataError:
    return WouldLoseDataError(kind, "run")


def config_at(out: Path) -> TrainConfig:
    out.mkdir()
    (out / "run.json").write_text("kept")
    return TrainConfig(cache=out.parent / "cache", out=out)


def train_after(monkeypatch: pytest.MonkeyPatch, out: Path, kind: str) -> None:
    """``train`` that refuses the folder as long as it holds the old run."""

    def train(config: TrainConfig, *, quiet: bool) -> dict[str, Any]:
        if (config.out / "run.json").exists():
            raise refuse(kind)
        config.out.mkdir()
        return {"steps": 1}

    monkeypatch.setattr(set_aside, "train", train)


@pytest.mark.parametrize("kind", ["other-settings", "another-cache"])
def test_another_run_is_moved_aside_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    config = config_at(tmp_path / "run")
    (tmp_path / "run.old-1").mkdir()
    train_after(monkeypatch, config.out, kind)
    assert set_aside.train_with_force(config) == {"steps": 1}
    assert (tmp_path / "run.old-2" / "run.json").read_text() == "kept"
    assert not (config.out / "run.json").exists()


@pytest.mark.parametrize("kind", ["not-a-run", "run-in-use"])
def test_what_is_no_finished_run_of_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    config = config_at(tmp_path / "run")
    train_after(monkeypatch, config.out, kind)
    with pytest.raises(WouldLoseDataError, match=kind):
        set_aside.train_with_force(config)
    assert (config.out / "run.json").read_text() == "kept"


def test_several_ranks_move_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_at(tmp_path / "run")
    train_after(monkeypatch, config.out, "other-settings")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WouldLoseDataError, match="other-settings"):
        set_aside.train_with_force(config)
    assert (config.out / "run.json").read_text() == "kept"
