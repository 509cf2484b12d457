"""Checkpoints: what follows a restore is bitwise what would have followed, and nothing damaged or foreign is read."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache_spec.errors import EXIT_BAD_INPUT, EXIT_WOULD_LOSE_DATA, BadInputError, KdpipeError, WouldLoseDataError
from train import checkpoint as under_test
from train.checkpoint import (
    Checkpoint,
    Position,
    load_latest,
    publish,
    refuse_another_run,
    restore_optimizer,
    restore_weights,
    take_snapshot,
)
from train.run_files import CheckpointError

SETTINGS: dict[str, Any] = {"learning_rate": 6e-4, "layer_indices": [0, 2], "tail": "bucket"}


class Tied(nn.Module):
    """A model with a tied head, a norm, dropout, a buffer and a projection that is not always there."""

    def __init__(self, *, tied: bool = True, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, 11, bias=False)
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.norm(self.embedding(ids))))
        return logits.logsumexp(-1).square().sum()


def pair(*, seed: int = 0, **changes: Any) -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tied(**changes)
    decayed, spared = [model.embedding.weight], [*model.norm.parameters()]
    if model.head.weight is not model.embedding.weight:
        decayed.append(model.head.weight)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.05)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        torch.manual_seed(int(model.get_buffer("steps_seen")))
        model.get_buffer("steps_seen").add_(1)
        model(torch.randint(11, (7,))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Path:
    position = Position(step=step, epoch=1, samples=8 * step, tokens=100 * step, seconds=1.5)
    snapshot = take_snapshot(position, model=model, optimizer=optimizer, fingerprint="f" * 64, settings=SETTINGS)
    return publish(folder, snapshot)


def restore(loaded: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    restore_weights(loaded, model)
    restore_optimizer(loaded, model, optimizer)


def test_what_follows_a_restore_is_bitwise_what_would_have_followed(tmp_path: Path) -> None:
    model, optimizer = pair()
    advance(model, optimizer, 3)
    save(tmp_path, model, optimizer, 3)
    advance(model, optimizer, 4)

    other, other_optimizer = pair(seed=99)
    advance(other, other_optimizer, 1)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    restore(loaded, other, other_optimizer)
    assert loaded.position == Position(step=3, epoch=1, samples=24, tokens=300, seconds=1.5)
    advance(other, other_optimizer, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.head.weight is other.embedding.weight


def test_a_checkpoint_before_the_first_step_restores_a_fresh_optimizer(tmp_path: Path) -> None:
    model, optimizer = pair()
    save(tmp_path, model, optimizer, 0)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    other, other_optimizer = pair(seed=5)
    restore(loaded, other, other_optimizer)
    advance(model, optimizer, 1)
    advance(other, other_optimizer, 1)
    assert torch.equal(model.embedding.weight, other.embedding.weight)


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    model, optimizer = pair()
    advance(model, optimizer, 1)
    save(tmp_path, model, optimizer, 1)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.state.aliases == {"head.weight": "embedding.weight"}
    assert "model/head.weight" not in loaded.tensors


def test_nothing_is_pickled(tmp_path: Path) -> None:
    model, optimizer = pair()
    advance(model, optimizer, 1)
    path = save(tmp_path, model, optimizer, 1)
    assert sorted(file.name for file in path.iterdir()) == ["state.json", "state.safetensors"]
    json.loads((path / "state.json").read_bytes())
    assert not zipfile.is_zipfile(path / "state.safetensors")


def test_only_the_newest_is_kept_and_leftovers_are_cleaned(tmp_path: Path) -> None:
    model, optimizer = pair()
    (tmp_path / ".tmp-step-00000001-1-abcd").mkdir()
    (tmp_path / ".tmp-step-00000001-1-abcd" / "state.safetensors").write_bytes(b"half")
    for step in (1, 2, 123):
        save(tmp_path, model, optimizer, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000123"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000009-1-abcd").mkdir()
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "nowhere") is None


def test_a_failed_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = pair()
    save(tmp_path, model, optimizer, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("_write_tensors", "_write_synced", "sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(under_test, broken, full)
            with pytest.raises(BadInputError, match="No space left"):
                save(tmp_path, model, optimizer, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.position.step == 1


def test_a_kill_between_publishing_and_removing_leaves_the_newest_in_charge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = pair()
    save(tmp_path, model, optimizer, 1)
    real_rename = os.rename

    def killed_at_removal(source: Path, target: Path) -> None:
        if target.name.startswith(".tmp-"):
            raise KeyboardInterrupt
        real_rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed_at_removal)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, model, optimizer, 2)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.position.step == 2
    save(tmp_path, model, optimizer, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_flipped_byte_anywhere_is_found(tmp_path: Path, name: str) -> None:
    model, optimizer = pair()
    advance(model, optimizer, 1)
    file = save(tmp_path, model, optimizer, 1) / name
    whole = file.read_bytes()
    for place in {0, 1, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(CheckpointError) as caught:
            load_latest(tmp_path)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == EXIT_BAD_INPUT
    file.write_bytes(whole)
    assert load_latest(tmp_path) is not None


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_newest_is_never_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = pair()
    save(tmp_path, model, optimizer, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "kept")
    file = save(tmp_path, model, optimizer, 2) / name
    (tmp_path / "kept").rename(tmp_path / "step-00000001")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "truncated" else b"")
    with pytest.raises(CheckpointError, match=r"damaged-checkpoint.*step-00000002"):
        load_latest(tmp_path)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizer = pair()
    save(tmp_path, model, optimizer, 1).rename(tmp_path / "step-00000007")
    with pytest.raises(CheckpointError, match="damaged-checkpoint"):
        load_latest(tmp_path)


@pytest.mark.parametrize("changes", [{"tied": False}, {"width": 8}])
def test_another_model_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, optimizer = pair()
    save(tmp_path, model, optimizer, 1)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    other, other_optimizer = pair(**changes)
    with pytest.raises(CheckpointError, match="checkpoint-mismatch"):
        restore(loaded, other, other_optimizer)


def test_optimizer_state_of_a_parameter_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    model, optimizer = pair()
    advance(model, optimizer, 1)
    save(tmp_path, model, optimizer, 1)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    other, _ = pair()
    with pytest.raises(CheckpointError, match="optimizer state of norm"):
        restore(loaded, other, torch.optim.AdamW([other.embedding.weight]))


def test_settings_survive_the_file_unchanged(tmp_path: Path) -> None:
    model, optimizer = pair()
    save(tmp_path, model, optimizer, 1)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    refuse_another_run(tmp_path, saved=(loaded.state.fingerprint, loaded.state.settings), asked=("f" * 64, SETTINGS))


def test_another_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WouldLoseDataError, match="another-cache") as caught:
        refuse_another_run(tmp_path, saved=("a" * 64, SETTINGS), asked=("b" * 64, SETTINGS))
    assert caught.value.exit_code == EXIT_WOULD_LOSE_DATA


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    asked = {**SETTINGS, "learning_rate": 1e-3, "seed": 4}
    with pytest.raises(WouldLoseDataError) as caught:
        refuse_another_run(tmp_path, saved=("a" * 64, SETTINGS), asked=("a" * 64, asked))
    message = str(caught.value)
    assert "learning_rate = 0.0006" in message
    assert "learning_rate = 0.001" in message
    assert "seed = 4" in message
    assert "tail" not in message


def test_checkpoint_errors_are_of_the_family() -> None:
    assert issubclass(CheckpointError, KdpipeError)
