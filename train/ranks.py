"""The processes that train one student: a launcher's environment comes in, agreement between its processes goes out.

``torchrun`` and ``accelerate launch`` start one process a device and tell each its rank by environment variables;
without them a run is one process, and nothing here sends anything. Rank 0 alone writes and speaks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.failures import first_line

logger = logging.getLogger("kdpipe")

T = TypeVar("T")
# An evaluation or an export of rank 0 lets the others wait; a rank that died is noticed by its closed connection.
_TIMEOUT = timedelta(hours=6)
_FAILED_KEY = "failed"
_NETWORK_WORDS = ("gloo", "nccl", "connection", "socket", "process group", "recvvalue", "sendbytes", "broken pipe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Which of how many processes this one is, and what they tell each other; every method is called by all of them."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    """Number of this process on its machine: which of its accelerators it uses."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.num_ranks == 1

    def device(self, picked: torch.device) -> torch.device:
        """Return this rank's device of the kind that was asked for; BadInputError where ranks cannot share it."""
        if self.is_alone or picked.type == "cpu":
            return picked
        if picked.type != "cuda" or torch.cuda.device_count() <= self.local_rank:
            expected = "a CUDA device for each rank of a machine, or the CPU"
            raise BadInputError("no-such-device", f"rank {self.rank}", expected=expected, found=picked.type)
        return torch.device("cuda", self.local_rank)

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' values."""
        if self.is_alone:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, of one shape; in place."""
        if not self.is_alone:
            dist.all_reduce(tensor)
        return tensor

    def of_first(self, value: float) -> float:
        """Return rank 0's number, float64: its clock is everyone's."""
        if self.is_alone:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return float(shared)

    def share(self, value: T) -> T:
        """Return rank 0's object."""
        if self.is_alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return all ranks' objects, in order."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def copy_from_first(self, module: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers."""
        if self.is_alone:
            return
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one rank fails, all raise its error and one of them says it; what is inside waits for no other rank."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.is_alone:
                raise
            failure = error
        self.agree(failure)

    def agree(self, failure: Exception | None) -> None:
        """Raise on every rank the error of the first that has one."""
        if not self.largest(int(failure is not None)):
            return
        assert not self.is_alone or failure is not None
        told = failure if failure is None or isinstance(failure, KdpipeError) else _elsewhere(self.rank, failure)
        rank, shared = next((rank, error) for rank, error in enumerate(self.gather(told)) if error is not None)
        if failure is not None and rank == self.rank:
            raise failure
        shared.said_elsewhere = True
        raise shared


@contextmanager
def joined(device_type: str) -> Iterator[Ranks]:
    """Meet the other processes of this launch, and part from them at the end; a rank that fails takes all with it."""
    ranks = ranks_of_environment()
    if ranks.is_alone:
        yield ranks
        return
    cuda = device_type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    try:
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.num_ranks, timeout=_TIMEOUT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("kdpipe", store),
            rank=ranks.rank,
            world_size=ranks.num_ranks,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise BadInputError("cannot-join", f"rank {ranks.rank}", found=first_line(error)) from error
    before = logger.level
    if not ranks.is_first:
        logger.setLevel(logging.WARNING)
    try:
        yield ranks
    except KdpipeError:
        _tell_failure(store)
        raise
    except RuntimeError as error:
        if not _is_of_network(error):
            _tell_failure(store)
            raise
        raise _lost_peer(ranks, store, error) from error
    except Exception:
        _tell_failure(store)
        raise
    finally:
        logger.setLevel(before)
        dist.destroy_process_group()


def ranks_of_environment() -> Ranks:
    """Return what a launcher set in the environment; without one, a process that is alone."""
    values: dict[str, int] = {}
    for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(alone))
        if not text.isascii() or not text.isdigit():
            raise BadInputError("bad-launch", f"environment variable {name}", expected="a number", found=text)
        values[name] = int(text)
    if values["RANK"] >= max(1, values["WORLD_SIZE"]):
        expected = f"below WORLD_SIZE, {values['WORLD_SIZE']}"
        raise BadInputError("bad-launch", "environment variable RANK", expected=expected, found=values["RANK"])
    return Ranks(rank=values["RANK"], num_ranks=max(1, values["WORLD_SIZE"]), local_rank=values["LOCAL_RANK"])


def _elsewhere(rank: int, error: BaseException) -> KdpipeError:
    return KdpipeError("failed", f"rank {rank}", found=f"{type(error).__name__}: {first_line(error)}")


def _is_of_network(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _NETWORK_WORDS)


def _tell_failure(store: Any) -> None:
    """Let the ranks that will lose this one know that it says why."""
    try:
        store.set(_FAILED_KEY, "1")
    except RuntimeError:  # the store's host is gone: so are those who would ask
        return


def _lost_peer(ranks: Ranks, store: Any, error: BaseException) -> KdpipeError:
    """The error of a rank whose peer is gone; silent where that peer said why."""
    lost = KdpipeError(
        "rank-lost",
        f"rank {ranks.rank}",
        found=f"another rank has ended: {first_line(error)}",
        hint="the same command goes on from the last checkpoint",
    )
    try:
        lost.said_elsewhere = bool(store.check([_FAILED_KEY])) or not ranks.is_first
    except RuntimeError:
        lost.said_elsewhere = not ranks.is_first
    return lost
