"""Ways to train one and the same student: ours from a cache, and what a user would pick instead.

In: a task. Out: contenders, each of which takes some optimizer steps and says how long each of them took. Student,
initialisation, batch, optimizer and arithmetic are the same for all; losses differ, and where the teacher is.

Legend of axes: B blocks, T tokens, N = B x T positions, V vocabulary.
"""

from __future__ import annotations

import importlib
import itertools
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cache_spec.reader import CacheReader
from train.batches import MicroBatch, micro_batches
from train.config import TrainConfig
from train.family_config import CONTROL_SETTINGS
from train.loop import train
from train.run import first_student, step_plan
from train.run_files import read_metrics

KL_WEIGHT, CE_WEIGHT = 0.9, 0.1
# More than any run comes to: what ends it is something else.
_EPOCHS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What all contenders train."""

    cache: str
    teacher: str
    """Folder of the cache's teacher."""
    student: dict[str, Any]
    """Settings of ``kdpipe train-student`` that describe it and how it learns."""
    batch_blocks: int

    def config(
        self, out: Path, *, distils: bool, max_steps: int | None = None, max_hours: float | None = None
    ) -> TrainConfig:
        """The product's settings; what all contenders have in common stands above the student's own."""
        common = {
            "cache": self.cache,
            "out": out,
            "teacher": self.teacher,
            "temperature": 1.0,
            "batch_blocks": self.batch_blocks,
            "accumulate": 1,
            "epochs": _EPOCHS,
            "max_steps": max_steps,
            "max_hours": max_hours,
            "checkpoint_every": max_steps or _EPOCHS,
            "log_every": 1,
            "tensorboard": False,
            "device": "cpu",
            "precision": "fp32",
        }
        weights = {"kl_weight": KL_WEIGHT, "ce_weight": CE_WEIGHT} if distils else {}
        return TrainConfig.model_validate({**self.student, **CONTROL_SETTINGS, **weights, **common})


class Contender(ABC):
    """A way to train, and its figures."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.reader = CacheReader.open(Path(task.cache))

    @abstractmethod
    def turn(self, steps: int) -> dict[str, Any]:
        """Take optimizer steps; ``step_s`` has the seconds of each, in order."""

    def student(self) -> PreTrainedModel:
        """What every contender starts from."""
        student = first_student(self.task.config(Path("-"), distils=False), self.reader).model
        student.train()
        return student

    def batches(self, steps: int) -> Iterator[Tensor]:
        """int64 ids [B, T], as the product reads them, which is done before time is taken."""
        config = self.task.config(Path("-"), distils=False, max_steps=steps)
        return iter([micro.batch.input_ids_BT.long() for micro in self.micro_batches(config)])

    def micro_batches(self, config: TrainConfig, *, with_hidden: bool = False) -> Iterator[MicroBatch]:
        """What the product reads with these settings, in its order; each is a whole step."""
        return micro_batches(
            self.reader,
            step_plan(config, self.reader),
            first_step=0,
            temperature=config.temperature,
            seed=config.seed,
            window_shards=config.window_shards,
            with_hidden=with_hidden,
        )


class Product(Contender):
    """``kdpipe train-student``, as users run it."""

    distils = True

    def turn(self, steps: int) -> dict[str, Any]:
        """``wait_s`` has the time that each step waited for its data."""
        folder = Path(tempfile.mkdtemp(prefix="kdpipe-training-"))
        try:
            train(self.task.config(folder / "run", distils=self.distils, max_steps=steps), quiet=True)
            lines = read_metrics(folder / "run")
        finally:
            shutil.rmtree(folder)
        tokens = [0, *(int(line["tokens"]) for line in lines)]
        seconds = [
            (after - before) / line["tokens_per_s"]
            for (before, after), line in zip(itertools.pairwise(tokens), lines, strict=True)
        ]
        return {"step_s": seconds, "wait_s": [line["wait_s"] for line in lines]}


class ProductCrossEntropy(Product):
    """The same, learning from the text alone."""

    distils = False


class _Stopwatch(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def step_s(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.ends)]


class TrainerCrossEntropy(Contender):
    """transformers.Trainer, learning from the text alone."""

    def turn(self, steps: int) -> dict[str, Any]:
        """Every turn goes on with the same student."""
        blocks = [block for batch_BT in self.batches(steps) for block in batch_BT]
        watch, folder = _Stopwatch(), tempfile.mkdtemp(prefix="kdpipe-training-")
        try:
            self._trainer(folder, [{"input_ids": block} for block in blocks], steps, watch).train()
        finally:
            shutil.rmtree(folder)
        return {"step_s": watch.step_s}

    def _trainer(self, folder: str, rows: list[dict[str, Tensor]], steps: int, watch: _Stopwatch) -> Trainer:
        if not hasattr(self, "model"):
            self.model = self.student()
        return Trainer(
            model=self.model,
            args=TrainingArguments(**self._arguments(folder, steps)),
            train_dataset=rows,
            data_collator=_collate,
            callbacks=[watch],
        )

    def _arguments(self, folder: str, steps: int) -> dict[str, Any]:
        config = self.task.config(Path(folder), distils=False, max_steps=steps)
        return {
            "output_dir": folder,
            "per_device_train_batch_size": self.task.batch_blocks,
            "max_steps": steps,
            "learning_rate": config.learning_rate,
            "adam_beta1": config.adam_beta1,
            "adam_beta2": config.adam_beta2,
            "adam_epsilon": config.adam_epsilon,
            "max_grad_norm": config.max_grad_norm,
            "optim": "adamw_torch",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": True,
        }


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids_BT = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}


class TrlDistillation(TrainerCrossEntropy):
    """TRL's GKD trainer on the text as it is: teacher in memory, forward divergence, no text of the student's own."""

    def _trainer(self, folder: str, rows: list[dict[str, Tensor]], steps: int, watch: _Stopwatch) -> Trainer:
        gkd = importlib.import_module("trl.experimental.gkd")
        if not hasattr(self, "model"):
            self.model, self.teacher = self.student(), load_teacher(self.task)
            self.tokenizer = AutoTokenizer.from_pretrained(self.task.teacher)
        return gkd.GKDTrainer(  # type: ignore[no-any-return]
            model=self.model,
            teacher_model=self.teacher,
            args=gkd.GKDConfig(**self._arguments(folder, steps), lmbda=0.0, beta=0.0, temperature=1.0, bf16=False),
            train_dataset=_dataset(rows),
            data_collator=_collate_lists,
            processing_class=self.tokenizer,
            callbacks=[watch],
        )

    def _arguments(self, folder: str, steps: int) -> dict[str, Any]:
        return super()._arguments(folder, steps) | {"gradient_checkpointing": False}


def _dataset(rows: list[dict[str, Tensor]]) -> Any:
    return importlib.import_module("datasets").Dataset.from_list(
        [{"input_ids": row["input_ids"].tolist()} for row in rows]
    )


def _collate_lists(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return _collate([{"input_ids": torch.tensor(row["input_ids"])} for row in rows])


class OnlineLoop(Contender):
    """A plain PyTorch loop with the teacher in memory and the whole logits of both."""

    def load(self) -> None:
        """Student, teacher and optimizer."""
        self.model, self.teacher = self.student(), load_teacher(self.task)
        config = self.task.config(Path("-"), distils=True)
        self.max_norm = config.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=0.0,
        )

    def turn(self, steps: int) -> dict[str, Any]:
        """Every turn goes on with the same student."""
        if not hasattr(self, "model"):
            self.load()
        step_s = []
        for ids_BT in self.batches(steps):
            began = time.perf_counter()
            self.step(ids_BT)
            step_s.append(time.perf_counter() - began)
        return {"step_s": step_s}

    def step(self, ids_BT: Tensor) -> None:
        """One optimizer step on whole blocks."""
        logits_BTV = self.model(ids_BT).logits
        with torch.no_grad():
            # Students have the real vocabulary, without the rows that pad a teacher's.
            teacher_NV = self.teacher(ids_BT).logits.flatten(0, 1)[:, : logits_BTV.shape[2]]
        kl = F.kl_div(
            logits_BTV.flatten(0, 1).log_softmax(1),
            teacher_NV.log_softmax(1),
            log_target=True,
            reduction="batchmean",
        )
        ce = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        (KL_WEIGHT * kl + CE_WEIGHT * ce).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class TeacherForward(Contender):
    """The teacher's forward pass alone: what no online distillation can save."""

    def turn(self, steps: int) -> dict[str, Any]:
        """A pass for each step."""
        if not hasattr(self, "teacher"):
            self.teacher = load_teacher(self.task)
        step_s = []
        for ids_BT in self.batches(steps):
            began = time.perf_counter()
            with torch.no_grad():
                self.teacher(ids_BT)
            step_s.append(time.perf_counter() - began)
        return {"step_s": step_s}


class Reading(Contender):
    """What a rank's reader does, without a student."""

    def turn(self, steps: int) -> dict[str, Any]:
        """Batches as tensors, in training order."""
        step_s, tokens = [], 0
        items = self.micro_batches(self.task.config(Path("-"), distils=False, max_steps=steps), with_hidden=True)
        began = time.perf_counter()
        for micro in items:
            tokens += int(micro.batch.lengths_B.sum())
            step_s.append(time.perf_counter() - began)
            began = time.perf_counter()
        return {"step_s": step_s, "tokens": tokens}


def load_teacher(task: Task) -> PreTrainedModel:
    """The teacher, in the arithmetic of the students."""
    teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(task.teacher, dtype=torch.float32)
    teacher.eval()
    return teacher


CONTENDERS: dict[str, type[Contender]] = {
    "kdpipe": Product,
    "kdpipe-ce": ProductCrossEntropy,
    "trainer-ce": TrainerCrossEntropy,
    "online": OnlineLoop,
    "trl-gkd": TrlDistillation,
    "teacher-forward": TeacherForward,
    "read": Reading,
}
