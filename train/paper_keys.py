"""The keys of a published recipe's hyper-parameter file: each with its type, its range and what it becomes here.

In: nothing. Out: ``KEYS``, the whole table. A key that names a ``setting`` hands its value to that setting of
``train-student``; what the others become, ``train.paper`` says. ``refuse`` gives the reason why a value cannot be
honoured. Defaults are those of the program that the file was written for: a key that is left out means them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

Value = bool | int | float | str | None
Kind = Literal["flag", "whole", "real", "text"]
KIND_NAMES: dict[Kind, str] = {
    "flag": "true or false",
    "whole": "a whole number",
    "real": "a number",
    "text": "text",
}

MASKED_TYPES = ("bert", "distilbert", "roberta")
_OF_MLM = " (unused where mlm is false)"
_LAUNCHER = "unused: ranks are the launcher's (torchrun, accelerate launch)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperKey:
    """One key of the file."""

    name: str
    """Lower case, words joined by ``_``."""
    kind: Kind
    note: str
    """What it means here, for the printed mapping."""
    default: Value = None
    required: bool = False
    low: float | None = None
    """Least value."""
    above: float | None = None
    """Every value is larger than this."""
    high: float | None = None
    """Largest value."""
    below: float | None = None
    """Every value is smaller than this."""
    choices: tuple[str, ...] | None = None
    setting: str | None = None
    """The setting of ``train-student`` that takes the value as it is."""
    refuse: Callable[[Value], str | None] | None = None
    """Why a value cannot be honoured, or None."""


def _positive(reason: str) -> Callable[[Value], str | None]:
    return lambda value: reason if isinstance(value, int | float) and value > 0 else None


def _pickled_weights(value: Value) -> str | None:
    if isinstance(value, str) and PurePath(value).suffix in {".pth", ".pt", ".bin", ".ckpt"}:
        return (
            "pickled weights can run code: convert them with save_pretrained, or start from the teacher's layers"
            " with --student teacher-layers"
        )
    return None


KEYS: tuple[PaperKey, ...] = (
    # where
    PaperKey(
        name="force",
        kind="flag",
        default=False,
        note="nothing is ever deleted: true moves a run of other settings aside to DUMP_PATH.old-N, false refuses it;"
        " a run of these settings goes on",
    ),
    PaperKey(name="dump_path", kind="text", required=True, setting="out", note="folder of the run"),
    PaperKey(
        name="data_file",
        kind="text",
        required=True,
        note="read by cache-teacher, each sequence in blocks of its own; a pickle goes through import-pickle",
    ),
    # who
    PaperKey(
        name="student_type",
        kind="text",
        required=True,
        note="model_type of the student's config; that of the teacher, or distilbert of bert",
    ),
    PaperKey(
        name="student_config",
        kind="text",
        required=True,
        note="the student is built by this JSON file; its positions are the block's tokens",
    ),
    PaperKey(
        name="student_pretrained_weights",
        kind="text",
        refuse=_pickled_weights,
        note="folder or hub name in safetensors to start from; none: fresh weights (--student teacher-layers copies)",
    ),
    PaperKey(
        name="teacher_type",
        kind="text",
        required=True,
        note="model_type of the teacher; the cache must have it",
    ),
    PaperKey(
        name="teacher_name", kind="text", required=True, note="run by cache-teacher alone; the cache must be of it"
    ),
    # loss
    PaperKey(
        name="temperature",
        kind="real",
        default=2.0,
        low=0.05,
        high=100.0,
        setting="temperature",
        note="of the divergence; one of the cache's grid",
    ),
    PaperKey(
        name="alpha_ce",
        kind="real",
        default=0.5,
        low=0.0,
        setting="kl_weight",
        note="weight of the squared temperature times KL(teacher || student), mean over all real tokens (or"
        " restrict_ce_to_mask)",
    ),
    PaperKey(
        name="alpha_mlm",
        kind="real",
        default=0.0,
        low=0.0,
        note="weight of the cross-entropy of the masked tokens, at temperature 1; no such loss where mlm is false",
    ),
    PaperKey(
        name="alpha_clm",
        kind="real",
        default=0.5,
        low=0.0,
        setting="ce_weight",
        note="weight of the cross-entropy of the next token, at temperature 1; no such loss where mlm is true",
    ),
    PaperKey(
        name="alpha_mse",
        kind="real",
        default=0.0,
        low=0.0,
        refuse=_positive(
            "it is the squared error of raw logits, which a cache does not keep; our mse_weight is of hidden states"
        ),
        note="no such loss",
    ),
    PaperKey(
        name="alpha_cos",
        kind="real",
        default=0.0,
        low=0.0,
        setting="cosine_weight",
        note="weight of 1 - cosine of each token's last hidden state: the cache keeps each (hidden_window 1)",
    ),
    PaperKey(
        name="mlm",
        kind="flag",
        default=False,
        note="true: masked tokens are found out, and cache-teacher masks, once for all epochs; false: next tokens are"
        " predicted",
    ),
    PaperKey(
        name="mlm_mask_prop",
        kind="real",
        default=0.15,
        low=0.0,
        high=1.0,
        note="share of a sequence's tokens to be found out, special ones left out" + _OF_MLM,
    ),
    PaperKey(
        name="word_mask",
        kind="real",
        default=0.8,
        low=0.0,
        high=1.0,
        note="share of these that is read as the mask" + _OF_MLM,
    ),
    PaperKey(
        name="word_keep", kind="real", default=0.1, low=0.0, high=1.0, note="share that is read as it is" + _OF_MLM
    ),
    PaperKey(
        name="word_rand",
        kind="real",
        default=0.1,
        low=0.0,
        high=1.0,
        note="share that is read as a random token" + _OF_MLM,
    ),
    PaperKey(
        name="mlm_smoothing",
        kind="real",
        default=0.7,
        low=0.0,
        note="tokens are masked in proportion to count to the power of minus this" + _OF_MLM,
    ),
    PaperKey(
        name="token_counts",
        kind="text",
        note="not read: cache-teacher counts the text that it captures, which is what such a file holds" + _OF_MLM,
    ),
    PaperKey(
        name="restrict_ce_to_mask",
        kind="flag",
        default=False,
        note="true: the divergence is of masked tokens alone, and the cache keeps no others" + _OF_MLM,
    ),
    # what is frozen
    PaperKey(
        name="freeze_pos_embs",
        kind="flag",
        default=False,
        setting="freeze_position_embeddings",
        note="learnt positions stay as they start",
    ),
    PaperKey(
        name="freeze_token_type_embds",
        kind="flag",
        default=False,
        note="token types stay as they start; nothing to freeze where mlm is false",
    ),
    # steps
    PaperKey(name="n_epoch", kind="whole", default=3, low=1, setting="epochs", note="passes over the cache"),
    PaperKey(
        name="batch_size",
        kind="whole",
        default=5,
        low=1,
        setting="batch_blocks",
        note="sequences, or blocks, of a pass",
    ),
    PaperKey(
        name="tokens_per_batch",
        kind="whole",
        default=-1,
        low=-1,
        note="-1: batch_size counts; else about so many real tokens a pass, by the cache's mean block",
        refuse=lambda value: "no batch has 0 tokens: give -1 or a number above 0" if value == 0 else None,
    ),
    PaperKey(
        name="shuffle",
        kind="flag",
        default=True,
        setting="shuffle",
        note="order is a keyed permutation of seed and epoch; false: as in the cache",
    ),
    PaperKey(
        name="group_by_size",
        kind="flag",
        default=True,
        setting="group_by_length",
        note="passes of sequences of like length; cut to the longest of them",
    ),
    PaperKey(
        name="gradient_accumulation_steps",
        kind="whole",
        default=50,
        low=1,
        setting="accumulate",
        note="passes of a step; each token weighs the same, and an epoch's last step ends with it",
    ),
    PaperKey(
        name="warmup_prop",
        kind="real",
        default=0.05,
        low=0.0,
        high=1.0,
        setting="warmup",
        note="fraction of the steps; then a line to 0",
    ),
    PaperKey(
        name="weight_decay",
        kind="real",
        default=0.0,
        low=0.0,
        setting="weight_decay",
        note="of AdamW, betas 0.9 and 0.98; biases and all norms are spared",
    ),
    PaperKey(
        name="learning_rate", kind="real", default=5e-4, above=0.0, setting="learning_rate", note="peak of AdamW's rate"
    ),
    PaperKey(name="adam_epsilon", kind="real", default=1e-6, above=0.0, setting="adam_epsilon", note="of AdamW"),
    PaperKey(
        name="max_grad_norm", kind="real", default=5.0, above=0.0, setting="max_grad_norm", note="of a whole step"
    ),
    PaperKey(
        name="initializer_range",
        kind="real",
        default=0.02,
        above=0.0,
        note="standard deviation of fresh weights; unused where weights are copied",
    ),
    # machine
    PaperKey(
        name="fp16",
        kind="flag",
        default=False,
        note="true: bf16 autocast over fp32 weights, which needs no loss scaling; false: fp32",
    ),
    PaperKey(
        name="fp16_opt_level",
        kind="text",
        default="O1",
        choices=("O0", "O1", "O2", "O3"),
        note="O1 is autocast; unused where fp16 is false",
    ),
    PaperKey(
        name="n_gpu", kind="whole", default=1, low=0, note="ranks, which torchrun starts; 0: the CPU; 1: the device"
    ),
    PaperKey(name="local_rank", kind="whole", default=-1, low=-1, note=_LAUNCHER),
    PaperKey(
        name="seed",
        kind="whole",
        default=56,
        low=0,
        below=2**63,
        setting="seed",
        note="of weights, dropout and order, and of what is masked",
    ),
    PaperKey(
        name="log_interval", kind="whole", default=500, low=1, note="in passes; log_every counts steps, at least each"
    ),
    PaperKey(
        name="checkpoint_interval",
        kind="whole",
        default=4000,
        low=1,
        note="in passes; checkpoint_every counts steps, at least each",
    ),
    # what the program adds to the file that it writes beside its results
    PaperKey(name="n_nodes", kind="whole", low=1, note=_LAUNCHER),
    PaperKey(name="node_id", kind="whole", low=0, note=_LAUNCHER),
    PaperKey(name="world_size", kind="whole", low=1, note=_LAUNCHER),
    PaperKey(name="n_gpu_per_node", kind="whole", low=0, note=_LAUNCHER),
    PaperKey(name="global_rank", kind="whole", low=0, note=_LAUNCHER),
    PaperKey(name="master_port", kind="whole", low=-1, note=_LAUNCHER),
    PaperKey(name="is_master", kind="flag", note=_LAUNCHER),
    PaperKey(name="multi_gpu", kind="flag", note=_LAUNCHER),
    PaperKey(name="multi_node", kind="flag", note=_LAUNCHER),
)
BY_NAME = {key.name: key for key in KEYS}
