"""A model that is measured, from its name to its logits.

In: the name of a model, and what it is to be measured on. Out: ``FoundModel``, checked before any weight is loaded, and
``Scorer``, which gives logits chunk by chunk. Logits exist for one chunk of rows at a time, over the real vocabulary
(padded rows cut off), in float32.

Legend: B batch, T time, N rows (B x T), C rows of a chunk, V real vocabulary, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from train.distiller import CHUNK_BYTES, check_student_head, output_head
from train.evaluation.config import EvaluateConfig
from train.evaluation.corpora import Corpus
from train.evaluation.text import TOKENIZER_PATTERNS, TokenisedText, open_tokenizer, tokenise
from train.evaluation.windows import DEFAULT_WINDOW, WindowPlan, plan_windows, start_token
from train.lm_kind import is_masked_lm, model_class, own_logits, refuse_other_kind, student_states
from train.student import check_same_vocabulary
from train.student_config import load_config
from train.teacher_layers import WEIGHT_PATTERNS, refuse_incomplete

logger = logging.getLogger("kdpipe")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """A model that was found and fits what it is to be measured on; its weights are not loaded yet."""

    name: str
    folder: Path
    config: Any
    tokenizer: Any
    """None where the folder has no tokenizer, which a cache does not ask for."""
    texts: dict[str, TokenisedText]
    """The texts in this model's tokens, by the name of each."""
    corpora: tuple[WindowPlan, ...]
    """The corpora in this model's tokens."""
    vocab_size: int
    """V: ids of the tokenizer, or of the cache where the model has no tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A loaded model, in evaluation mode on its device, that gives logits chunk by chunk."""

    name: str
    model: PreTrainedModel
    head: tuple[Tensor, Tensor | None] | None
    """float32 weight [V, D] and bias [V] of the head; None where logits are more than a linear map of hidden states."""
    vocab_size: int
    device: torch.device

    def logits(
        self, input_ids_BT: Tensor, lengths_B: Tensor, rows_M: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield float32 logits [C, V] with the rows, of the N, that they belong to; the caller may overwrite them.

        ``lengths_B`` counts the real tokens of each block. ``rows_M``: int64, ascending, the only rows whose logits are
        wanted; slices are then of these.
        """
        step = max(1, CHUNK_BYTES // (4 * self.vocab_size))
        num_blocks, block_tokens = input_ids_BT.shape
        if self.head is not None:
            hidden_ND = student_states(self.model, input_ids_BT, lengths_B).read_BTD.flatten(0, 1)
            if rows_M is not None:
                hidden_ND = hidden_ND[rows_M]
            for start in range(0, len(hidden_ND), step):
                rows = slice(start, min(start + step, len(hidden_ND)))
                yield rows, F.linear(hidden_ND[rows].float(), *self.head)
            return
        if rows_M is None:
            rows_M = torch.arange(num_blocks * block_tokens, device=input_ids_BT.device)
        before = 0
        for block in range(num_blocks):
            of_block_M = rows_M[rows_M // block_tokens == block] - block * block_tokens
            if not len(of_block_M):
                continue
            logits_TV = own_logits(self.model, input_ids_BT[block : block + 1])[0]
            for start in range(0, len(of_block_M), step):
                chunk_M = of_block_M[start : start + step]
                rows = slice(before + start, before + start + len(chunk_M))
                yield rows, logits_TV[chunk_M, : self.vocab_size].float()
            before += len(of_block_M)


def find_models(
    config: EvaluateConfig, texts: Mapping[str, str], corpora: Sequence[Corpus], reader: CacheReader | None
) -> list[FoundModel]:
    """Find all models' files, and check their configurations and tokenizers against what they are to be measured on."""
    folders = {name: _folder(name) for name in config.models}
    configs = {name: load_config(folder, "unknown-model") for name, folder in folders.items()}
    limits = [limit for model_config in configs.values() if (limit := _positions(model_config)) is not None]
    # One window for all models: with more context a model would only seem better.
    window = config.window or min([DEFAULT_WINDOW, *limits])
    stride = config.stride or max(1, window // 2)
    if stride > window:
        hint = "choose a smaller --stride"
        raise BadInputError("bad-stride", "windows", expected=f"at most {window} tokens", found=stride, hint=hint)
    return [
        _find_model(name, folders[name], configs[name], config, texts, corpora, reader, window, stride)
        for name in config.models
    ]


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=[*WEIGHT_PATTERNS, *TOKENIZER_PATTERNS]))
        except Exception as error:  # the hub client raises its own, its network library's and the system's errors
            hint = "a folder or hub name of a language model in safetensors"
            raise BadInputError("unknown-model", name, found=first_line(error), hint=hint) from None
    if not any(folder.glob("*.safetensors")):
        raise BadInputError("unknown-model", name, expected="a folder with *.safetensors files", found="none")
    return folder


def _find_model(
    name: str,
    folder: Path,
    model_config: Any,
    config: EvaluateConfig,
    texts: Mapping[str, str],
    corpora: Sequence[Corpus],
    reader: CacheReader | None,
    window: int,
    stride: int,
) -> FoundModel:
    if reader is not None:
        refuse_other_kind(model_config, reader.manifest, name)
        _check_positions(name, model_config, reader.manifest.blocks.block_tokens, "of the cache", None)
    needs_text = bool(texts or corpora or config.sample)
    if (needs_text or config.speed) and is_masked_lm(model_config):
        hint = "measure it on a cache of masked text"
        raise BadInputError("not-a-causal-lm", name, expected="a model that predicts next tokens of a text", hint=hint)
    if texts:
        _check_positions(name, model_config, config.block_tokens, "of a text", "choose fewer --block-tokens")
    if corpora:
        _check_positions(name, model_config, window, "of a corpus", "choose a smaller --window")
    tokenizer = open_tokenizer(folder)
    if needs_text and not getattr(tokenizer, "is_fast", False):
        found = "none" if tokenizer is None else type(tokenizer).__name__
        raise BadInputError("no-tokenizer", name, expected="a fast tokenizer, to measure on text", found=found)
    vocabulary: dict[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
    if vocabulary and reader is not None:
        of_cache = open_tokenizer(reader.path / "tokenizer")
        check_same_vocabulary(f"tokenizer of {name}", vocabulary, {} if of_cache is None else of_cache.get_vocab())
    return FoundModel(
        name=name,
        folder=folder,
        config=model_config,
        tokenizer=tokenizer,
        texts={
            place: tokenise(
                text, tokenizer, place=place, block_tokens=config.block_tokens, limit_tokens=config.limit_tokens
            )
            for place, text in texts.items()
        },
        corpora=tuple(
            plan_windows(
                corpus,
                tokenizer,
                mode=config.mode,
                window=window,
                stride=stride,
                limit_tokens=config.limit_tokens,
                limit_examples=config.limit_examples,
                start_id=start_token(tokenizer),
            )
            for corpus in corpora
        ),
        vocab_size=_vocab_size(model_config, vocabulary) if reader is None else reader.manifest.teacher.vocab_size,
    )


def _vocab_size(model_config: Any, vocabulary: Mapping[str, int]) -> int:
    """Ids of the tokenizer; a model without one is only timed, and has what its configuration says."""
    return max(vocabulary.values()) + 1 if vocabulary else int(model_config.get_text_config().vocab_size)


def _positions(model_config: Any) -> int | None:
    positions = getattr(model_config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def _check_positions(name: str, model_config: Any, block_tokens: int, whose: str, hint: str | None) -> None:
    positions = _positions(model_config)
    if positions is not None and positions < block_tokens:
        place, expected = f"blocks {whose} for {name}", f"at most {positions} tokens"
        raise BadInputError("block-too-long", place, expected=expected, found=block_tokens, hint=hint)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; auto is bfloat16 on CUDA that has it, else float32."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_scorer(source: FoundModel, manifest: Manifest | None, device: torch.device, dtype: torch.dtype) -> Scorer:
    """Load a model's weights, check its vocabulary, and find out how to compute its logits."""
    try:
        loaded: Any = model_class(source.config).from_pretrained(
            source.folder,
            config=source.config,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # safetensors, transformers and the system each raise their own
        raise BadInputError("unreadable-weights", source.name, found=first_line(error)) from None
    model, info = loaded
    refuse_incomplete(info, "unreadable-weights")
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False).eval().to(device)
    weight_VD, bias_V = output_head(model)
    embedding: Any = model.get_input_embeddings()
    for num_rows in (weight_VD.shape[0], embedding.weight.shape[0]):
        if manifest is not None and num_rows not in (manifest.teacher.vocab_size, manifest.teacher.padded_vocab_size):
            sizes = sorted({manifest.teacher.vocab_size, manifest.teacher.padded_vocab_size})
            expected = " or ".join(map(str, sizes)) + " rows, as in the cache"
            raise BadInputError("student-vocabulary", f"vocabulary of {source.name}", expected=expected, found=num_rows)
        if num_rows < source.vocab_size:
            expected = f"at least {source.vocab_size} rows, for each id of the tokenizer"
            raise BadInputError(
                "vocabulary-mismatch", f"vocabulary of {source.name}", expected=expected, found=num_rows
            )
    if not is_masked_lm(model.config):
        _check_reads_left_to_right(source.name, model, device)
    head: tuple[Tensor, Tensor | None] | None = None
    try:
        check_student_head(model, linear=True)
        bias_V = None if bias_V is None else bias_V[: source.vocab_size].float()
        head = weight_VD[: source.vocab_size].float(), bias_V
    except BadInputError:
        if is_masked_lm(model.config):
            raise
        logger.info("%s scales or caps its logits: they are taken from the model, one block at a time", source.name)
    return Scorer(name=source.name, model=model, head=head, vocab_size=source.vocab_size, device=device)


@torch.no_grad()
def _check_reads_left_to_right(name: str, model: PreTrainedModel, device: torch.device) -> None:
    ids_BT = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]], device=device)
    logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits.float()
    change = (logits_BTV[0, :-1] - logits_BTV[1, :-1]).abs().max()
    # A model of NaNs passes: its loss says so.
    if change > max(1e-5, 4 * torch.finfo(model.dtype).eps) * logits_BTV.abs().max():
        raise BadInputError("not-a-causal-lm", name, expected="logits of the tokens before", found="it reads ahead")
