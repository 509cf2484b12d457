"""How a student computes its passes, which is not what they compute: settings come in, a student set up goes out.

Activation checkpointing keeps the inputs of layers alone and computes the rest again on the way back: less memory for
about a third more time, and the same gradients. Compiling joins operations of the base model into fewer kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.failures import first_line
from train.config import TrainConfig

COMPILE_BACKEND = "inductor"


def set_modes(student: PreTrainedModel, config: TrainConfig) -> None:
    """Set what the settings ask for; BadInputError("no-activation-checkpointing") for a model that has none."""
    if config.activation_checkpointing:
        # transformers has renamed it.
        newer = getattr(student, "activation_checkpointing_enable", None)
        enable: Any = newer or student.gradient_checkpointing_enable
        options = "activation_checkpointing_kwargs" if newer else "gradient_checkpointing_kwargs"
        try:
            enable(**{options: {"use_reentrant": False}})
        except ValueError as error:
            hint = "leave activation_checkpointing out, or take fewer batch_blocks"
            raise BadInputError(
                "no-activation-checkpointing", type(student).__name__, found=first_line(error), hint=hint
            ) from None
    if config.compile:
        base: Any = student.base_model
        base.compile(backend=COMPILE_BACKEND)


@contextmanager
def compiling(config: TrainConfig) -> Iterator[None]:
    """Raise KdpipeError("cannot-compile") for a student that torch.compile fails on; it compiles when it is called."""
    if not config.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        hint = "leave compile out; on the CPU it needs a C++ compiler"
        raise KdpipeError("cannot-compile", "student", found=first_line(error), hint=hint) from error
