"""Student and loss on several ranks: a `Distiller` comes in, the module whose passes add up over ranks goes out.

``ddp``: every rank holds everything, and gradients are averaged. ``fsdp``: parameters, gradients and the optimizer's
state are split over ranks (``fully_shard``): each layer is gathered while it computes; embeddings, final norm, output
head and projection are one group, gathered for the whole pass, so that the loss reads the head's full weight.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from train.distiller import Distiller
from train.ranks import Ranks

Strategy = Literal["ddp", "fsdp"]


def wrap(distiller: Distiller, ranks: Ranks, strategy: Strategy, device: torch.device) -> nn.Module:
    """Return what a pass calls; equal weights on all ranks are taken for granted.

    ``fsdp`` changes the distiller in place: its parameters become slices.
    """
    if ranks.is_alone:
        return distiller
    if strategy == "fsdp":
        mesh = init_device_mesh(device.type, (ranks.num_ranks,))
        for layer in _layers(distiller.student):
            fully_shard(layer, mesh=mesh)
        fully_shard(distiller, mesh=mesh, reshard_after_forward=False)
        return distiller
    # Buffers are the teacher's tables and do not change; the option's name does, between versions of torch.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(
        distiller,
        **options,
        init_sync=False,
        gradient_as_bucket_view=True,
    )


def one_pass(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[object]:
    """Return the context of one forward and backward pass; ranks exchange gradients in the ``last`` of a step alone."""
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
    return contextlib.nullcontext()


def is_slice(tensor: Tensor) -> bool:
    """Whether this rank may hold but a part of a tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that ranks may hold in slices; then every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return of a whole tensor what this rank holds of ``like``; a tensor of its own."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor.clone()
    moved = tensor.to(like.device)
    # Every rank has the whole already: nothing is sent.
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None).clone()


def _layers(student: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: its longest list of modules."""
    lists = [list(module) for module in student.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
