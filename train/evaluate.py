"""How good language models are: on plain text, and against the teacher whose targets a cache holds.

In: names of models, text files, a held-out cache. Out: one dictionary of figures for each model, and a table for
people. Blocks do not overlap and are predicted one by one, each without the text before it; the first token of a block
is not predicted. Logits exist for one chunk of rows at a time, over the real vocabulary (padded rows cut off), in
float32; sums over tokens are in float64.

Legend: B batch, T time, N rows (B x T), C rows of a chunk, V real vocabulary, K kept, M the head and one bucket,
D width.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from train.batches import on_device, to_tensors
from train.distiller import CHUNK_BYTES, DistilBatch, check_student_head, last_hidden_state, output_head, shift_labels
from train.evaluate_config import EvaluateConfig
from train.losses import NO_LABEL, SparseTargets
from train.run import pick_device
from train.student import quiet_transformers
from train.student_config import first_line, load_config
from train.teacher_layers import WEIGHT_PATTERNS, refuse_incomplete
from train.text import TOKENIZER_PATTERNS, TokenisedText, open_tokenizer, read_text, tokenise

logger = logging.getLogger("kdpipe")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A model that was found and fits what it is to be measured on; its weights are not loaded yet."""

    name: str
    folder: Path
    config: Any
    texts: dict[str, TokenisedText]
    """The texts in this model's tokens, by the name of each."""
    vocab_size: int
    """V: ids of the tokenizer, or of the cache where the model has no tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scorer:
    """A loaded model, in evaluation mode on its device, that gives logits chunk by chunk."""

    name: str
    model: PreTrainedModel
    head: tuple[Tensor, Tensor | None] | None
    """float32 weight [V, D] and bias [V] of the head; None where logits are more than a linear map of hidden states."""
    vocab_size: int
    device: torch.device

    def logits(self, input_ids_BT: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield float32 logits [C, V] with the rows, of the N, that they belong to; the caller may overwrite them."""
        step = max(1, CHUNK_BYTES // (4 * self.vocab_size))
        num_blocks, block_tokens = input_ids_BT.shape
        if self.head is not None:
            hidden_ND = last_hidden_state(self.model, input_ids_BT).flatten(0, 1)
            for start in range(0, len(hidden_ND), step):
                rows = slice(start, min(start + step, len(hidden_ND)))
                yield rows, F.linear(hidden_ND[rows].float(), *self.head)
            return
        for block in range(num_blocks):
            output: Any = self.model(input_ids=input_ids_BT[block : block + 1], use_cache=False)
            for start in range(0, block_tokens, step):
                end = min(start + step, block_tokens)
                rows = slice(block * block_tokens + start, block * block_tokens + end)
                yield rows, output.logits[0, start:end, : self.vocab_size].float()


def evaluate_models(config: EvaluateConfig, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure each model on each text and on the cache; returns one dictionary of plain JSON values for each.

    ``name``, ``parameters``, ``dtype``, ``device``, and
    ``texts``: for each text ``text``, ``num_tokens`` (predicted ones), ``num_bytes`` (UTF-8 bytes they stand for),
    ``loss_nats`` (mean over them), ``perplexity`` (None where it is beyond a float), ``bits_per_byte`` (their total
    loss in bits by ``num_bytes``) and ``tokens_per_s`` (of the forward passes, output head included);
    ``cache``: None, or ``cache``, ``temperature``, ``num_tokens``, ``loss_nats``, ``perplexity``, ``tokens_per_s`` as
    above, ``teacher_loss`` and ``teacher_perplexity`` (the teacher's own on the same tokens), and, over the
    ``num_positions`` real positions, ``kl_to_teacher`` (nats a position, at the temperature, between distributions
    over the cached head and one bucket for the rest: a lower bound of the full KL, exact where the head is the whole
    vocabulary), ``overlap`` (the sum of min(p, q) over the same: an upper bound) and ``agreement`` (how often the most
    probable token is the teacher's).

    Texts, cache, tokenizers and configurations are all checked before the first weight is loaded. Raises
    BadInputError, among its kinds ``unknown-model``, ``unreadable-weights``, ``not-a-causal-lm``, ``no-tokenizer``,
    ``block-too-long``, ``student-vocabulary``, ``vocabulary-mismatch`` and those of ``read_text``; and KdpipeError
    ``non-finite-loss``.
    """
    device = pick_device(config.device)
    reader = None if config.cache is None else CacheReader.open(config.cache)
    if reader is not None:
        reader.manifest.temperature_index(config.temperature)
    texts = {name: read_text(Path(name).expanduser(), config.limit_bytes) for name in config.text}
    # Models warn of padding without a mask, where blocks hold an id that is also the padding's.
    with quiet_transformers():
        sources = [_find(name, texts, reader, config) for name in config.models]
        return [_measure(source, reader, config, device, quiet) for source in sources]


def _measure(
    source: _Source, reader: CacheReader | None, config: EvaluateConfig, device: torch.device, quiet: bool
) -> dict[str, Any]:
    scorer = _load(source, None if reader is None else reader.manifest, device, _dtype(config.dtype, device))

    def bar(on: str, num_tokens: int) -> tqdm[Any]:
        description = f"{Path(source.name).name} on {Path(on).name}"
        return tqdm(total=num_tokens, unit="tok", unit_scale=True, desc=description, disable=quiet or None)

    texts = []
    for name, text in source.texts.items():
        with bar(name, len(text.ids)) as progress:
            texts.append({"text": name, **_text_figures(scorer, text, config.batch_blocks, progress.update)})
    cache = None
    if reader is not None:
        with bar(str(reader.path), reader.manifest.corpus.num_tokens) as progress:
            cache = _cache_figures(scorer, reader, config.temperature, config.batch_blocks, progress.update)
    return {
        "name": source.name,
        "parameters": sum(parameter.numel() for parameter in scorer.model.parameters()),
        "dtype": str(scorer.model.dtype).removeprefix("torch."),
        "device": str(device),
        "texts": texts,
        "cache": cache,
    }


@torch.inference_mode()
def _text_figures(
    scorer: _Scorer, text: TokenisedText, batch_blocks: int, seen: Callable[[int], object]
) -> dict[str, Any]:
    sum_nats, seconds = 0.0, 0.0
    for ids_BT in text.batches(batch_blocks):
        input_ids_BT = torch.from_numpy(ids_BT).to(scorer.device)
        lengths_B = torch.full((len(ids_BT),), ids_BT.shape[1], device=scorer.device)
        labels_N = shift_labels(input_ids_BT, lengths_B)[0].flatten()
        started = time.perf_counter()
        losses = [_losses(logits_CV, labels_N[rows]) for rows, logits_CV in scorer.logits(input_ids_BT)]
        sum_nats += float(torch.cat(losses).cpu().double().sum())
        seconds += time.perf_counter() - started
        seen(ids_BT.size)
    num_bytes = text.num_predicted_bytes
    return {
        "num_tokens": text.num_predicted,
        "num_bytes": num_bytes,
        **_loss(scorer.name, sum_nats, text.num_predicted),
        "bits_per_byte": sum_nats / math.log(2) / num_bytes,
        "tokens_per_s": round(len(text.ids) / seconds, 1),
    }


@torch.inference_mode()
def _cache_figures(
    scorer: _Scorer, reader: CacheReader, temperature: float, batch_blocks: int, seen: Callable[[int], object]
) -> dict[str, Any]:
    sums, seconds = np.zeros(4), 0.0
    num_targets = num_positions = num_run = 0
    teacher_nats = 0.0
    for start in range(0, reader.manifest.blocks.num_blocks, batch_blocks):
        blocks = np.arange(start, min(start + batch_blocks, reader.manifest.blocks.num_blocks))
        batch = on_device(to_tensors(reader.batch(blocks, temperature)), scorer.device)
        labels_BT, mask_BT = shift_labels(batch.input_ids_BT, batch.lengths_B)
        labels_N, mask_N = labels_BT.flatten(), mask_BT.flatten()
        started = time.perf_counter()
        measures = [
            _measures(logits_CV, labels_N[rows], mask_N[rows], _targets(batch, rows), temperature)
            for rows, logits_CV in scorer.logits(batch.input_ids_BT)
        ]
        sums += torch.cat(measures, dim=1).cpu().double().sum(dim=1).numpy()
        seconds += time.perf_counter() - started
        targets_B = reader.lengths(blocks).astype(np.int64) - 1
        loss_B = reader.read("block_loss", blocks).astype(np.float64)
        teacher_nats += float((loss_B * targets_B)[targets_B > 0].sum())
        num_targets += int(targets_B.sum())
        num_positions += int(targets_B.sum()) + len(blocks)
        num_run += batch.input_ids_BT.numel()
        seen(int(targets_B.sum()) + len(blocks))
    if not num_targets:
        raise BadInputError("too-little-text", reader.path, expected="a block of at least 2 tokens")
    if not np.isfinite(sums).all():
        raise _non_finite(scorer.name, sums.tolist())
    loss_nats, kl, agreement, overlap = sums.tolist()
    teacher = _loss("the cache's teacher", teacher_nats, num_targets)
    return {
        "cache": str(reader.path),
        "temperature": temperature,
        "num_tokens": num_targets,
        "num_positions": num_positions,
        **_loss(scorer.name, loss_nats, num_targets),
        "kl_to_teacher": kl / num_positions,
        "agreement": agreement / num_positions,
        "overlap": overlap / num_positions,
        "teacher_loss": teacher["loss_nats"],
        "teacher_perplexity": teacher["perplexity"],
        "tokens_per_s": round(num_run / seconds, 1),
    }


def _losses(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Nats of each label, float32 [C]; 0 where there is none."""
    label_logit_C = logits_CV.gather(1, labels_C.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(labels_C != NO_LABEL, logits_CV.logsumexp(dim=1) - label_logit_C, 0.0)


def _targets(batch: DistilBatch, rows: slice) -> SparseTargets:
    return SparseTargets(
        head_ids_NK=batch.head_ids_BTK.flatten(0, 1)[rows],
        head_logprobs_NK=batch.head_logprobs_BTK.flatten(0, 1)[rows],
        log_normaliser_N=batch.log_normaliser_BT.flatten()[rows],
        log_tail_mass_N=batch.log_tail_mass_BT.flatten()[rows],
    )


def _measures(
    logits_CV: Tensor, labels_C: Tensor, mask_C: Tensor, targets: SparseTargets, temperature: float
) -> Tensor:
    """Loss, KL, agreement and overlap of each row, float32 [4, C]; 0 where it does not count; overwrites the logits.

    Dense equivalent at K = V: q = softmax(z / T);  KL = sum(p * log(p / q));  overlap = sum(min(p, q)).
    """
    head_ids_CK = targets.head_ids_NK
    loss_C = _losses(logits_CV, labels_C)
    agrees_C = logits_CV.argmax(dim=1) == head_ids_CK[:, 0]
    scaled_CV = logits_CV.div_(temperature)
    normaliser_C1 = scaled_CV.logsumexp(dim=1, keepdim=True)
    head_CK = scaled_CV.gather(1, head_ids_CK)
    tail_C1 = scaled_CV.scatter_(1, head_ids_CK, -torch.inf).logsumexp(dim=1, keepdim=True)
    log_q_CM = torch.cat([head_CK, tail_C1], dim=1) - normaliser_C1
    log_p_CK = targets.head_logprobs_NK / temperature - targets.log_normaliser_N.unsqueeze(1)
    # Stored log-probabilities are rounded, so head and tail sum to one within the rounding; only that is undone here.
    log_p_CM = torch.cat([log_p_CK, targets.log_tail_mass_N.unsqueeze(1)], dim=1).log_softmax(dim=1)
    p_CM = log_p_CM.exp()
    kl_C = torch.where(p_CM > 0, p_CM * (log_p_CM - log_q_CM), 0.0).sum(dim=1)
    overlap_C = torch.minimum(p_CM, log_q_CM.exp()).sum(dim=1)
    compared = [torch.where(mask_C, measure_C, 0.0) for measure_C in (kl_C, agrees_C.float(), overlap_C)]
    return torch.stack([loss_C, *compared])


def _loss(name: str, sum_nats: float, num_tokens: int) -> dict[str, float | None]:
    loss_nats = sum_nats / num_tokens
    if not math.isfinite(loss_nats):
        raise _non_finite(name, loss_nats)
    return {"loss_nats": loss_nats, "perplexity": math.exp(loss_nats) if loss_nats < 700 else None}


def _non_finite(name: str, found: object) -> KdpipeError:
    return KdpipeError("non-finite-loss", name, expected="finite losses", found=found)


def _find(name: str, texts: dict[str, str], reader: CacheReader | None, config: EvaluateConfig) -> _Source:
    """Find a model's files and check its configuration and tokenizer against what it is to be measured on."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=[*WEIGHT_PATTERNS, *TOKENIZER_PATTERNS]))
        except Exception as error:  # the hub client raises its own, its network library's and the system's errors
            hint = "a folder or hub name of a causal language model in safetensors"
            raise BadInputError("unknown-model", name, found=first_line(error), hint=hint) from None
    if not any(folder.glob("*.safetensors")):
        raise BadInputError("unknown-model", name, expected="a folder with *.safetensors files", found="none")
    model_config = load_config(folder, "unknown-model")
    if texts:
        _check_positions(name, model_config, config.block_tokens, "of a text", "choose fewer --block-tokens")
    if reader is not None:
        _check_positions(name, model_config, reader.manifest.blocks.block_tokens, "of the cache", None)
    tokenizer = open_tokenizer(folder)
    if texts and not getattr(tokenizer, "is_fast", False):
        found = "none" if tokenizer is None else type(tokenizer).__name__
        raise BadInputError("no-tokenizer", name, expected="a fast tokenizer, to measure on text", found=found)
    vocabulary: dict[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
    if vocabulary and reader is not None:
        of_cache = open_tokenizer(reader.path / "tokenizer")
        _check_same_vocabulary(name, vocabulary, {} if of_cache is None else of_cache.get_vocab())
    return _Source(
        name=name,
        folder=folder,
        config=model_config,
        texts={
            place: tokenise(
                text, tokenizer, place=place, block_tokens=config.block_tokens, limit_tokens=config.limit_tokens
            )
            for place, text in texts.items()
        },
        vocab_size=max(vocabulary.values()) + 1 if reader is None else reader.manifest.teacher.vocab_size,
    )


def _check_positions(name: str, model_config: Any, block_tokens: int, whose: str, hint: str | None) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < block_tokens:
        place, expected = f"blocks {whose} for {name}", f"at most {positions} tokens"
        raise BadInputError("block-too-long", place, expected=expected, found=block_tokens, hint=hint)


def _check_same_vocabulary(name: str, model: dict[str, int], cache: dict[str, int]) -> None:
    if model != cache:
        num_differ = len({token for token, _ in model.items() ^ cache.items()})
        expected, found = f"the cache's {len(cache)} tokens", f"{len(model)} tokens, {num_differ} differ"
        raise BadInputError("student-vocabulary", f"tokenizer of {name}", expected=expected, found=found)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _load(source: _Source, manifest: Manifest | None, device: torch.device, dtype: torch.dtype) -> _Scorer:
    """Load a model's weights, check its vocabulary, and find out how to compute its logits."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
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
    _check_reads_left_to_right(source.name, model, device)
    head: tuple[Tensor, Tensor | None] | None = None
    try:
        check_student_head(model)
        bias_V = None if bias_V is None else bias_V[: source.vocab_size].float()
        head = weight_VD[: source.vocab_size].float(), bias_V
    except BadInputError:
        logger.info("%s scales or caps its logits: they are taken from the model, one block at a time", source.name)
    return _Scorer(name=source.name, model=model, head=head, vocab_size=source.vocab_size, device=device)


@torch.no_grad()
def _check_reads_left_to_right(name: str, model: PreTrainedModel, device: torch.device) -> None:
    ids_BT = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]], device=device)
    logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits.float()
    change = (logits_BTV[0, :-1] - logits_BTV[1, :-1]).abs().max()
    # A model of NaNs passes: its loss says so.
    if change > max(1e-5, 4 * torch.finfo(model.dtype).eps) * logits_BTV.abs().max():
        raise BadInputError("not-a-causal-lm", name, expected="logits of the tokens before", found="it reads ahead")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for people: for each text and for the cache, the models under each other."""
    lines: list[str] = []
    for number, text in enumerate(rows[0]["texts"] if rows else []):
        pairs = [(row, row["texts"][number]) for row in rows]
        lines += ["", str(text["text"]), *_aligned(_cells(pairs, {"bits_per_byte": "bits/byte"}))]
    if rows and (cache := rows[0]["cache"]) is not None:
        names = {"kl_to_teacher": "KL", "agreement": "agreement", "overlap": "overlap"}
        header, *cells = _cells([(row, row["cache"]) for row in rows], names)
        teacher = ["(the teacher)", "", cells[0][2], _figure(cache["teacher_loss"])]
        teacher += [_figure(cache["teacher_perplexity"], 2), *[""] * (len(header) - 5)]
        place = f"{cache['cache']}, KL and overlap at temperature {cache['temperature']:g}"
        lines += ["", place, *_aligned([header, teacher, *cells])]
    return lines[1:]


def _cells(pairs: list[tuple[dict[str, Any], dict[str, Any]]], more: dict[str, str]) -> list[list[str]]:
    """A header, and one line for each pair of a model's row and its figures; ``more`` maps figures to headings."""
    cells = [["model", "parameters", "tokens", "loss", "perplexity", *more.values(), "tokens/s"]]
    for row, of in pairs:
        common = [row["name"], f"{row['parameters']:,}", f"{of['num_tokens']:,}"]
        figures = [_figure(of["loss_nats"]), _figure(of["perplexity"], 2), *(_figure(of[name]) for name in more)]
        cells.append([*common, *figures, f"{of['tokens_per_s']:,.0f}"])
    return cells


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
