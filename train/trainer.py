"""`transformers.Trainer` over a cache: a `Distiller` and a `CacheDataset` come in, a trained student goes out.

Gradients equal those of `kdpipe train-student` over the same blocks: each term is divided by its count over all
micro-batches and ranks of a step, and ranks take blocks in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from cache_spec.errors import BadInputError
from train.dataset import BlockSampler, CacheDataset, CacheLoader, collate
from train.distil_batch import DistilBatch, TermCounts
from train.distiller import Distiller, DistilOutput

PROJECTION_NAME = "projection.safetensors"


class KDTrainer(Trainer):
    """A Trainer whose loss is a ``Distiller``'s and whose order of blocks is ``BlockSampler``'s.

    The model is the whole distiller, which DDP wraps; checkpoints hold the student as ``save_pretrained`` writes it,
    and beside it the projection, where there is one. The evaluation loss is a mean over batches.
    Raises BadInputError for ``DataParallel``, which would split a batch.
    """

    # Counts make the loss of a step the sum over its micro-batches: nothing is left to divide.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Distiller,
        args: TrainingArguments,
        *,
        train_dataset: CacheDataset | None = None,
        window_shards: int = 16,
        **settings: Any,
    ) -> None:
        if args.n_gpu > 1:
            expected, hint = "one device for each process", "start with torchrun or accelerate launch"
            raise BadInputError("data-parallel", "KDTrainer", expected=expected, found=f"{args.n_gpu} GPUs", hint=hint)
        self._window_shards = window_shards
        settings = {"data_collator": _as_inputs} | settings
        super().__init__(model=model, args=args, train_dataset=train_dataset, **settings)

    @property
    def distiller(self) -> Distiller:
        """The model, as it was given."""
        model = self.model
        assert isinstance(model, Distiller)
        return model

    def get_train_dataloader(self) -> CacheLoader:
        dataset = self.train_dataset
        if not isinstance(dataset, CacheDataset):
            raise BadInputError("no-cache", "train_dataset", expected="a CacheDataset", found=type(dataset).__name__)
        args = self.args
        sampler = BlockSampler(
            dataset,
            batch_blocks=args.per_device_train_batch_size,
            num_ranks=args.world_size,
            rank=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            window_shards=self._window_shards,
        )
        # accelerate would split it between ranks once more, and fill short ends with blocks seen before.
        return CacheLoader(
            dataset,
            sampler,
            collate_fn=_as_inputs,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, DistilBatch]], device: torch.device) -> Tensor:
        """The counts of all micro-batches and ranks of a step, in the order of ``TermCounts``: int64 [4]."""
        counts = self.distiller.counts([inputs["batch"] for inputs in batch_samples])
        mine_4 = torch.tensor(astuple(counts), dtype=torch.int64)
        every_R4: Tensor = self.accelerator.gather(mine_4.to(device).unsqueeze(0))
        return every_R4.sum(dim=0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if isinstance(num_items_in_batch, Tensor):
            names = (field.name for field in fields(TermCounts))
            counts = TermCounts(**dict(zip(names, num_items_in_batch.tolist(), strict=True)))
            # DDP averages over ranks what is to be added up.
            num_shares = self.accelerator.num_processes
        else:
            counts, num_shares = self.distiller.counts([inputs["batch"]]), 1
        output: DistilOutput = model(inputs["batch"], counts)
        loss = output.loss * num_shares
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"batch": inputs["batch"].to(self.args.device)}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        self.distiller.student.save_pretrained(folder)
        if self.distiller.projection is not None:
            safetensors.torch.save_file(self.distiller.projection.state_dict(), folder / PROJECTION_NAME)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, student = Path(resume_from_checkpoint), self.distiller.student
        saved = type(student).from_pretrained(folder, dtype=student.dtype, local_files_only=True)
        student.load_state_dict(saved.state_dict())
        if self.distiller.projection is not None:
            state = safetensors.torch.load_file(os.fspath(folder / PROJECTION_NAME))
            self.distiller.projection.load_state_dict(state)


def _as_inputs(items: Sequence[DistilBatch]) -> dict[str, DistilBatch]:
    """What a Trainer passes on: a mapping."""
    return {"batch": collate(items)}
