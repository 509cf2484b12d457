"""`KDTrainer` against our own loop over the same blocks, with accumulation and with ranks; the documented example."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from cache_spec.reader import CacheReader
from tests.integration.test_train_encodings import VOCABULARY, make_cache
from tests.refusals import refused
from train.batches import StepPlan, micro_batches
from train.dataset import CacheDataset
from train.distiller import Distiller, LossWeights
from train.trainer import KDTrainer

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
"""A machine may have fewer cores than there are workers."""
WEIGHTS = LossWeights(kl=0.6, ce=0.4, cosine=0.3, mse=0.2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("trainer") / "cache", "prototype")


def make_student() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes, **dropout))


def make_distiller(cache: Path) -> Distiller:
    """Narrower than the teacher, so that there is a projection."""
    torch.manual_seed(0)
    return Distiller.of_cache(CacheReader.open(cache), make_student(), weights=WEIGHTS, temperature=2.0)


def arguments(out: Path, **changed: Any) -> TrainingArguments:
    given: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_grad_norm": 0.0, "seed": 3}
    given |= {"save_strategy": "no", "logging_steps": 1, "learning_rate": 0.0, "num_train_epochs": 2}
    return TrainingArguments(str(out), **given | changed)


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def of_trainer(cache: Path, out: Path, **changed: Any) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Gradients and logged losses of every step."""
    kept = Gradients()
    trainer = KDTrainer(
        make_distiller(cache),
        arguments(out, **changed),
        train_dataset=CacheDataset(cache, temperature=2.0),
        callbacks=[kept],
    )
    trainer.train()
    return kept.steps, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def of_loop(cache: Path, batch_blocks: int, accumulate: int) -> tuple[list[dict[str, Tensor]], list[float]]:
    """The same by our own loop's plan, counts and order."""
    reader, distiller = CacheReader.open(cache), make_distiller(cache)
    plan = StepPlan(
        num_blocks=reader.manifest.blocks.num_blocks, batch_blocks=batch_blocks, accumulate=accumulate, epochs=2
    )
    steps: list[dict[str, Tensor]] = []
    losses, loss = [], 0.0
    for micro in micro_batches(reader, plan, first_step=0, temperature=2.0, seed=3, window_shards=16):
        output = distiller(micro.batch, micro.counts)
        output.loss.backward()
        loss += float(output.loss.detach())
        if micro.ends_step:
            steps.append({name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None})
            losses.append(loss)
            loss = 0.0
            distiller.zero_grad()
    return steps, losses


def assert_same_steps(
    found: tuple[list[dict[str, Tensor]], list[float]], wanted: tuple[list[dict[str, Tensor]], list[float]]
) -> None:
    assert len(found[0]) == len(wanted[0])
    assert found[1] == pytest.approx(wanted[1], rel=1e-4)  # a Trainer rounds what it logs
    for left, right in zip(found[0], wanted[0], strict=True):
        assert set(left) == set(right)
        for name in right:
            error = (left[name] - right[name]).norm() / right[name].norm().clamp(min=1e-12)
            assert float(error) <= 1e-6 or float(right[name].norm()) < 1e-7, name


@pytest.mark.parametrize(("batch_blocks", "accumulate", "num_workers"), [(2, 2, 0), (5, 2, 0), (3, 1, 0), (5, 2, 2)])
def test_gradients_of_every_step_equal_our_loops(
    cache: Path, tmp_path: Path, batch_blocks: int, accumulate: int, num_workers: int
) -> None:
    found = of_trainer(
        cache,
        tmp_path,
        per_device_train_batch_size=batch_blocks,
        gradient_accumulation_steps=accumulate,
        dataloader_num_workers=num_workers,
    )
    assert_same_steps(found, of_loop(cache, batch_blocks, accumulate))


RANKED = [(2, 2), (5, 1)]
"""Blocks of a batch, and passes. Of 12 blocks, 5 a rank leave the second of two ranks none at the end of an epoch."""


def rank_main(cache: str, out: str) -> None:
    """What each of two processes runs."""
    for batch_blocks, accumulate in RANKED:
        steps = of_trainer(
            Path(cache),
            Path(out),
            per_device_train_batch_size=batch_blocks,
            gradient_accumulation_steps=accumulate,
            ddp_backend="gloo",
        )
        if int(os.environ["RANK"]) == 0:
            torch.save(steps, Path(out) / f"steps-{batch_blocks}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_two_ranks_equal_our_loops(cache: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "ranks.py"
    script.write_text("import sys; from tests.integration.test_trainer import rank_main; rank_main(*sys.argv[1:])")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*launch, str(script), str(cache), str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for batch_blocks, accumulate in RANKED:
        assert_same_steps(
            torch.load(tmp_path / f"steps-{batch_blocks}.pt"), of_loop(cache, batch_blocks, 2 * accumulate)
        )


def test_a_checkpoint_is_a_student_and_training_goes_on_from_it(cache: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 8}
    data = CacheDataset(cache, temperature=2.0)

    def run(out: Path, resume: Path | None = None) -> Distiller:
        trainer = KDTrainer(make_distiller(cache), arguments(out, **settings), train_dataset=data)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer.distiller

    whole = run(tmp_path / "whole")
    student = GPT2LMHeadModel.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    for name, value in student.state_dict().items():
        assert torch.equal(value, whole.student.state_dict()[name])
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-4")
    for (name, left), right in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(left, right, msg=name)


def test_the_evaluation_loss_is_that_of_the_batches(cache: Path, tmp_path: Path) -> None:
    data = CacheDataset(cache, temperature=2.0)
    trainer = KDTrainer(make_distiller(cache), arguments(tmp_path, per_device_eval_batch_size=6), eval_dataset=data)
    distiller = make_distiller(cache).eval()
    losses = []
    for blocks in (range(6), range(6, 12)):
        (batch,) = data.__getitems__(list(blocks))
        losses.append(float(distiller(batch, distiller.counts([batch])).loss.detach()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_training_set_that_is_no_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    trainer = KDTrainer(make_distiller(cache), arguments(tmp_path))
    assert isinstance(trainer, Trainer)
    refused("no-cache", trainer.train)
