"""Checkpoints of a run: model, optimizer and position come in, one published folder goes out.

``step-00000123/`` holds ``state.safetensors`` (all tensors) and ``state.json`` (all else, with the digest of the
tensors). Nothing is pickled. A folder is written under a temporary name, synced and renamed, and the one before it is
removed only then; so there is a whole checkpoint at every moment, and what a killed write leaves is never read.

Parameters that ranks hold in slices are gathered: a checkpoint does not tell how many ranks wrote it. No random state
is in it: what a pass draws depends on the seed, the step and the micro-batch alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cache_spec.durable import TEMPORARY_PREFIX, make_folder, sync_folder, writing
from cache_spec.errors import CacheError, WouldLoseDataError
from cache_spec.manifest import load_sealed, seal_json
from train.parallel import part_like, whole
from train.run_files import CheckpointError

STATE_NAME = "state.json"
TENSORS_NAME = "state.safetensors"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class Position(BaseModel):
    """How far a run has come."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int = Field(ge=0)
    """Optimizer steps taken."""
    epoch: int = Field(ge=0)
    """Epoch the next step belongs to, from 0."""
    samples: int = Field(ge=0)
    """Blocks of that epoch already consumed."""
    tokens: int = Field(ge=0)
    """Real tokens consumed since the start."""
    seconds: float = Field(ge=0)
    """Time spent training since the start, over all its interruptions."""


class CheckpointState(BaseModel):
    """The JSON half of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["kdpipe-checkpoint"] = "kdpipe-checkpoint"
    format_version: Literal[1] = 1
    position: Position
    fingerprint: str
    """Fingerprint of the cache's manifest."""
    settings: dict[str, Any]
    """Every setting that changes the result."""
    aliases: dict[str, str]
    """Tied weights: name to the name under which the tensor is kept."""
    tensors_sha256: str
    tensors_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint, read and checked."""

    path: Path
    state: CheckpointState
    tensors: dict[str, Tensor]

    @property
    def position(self) -> Position:
        return self.state.position


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a checkpoint holds, in host memory."""

    position: Position
    fingerprint: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    aliases: dict[str, str]


def take_snapshot(
    position: Position,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    settings: Mapping[str, Any],
    copies: bool = False,
    keep: bool = True,
) -> Snapshot:
    """Return a run's state as it is now; where ranks hold slices, all of them call this.

    With ``copies`` it stays so whatever the run does next; without ``keep`` a rank only gives its slices, and its
    snapshot has no tensors.
    """
    weights, aliases = _without_ties(model)
    named = {f"model/{name}": tensor for name, tensor in weights.items()}
    named |= {f"optimizer/{name}": tensor for name, tensor in _optimizer_tensors(model, optimizer).items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in named.items():
        full = whole(tensor.detach())
        if keep:
            tensors[name] = torch.clone(full) if copies and full.device.type == "cpu" else full.cpu()
    return Snapshot(
        position=position, fingerprint=fingerprint, settings=dict(settings), tensors=tensors, aliases=aliases
    )


def publish(folder: Path, snapshot: Snapshot) -> Path:
    """Publish a checkpoint in ``folder``, then remove older ones; returns its path.

    Raises BadInputError("cannot-write") with the older checkpoint untouched.
    """
    make_folder(folder)
    remove_unpublished(folder)
    path = folder / f"step-{snapshot.position.step:08d}"
    if not path.exists():
        temporary = folder / f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}"
        with writing(path):
            try:
                temporary.mkdir()
                _write_tensors(temporary / TENSORS_NAME, snapshot.tensors)
                state = CheckpointState(
                    position=snapshot.position,
                    fingerprint=snapshot.fingerprint,
                    settings=snapshot.settings,
                    aliases=snapshot.aliases,
                    tensors_sha256=_file_sha256(temporary / TENSORS_NAME),
                    tensors_bytes=(temporary / TENSORS_NAME).stat().st_size,
                )
                _write_synced(temporary / STATE_NAME, seal_json(state.model_dump(mode="json")))
                sync_folder(temporary)
                os.rename(temporary, path)
                sync_folder(folder)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    for _, older in _published(folder):
        if older != path:
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a real name.
            with writing(older):
                os.rename(older, folder / f"{TEMPORARY_PREFIX}{older.name}-{secrets.token_hex(4)}")
    remove_unpublished(folder)
    return path


def load_latest(folder: Path) -> Checkpoint | None:
    """Read and check the newest checkpoint of ``folder``; None where there is none.

    Raises CheckpointError for a damaged one: an older checkpoint or a fresh start is the user's choice to make.
    """
    published = _published(folder)
    if not published:
        return None
    step, path = max(published)
    hint = "remove this folder to go on from the one before it, or from the start if there is none"
    try:
        state = CheckpointState.model_validate(load_sealed((path / STATE_NAME).read_bytes(), path / STATE_NAME))
        found_bytes, found_sha256 = (path / TENSORS_NAME).stat().st_size, _file_sha256(path / TENSORS_NAME)
    except (OSError, CacheError, ValidationError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError("damaged-checkpoint", path, found=said, hint=hint) from None
    if state.position.step != step:
        raise CheckpointError("damaged-checkpoint", path, expected=step, found=state.position.step, hint=hint)
    for expected, found in ((state.tensors_bytes, found_bytes), (state.tensors_sha256, found_sha256)):
        if expected != found:
            raise CheckpointError("damaged-checkpoint", path / TENSORS_NAME, expected=expected, found=found, hint=hint)
    return Checkpoint(path=path, state=state, tensors=load_file(path / TENSORS_NAME))


def restore_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put weights back exactly, before ranks slice them; CheckpointError where names or shapes differ."""
    weights = _part(checkpoint, "model/")
    for name, kept_name in checkpoint.state.aliases.items():
        weights[name] = weights[kept_name]
    own, aliases = _without_ties(model)
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    if described != wanted or aliases != checkpoint.state.aliases:
        odd = sorted(name for name in described | wanted if described.get(name) != wanted.get(name)) or sorted(aliases)
        raise CheckpointError("checkpoint-mismatch", checkpoint.path, expected=f"{len(own)} tensors", found=odd[:3])
    model.load_state_dict(weights)


def restore_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the optimizer's state back exactly, of a slice its slice; CheckpointError for what is not trained now."""
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    in_order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {name: number for number, name in enumerate(in_order)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in _part(checkpoint, "optimizer/").items():
        name, _, key = full_name.rpartition("/")
        if name not in numbers:
            raise CheckpointError("checkpoint-mismatch", checkpoint.path, found=f"optimizer state of {name}")
        # A copy: AdamW writes into its state, and this tensor may be a view of the mapped file.
        state.setdefault(numbers[name], {})[key] = part_like(tensor, parameters[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def refuse_another_run(
    place: Path, *, saved: tuple[str, Mapping[str, Any]], asked: tuple[str, Mapping[str, Any]]
) -> None:
    """Raise WouldLoseDataError naming what differs between two (fingerprint, settings) of one run folder."""
    hint = "give another --out, or the settings this run was started with"
    (saved_fingerprint, before), (fingerprint, now) = saved, asked
    if saved_fingerprint != fingerprint:
        raise WouldLoseDataError(
            "another-cache", place, expected=f"cache {saved_fingerprint[:16]}", found=fingerprint[:16], hint=hint
        )
    odd = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    if odd:
        raise WouldLoseDataError(
            "other-settings",
            place,
            expected=", ".join(f"{name} = {before.get(name)}" for name in odd),
            found=", ".join(f"{name} = {now.get(name)}" for name in odd),
            hint=hint,
        )


def remove_unpublished(folder: Path) -> None:
    """Remove what killed writes and removals left in a checkpoint folder."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _published(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]


def _part(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in checkpoint.tensors.items() if name.startswith(prefix)}


def _without_ties(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into its distinct tensors and the further names of tied ones."""
    state = model.state_dict(keep_vars=True)
    first_name: dict[int, str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        if id(tensor) in first_name:
            aliases[name] = first_name[id(tensor)]
        else:
            first_name[id(tensor)] = name
            kept[name] = tensor
    return kept, aliases


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
