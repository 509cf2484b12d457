"""The folder of one training run: who may write there, what the run is, how its student is built, what it measured.

OUT/run.json         settings, cache, student, versions      OUT/checkpoints/   the newest checkpoint
OUT/student_config/  how to build the student again          OUT/tensorboard/   the metrics as TensorBoard logs
OUT/metrics.jsonl    one line every few steps                OUT/student/       the student, in the end
                                                             OUT/result.json    the figures of a finished run
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from cache_spec.durable import TEMPORARY_PREFIX, make_folder, replace_file, writing
from cache_spec.errors import BadInputError, WouldLoseDataError
from cache_spec.failures import first_line
from train.checkpoint import refuse_another_run
from train.export import sync_files
from train.lm_kind import is_masked_lm, model_class
from train.run_files import (
    CHECKPOINTS_NAME,
    METRICS_NAME,
    RESULT_NAME,
    RUN_NAME,
    STUDENT_NAME,
    CheckpointError,
    read_json,
    read_metrics,
)
from train.student import quiet_transformers

_STUDENT_CONFIG_NAME = "student_config"
_GENERATION_NAME = "generation_config.json"
_LOCK_NAME = ".lock"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold a run folder for this process alone; WouldLoseDataError if another run or other files are there."""
    refuse_foreign(out)
    with locked(out / _LOCK_NAME, "run-in-use", "another training that is running"):
        refuse_foreign(out)
        for folder in (out, out / _STUDENT_CONFIG_NAME):
            for leftover in folder.glob(f"{TEMPORARY_PREFIX}*.json*"):
                leftover.unlink(missing_ok=True)
        yield


@contextmanager
def locked(path: Path, kind: str, found: str) -> Iterator[None]:
    """Hold a file and make its folder; WouldLoseDataError of ``kind``, saying what was ``found``, where it is held."""
    make_folder(path.parent)
    lock = FileLock(path, timeout=0)
    with writing(path):
        try:
            lock.acquire()
        except Timeout:  # an OSError too
            hint = "wait for it, or give another --out"
            raise WouldLoseDataError(kind, path.parent, found=found, hint=hint) from None
    try:
        yield
    finally:
        lock.release()


def published_run(out: Path) -> dict[str, Any] | None:
    """Return what ``run.json`` says, or None where nothing of a run is worth keeping: it left no checkpoint or result.

    A start that failed leaves ``run.json`` alone, and that must not stand in the way of the corrected command.
    """
    kept = (out / RESULT_NAME, out / STUDENT_NAME, *(out / CHECKPOINTS_NAME).glob("step-*"))
    if not any(path.exists() for path in kept):
        return None
    run = read_json(out / RUN_NAME)
    if run is not None and not (isinstance(run.get("fingerprint"), str) and isinstance(run.get("settings"), dict)):
        raise CheckpointError("damaged-run", out / RUN_NAME, expected="a run's fingerprint and settings")
    return run


def goes_on(out: Path, identity: tuple[str, dict[str, Any]]) -> bool:
    """Whether there is something of this run to go on from; raises WouldLoseDataError for something of another."""
    record = published_run(out)
    if record is not None:
        refuse_another_run(out, saved=(record["fingerprint"], record["settings"]), asked=identity)
    return record is not None


def write_run(out: Path, content: Mapping[str, Any]) -> None:
    """Write ``run.json``, with the versions of what computes."""
    _write_json(out / RUN_NAME, {**content, "versions": _versions()})


def finished_result(out: Path) -> dict[str, Any] | None:
    """Return the result of a run that has ended and whose student is there, else None: it is then finished again."""
    student = out / STUDENT_NAME
    if not (student / "config.json").is_file() or not any(student.glob("*.safetensors")):
        return None
    try:
        result = read_json(out / RESULT_NAME)
    except CheckpointError:
        return None
    return result if result is not None and {"steps", "fingerprint"} <= result.keys() else None


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json``: the last thing a run does."""
    _write_json(out / RESULT_NAME, result)


def set_dropout(student: PreTrainedModel, dropout: float) -> None:
    """Set every dropout in a student's config, which a rebuilt student then has; BadInputError("no-dropout")."""
    config = student.config
    names = [name for name, value in config.to_dict().items() if _is_dropout(name, value)]
    if not names and dropout > 0:
        hint = "this kind of model has no dropout: leave the setting out"
        raise BadInputError("no-dropout", f"student of type {config.model_type}", found=f"{dropout}", hint=hint)
    for name in names:
        setattr(config, name, dropout)


def save_student_config(out: Path, student: PreTrainedModel) -> None:
    """Keep, durably, all that ``rebuild_student`` needs."""
    folder = out / _STUDENT_CONFIG_NAME
    make_folder(folder)
    with writing(folder):
        (folder / _GENERATION_NAME).unlink(missing_ok=True)  # of a start that failed
        student.config.save_pretrained(folder)
        generation = getattr(student, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        sync_files(folder)


def rebuild_student(out: Path) -> PreTrainedModel:
    """Build the run's student from its saved configuration, float32 on the CPU; its weights are yet to be loaded.

    A fresh run and a resumed one both train the model this returns, so that they cannot differ in anything else.
    """
    folder = out / _STUDENT_CONFIG_NAME
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        # A padding row would start at zero and get no gradient, and often it is the token that ends documents.
        pad_token_id = getattr(config, "pad_token_id", None)
        if not is_masked_lm(config):
            config.pad_token_id = None
        with quiet_transformers():
            built: Any = model_class(config).from_config(config, trust_remote_code=False, dtype=torch.float32)
        if (folder / _GENERATION_NAME).is_file():
            built.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever an architecture's class raises on settings that it cannot take
        hint = "it was written when the run started: restore it, or start again in another --out"
        raise CheckpointError("damaged-run", folder, found=first_line(error), hint=hint) from None
    assert isinstance(built, PreTrainedModel)
    student: PreTrainedModel = built
    student.config.pad_token_id = pad_token_id
    for module in student.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    student.config.architectures = [type(student).__name__]
    student.config._name_or_path = student.name_or_path = ""
    student.train()
    return student


class Metrics:
    """``metrics.jsonl`` and other logs of one run, continued after ``last_step``: what came later is dropped."""

    def __init__(
        self,
        out: Path,
        *,
        last_step: int,
        tensorboard: bool,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = out / METRICS_NAME
        self._writer: Any = None
        self._wandb: Any = None if wandb is None else _open_wandb(wandb, out, settings or {})
        kept = [line for line in read_metrics(out) if line["step"] <= last_step]
        replace_file(self._path, b"".join(_line(line) for line in kept))
        # Unbuffered: closing must not fail again after a write did.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        if tensorboard:
            # Slow to import, and not everyone asks for it.
            from torch.utils.tensorboard import SummaryWriter

            with writing(out):
                self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=last_step + 1)

    def write(self, content: Mapping[str, float | int]) -> None:
        """Add one line; ``step`` is its key. A name without a slash is of the training itself."""
        line = _line(content)
        tags = {name if "/" in name else f"train/{name}": value for name, value in content.items() if name != "step"}
        with writing(self._path):
            if self._file.write(line) != len(line):
                raise OSError("the disk took only part of a line")
            for name, value in tags.items() if self._writer is not None else ():
                self._writer.add_scalar(name, value, content["step"])
        if self._wandb is not None:
            self._wandb.log(tags, step=content["step"])

    def sync(self) -> None:
        """Make all lines durable: a checkpoint must not know more steps than the metrics."""
        with writing(self._path):
            os.fsync(self._file.fileno())
            if self._writer is not None:
                self._writer.flush()

    def close(self) -> None:
        """Close all logs."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._writer is not None:
            with writing(self._path):
                self._writer.close()


def _open_wandb(project: str, out: Path, settings: Mapping[str, Any]) -> Any:
    """A run of Weights & Biases, the same one whenever this folder's run goes on."""
    try:
        wandb = import_module("wandb")
    except ImportError:
        hint = "pip install 'kdpipe[wandb]', or leave wandb out"
        raise BadInputError("missing-package", "wandb", expected="an installed package", hint=hint) from None
    identity = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=out.name, id=identity, resume="allow", dir=str(out), config=dict(settings))


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _is_dropout(name: str, value: object) -> bool:
    """Whether a model's setting is the probability of a dropout that language modelling uses."""
    other = ("summary", "classifier", "layerdrop", "path")
    return "drop" in name and not any(word in name for word in other) and type(value) in (int, float)


def refuse_foreign(out: Path) -> None:
    """Raise WouldLoseDataError("not-a-run") unless ``out`` may become, or is, the folder of a run."""
    with writing(out):
        if out.exists() and not out.is_dir():
            raise WouldLoseDataError("not-a-run", out, expected="a new or empty folder, or a run's", found="a file")
        if not out.is_dir() or (out / RUN_NAME).is_file():
            return
        found = sorted(path.name for path in out.iterdir())
    foreign = [name for name in found if name != _LOCK_NAME and not name.startswith(TEMPORARY_PREFIX)]
    if foreign:
        hint = "give another --out"
        raise WouldLoseDataError("not-a-run", out, expected="a new or empty folder", found=foreign[0], hint=hint)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("kdpipe", "torch", "transformers", "safetensors", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
