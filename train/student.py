"""From a cache's small files and a student's description to an initialised language model.

In: ``CACHE/teacher/config.json``, the manifest, a description. Out: a float32 model of the teacher's kind (causal or
masked) with the teacher's vocabulary, and a summary for the log and the model card. The teacher model is never built:
where layers are copied, only their tensors are read from its safetensors files.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from cache_spec.manifest import Manifest
from train.evaluation.text import TOKENIZER_PATTERNS, open_tokenizer
from train.lm_kind import is_masked_lm, model_class, own_logits, refuse_other_kind
from train.sliced import refuse_unsliceable, slice_tensors
from train.student_config import (
    config_key,
    layers_config,
    load_config,
    refuse_no_lm,
    sliced_config,
    student_config,
)
from train.teacher_layers import (
    WEIGHT_PATTERNS,
    check_same_teacher,
    chosen_layers,
    layer_list_name,
    model_of_tensors,
    read_layers,
    refuse_incomplete,
    tensor_files,
    weights_digest,
    weights_folder,
)

logger = logging.getLogger("kdpipe")

_MAX_HASHED_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentBuild:
    """An initialised student and what is worth knowing about it."""

    model: PreTrainedModel
    """The student, all parameters float32 on the CPU, in training mode."""
    summary: dict[str, object]
    """Plain JSON values for the log and the model card; holds no path."""


def build_student(
    *,
    teacher_folder_in_cache: Path,
    manifest: Manifest,
    init: Literal["teacher-layers", "sliced", "config", "checkpoint"],
    num_layers: int | None,
    layer_indices: tuple[int, ...] | None,
    layers: Literal["spread", "first", "last"] = "spread",
    overrides: Mapping[str, object],
    teacher: str | None,
    checkpoint: str | None,
    seed: int,
    initializer_range: float | None,
) -> StudentBuild:
    """Build a student of exactly the cache's vocabulary: float32, on the CPU, the global random state untouched.

    Padded rows of a teacher or a checkpoint are cut off: the loss never sees them, so they would stay untrained.
    ``initializer_range`` is the standard deviation of fresh weights; it means nothing where weights are copied.
    Raises ``BadInputError`` of kind ``bad-student-config``, ``unknown-key``, ``not-a-language-model``,
    ``not-a-causal-lm``, ``not-a-masked-lm``, ``student-vocabulary``, ``student-positions``, ``cannot-copy-layers``,
    ``cannot-slice``, ``other-teacher``, ``unknown-teacher``, ``teacher-not-safetensors``, ``unreadable-weights``,
    ``unreadable-config``, ``no-tokenizer`` or ``unknown-checkpoint``.
    """
    config: PreTrainedConfig | None = None
    # Of an imported cache the teacher may be known by its tokens alone.
    if init != "checkpoint" or (teacher_folder_in_cache / "config.json").is_file():
        config = load_config(teacher_folder_in_cache, "unreadable-config")
        refuse_other_kind(config, manifest, teacher_folder_in_cache)
    summary: dict[str, object] = {"init": init, "seed": seed}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        # The CPU generator alone: torch.manual_seed would reseed every accelerator too.
        torch.default_generator.manual_seed(seed)
        if init == "checkpoint" or config is None:
            tokenizer_folder = teacher_folder_in_cache.parent / "tokenizer"
            model = _from_checkpoint(checkpoint, tokenizer_folder, manifest, summary)
        elif init == "teacher-layers" or init == "sliced":
            depth = config.num_hidden_layers
            if init == "sliced" and num_layers is None and layer_indices is None:
                num_layers = depth
            copied = chosen_layers(depth, num_layers, layer_indices, layers)
            if init == "sliced":
                student, summary["derived_sizes"] = sliced_config(config, copied, overrides)
                refuse_unsliceable(config, student)
            else:
                student = layers_config(config, copied, overrides)
            model = _from_teacher_layers(config, student, manifest, copied, teacher, summary)
        else:
            if num_layers is not None:
                overrides = {**overrides, "num_hidden_layers": num_layers}
            if initializer_range is not None:
                overrides = {**overrides, "initializer_range": initializer_range}
            student, derived = student_config(config, manifest.tokenizer.eos_token_id, overrides)
            refuse_other_kind(student, manifest, "student config")
            summary["derived_sizes"] = derived
            model = _without_padding_row(student, _fresh_model)
        if init != "checkpoint" and config is not None and model.config.model_type == config.model_type:
            _take_generation_config(model, teacher_folder_in_cache)
        _cut_vocabulary(model, manifest)
        _check_student(model, manifest)
    model.config.architectures = [type(model).__name__]
    model.config._name_or_path = model.name_or_path = ""
    summary |= {
        "architecture": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "vocabulary_rows": manifest.teacher.vocab_size,
    }
    logger.info("student: %s", ", ".join(f"{key} {value}" for key, value in summary.items()))
    return StudentBuild(model=model.train(), summary=summary)


def public_name(name: str) -> str:
    """A model's name without the folders above it, so that no local path is published; hub names stay."""
    path = Path(name)
    local = path.is_absolute() or name.startswith((".", "~")) or path.is_dir() or len(path.parts) > 2
    return path.expanduser().resolve().name if local else name


def check_same_vocabulary(place: object, model: Mapping[str, int], cache: Mapping[str, int]) -> None:
    """Raise ``student-vocabulary`` unless a model's tokens and their ids are those of the cache."""
    if model != cache:
        num_differ = len({token for token, _ in model.items() ^ cache.items()})
        expected, found = f"the cache's {len(cache)} tokens", f"{len(model)} tokens, {num_differ} differ"
        raise BadInputError("student-vocabulary", place, expected=expected, found=found)


def _from_teacher_layers(
    config: PreTrainedConfig,
    student: PreTrainedConfig,
    manifest: Manifest,
    layers: tuple[int, ...],
    teacher: str | None,
    summary: dict[str, object],
) -> PreTrainedModel:
    folder = weights_folder(teacher, manifest.teacher)
    check_same_teacher(config, folder)
    source = public_name(teacher or manifest.teacher.name)
    summary |= {"source": source, "layers": list(layers)}
    files = tensor_files(folder)
    # Copied layers are only a start, so another fine-tune of the same shape is said, not refused. The digest of a
    # cache made from GGUF is that of another file.
    small = sum(path.stat().st_size for path in files) <= _MAX_HASHED_BYTES
    if small and manifest.imported is None and not manifest.teacher.name.endswith(".gguf"):
        same = weights_digest(files) == manifest.teacher.weights_sha256
        summary["source_weights"] = "those of the cache's teacher" if same else "not those of the cache's teacher"
        if not same:
            logger.warning("layers are copied from %s, whose weights differ from the cache's teacher", source)
    with torch.device("meta"):
        skeleton = _fresh_model(student)
    tensors = read_layers(folder, layer_list_name(skeleton, len(layers)), layers)
    if summary["init"] == "sliced":
        tensors = slice_tensors(tensors, config, student)
    return _without_padding_row(student, lambda config: model_of_tensors(type(skeleton), config, tensors))


def _from_checkpoint(
    checkpoint: str | None, tokenizer_folder: Path, manifest: Manifest, summary: dict[str, object]
) -> PreTrainedModel:
    if checkpoint is None:
        raise BadInputError("bad-student-config", "checkpoint", expected="a folder or hub name", found="nothing")
    folder = Path(checkpoint).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(checkpoint, allow_patterns=[*WEIGHT_PATTERNS, *TOKENIZER_PATTERNS]))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        refuse_no_lm(config)
        refuse_other_kind(config, manifest, checkpoint)
        loaded: Any = model_class(config).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except BadInputError:
        raise
    except Exception as error:
        hint = "a folder or hub name of a language model in safetensors"
        raise BadInputError("unknown-checkpoint", checkpoint, found=first_line(error), hint=hint) from None
    model, info = loaded
    refuse_incomplete(info, "unreadable-weights")
    tokenizer = open_tokenizer(folder)
    if tokenizer is not None:
        of_cache = open_tokenizer(tokenizer_folder)
        check_same_vocabulary(folder, tokenizer.get_vocab(), {} if of_cache is None else of_cache.get_vocab())
    summary["source"] = public_name(checkpoint)
    assert isinstance(model, PreTrainedModel)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # see _without_padding_row
    return model


def _take_generation_config(model: PreTrainedModel, teacher_folder_in_cache: Path) -> None:
    """Give a student of the teacher's architecture the teacher's settings of generation, where the cache has any."""
    path = teacher_folder_in_cache / "generation_config.json"
    if not path.is_file():
        return
    try:
        config = GenerationConfig.from_pretrained(teacher_folder_in_cache, local_files_only=True)
        config.validate(strict=True)
    except Exception as error:  # a student is not refused for what its teacher's authors published
        logger.warning("the teacher's generation_config.json is left out: %s", first_line(error))
        return
    model.generation_config = config


def _cut_vocabulary(model: Any, manifest: Manifest) -> None:
    """Cut padded rows off head and embedding, and forget special tokens among them; ``student-vocabulary``."""
    teacher, head, embedding = manifest.teacher, model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        raise BadInputError("not-a-language-model", type(model).__name__, found="no output head")
    for rows in (head.weight.shape[0], embedding.weight.shape[0]):
        if rows not in (teacher.vocab_size, teacher.padded_vocab_size):
            expected = " or ".join(str(n) for n in sorted({teacher.vocab_size, teacher.padded_vocab_size}))
            raise BadInputError("student-vocabulary", "rows of the student's vocabulary", expected=expected, found=rows)
    model.resize_token_embeddings(teacher.vocab_size, mean_resizing=False)
    for settings in (model.config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given = getattr(settings, name, None)
            ids = given if isinstance(given, list | tuple) else [given]
            kept = [i for i in ids if isinstance(i, int) and i < teacher.vocab_size]
            if given is not None and len(kept) < len(ids):
                setattr(settings, name, kept or None)


def _check_student(model: Any, manifest: Manifest) -> None:
    """Refuse what cannot learn from the cache."""
    vocab_size = manifest.teacher.vocab_size
    positions, block_tokens = getattr(model.config, "max_position_embeddings", None), manifest.blocks.block_tokens
    # In RoBERTa's family the padding takes the first position embeddings.
    padding = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
    positions = positions - padding - 1 if isinstance(positions, int) and isinstance(padding, int) else positions
    if isinstance(positions, int) and positions < block_tokens:
        place = config_key(model.config, "max_position_embeddings")
        raise BadInputError(
            "student-positions", place, expected=f"at least {block_tokens}, the cache's block", found=positions
        )
    ids_BT = torch.arange(min(4, block_tokens))[None] % vocab_size
    changed_BT = ids_BT.clone()
    changed_BT[0, -1] = (changed_BT[0, -1] + 1) % vocab_size
    try:
        with torch.no_grad():
            model.eval()
            logits_BTV, changed_logits_BTV = (own_logits(model, ids) for ids in (ids_BT, changed_BT))
    except Exception as error:  # sizes that do not fit together show in some architectures only here
        raise BadInputError("bad-student-config", "forward pass", found=first_line(error)) from None
    if manifest.masking is not None:
        return
    change = (logits_BTV - changed_logits_BTV)[:, :-1].abs().max()
    if change > 1e-5 * logits_BTV.abs().max():
        raise BadInputError(
            "not-a-causal-lm", type(model).__name__, expected="logits of the tokens before", found="it reads ahead"
        )


def _fresh_model(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        model = model_class(config).from_config(config, trust_remote_code=False, dtype=torch.float32)
    except Exception as error:
        raise BadInputError("bad-student-config", config.model_type, found=first_line(error)) from None
    assert isinstance(model, PreTrainedModel)
    return model


def _without_padding_row(
    config: PreTrainedConfig, build: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel:
    """Build a model whose every embedding learns.

    Architectures pass ``pad_token_id`` to their embedding as the row that starts at zero and gets no gradient.
    Blocks hold no padding among their real tokens, and often that id is the one that ends each document. Some masked
    language models count their positions from it: there the row learns, but starts at zero.
    """
    pad = getattr(config, "pad_token_id", None)
    if not is_masked_lm(config):
        config.pad_token_id = None
    model = build(config)
    model.config.pad_token_id = pad
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    generation = getattr(model, "generation_config", None)  # masked language models have none
    if generation is not None:
        generation.pad_token_id = pad
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep loading bars and reports off the terminal: what matters of them is raised as an error here."""
    settings: Any = transformers_logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()
