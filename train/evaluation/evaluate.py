"""How good language models are: on plain text, and against the teacher whose targets a cache holds.

In: names of models, text files, a held-out cache. Out: one dictionary of figures for each model, and a table for
people. Blocks do not overlap and are predicted one by one, each without the text before it; the first token of a block
is not predicted. Sums over tokens are in float64.

Legend: B batch, T time, N rows (B x T), C rows of a chunk, V real vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from cache_spec.targets import Tail
from train.distil_batch import from_numpy, to_tensors
from train.distiller import labels_of, shift_labels
from train.evaluation.config import EvaluateConfig
from train.evaluation.measures import (
    Calibration,
    LabelMeasures,
    TeacherMeasures,
    compare_with_bucket,
    compare_with_logits,
    measure_labels,
)
from train.evaluation.scorer import FoundModel, Scorer, find_model, load_scorer, pick_dtype
from train.evaluation.text import TokenisedText, read_text
from train.loss_targets import NO_LABEL, BucketTargets, DenseTargets, HeadLossTargets
from train.memory import out_of_memory_at
from train.run import pick_device
from train.student import quiet_transformers
from train.teacher_targets import TeacherTargets, pick_tail


def evaluate_models(config: EvaluateConfig, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure each model on each text and on the cache; returns one dictionary of plain JSON values for each.

    ``name``, ``parameters``, ``dtype``, ``device``, and
    ``texts``: for each text ``text``, ``num_tokens`` (predicted ones), ``num_bytes`` (UTF-8 bytes they stand for),
    ``loss_nats`` (mean over them), ``perplexity`` (None where it is beyond a float), ``bits_per_byte`` (their total
    loss in bits by ``num_bytes``), ``ece`` (expected calibration error of the most probable token against the text's
    own, in 15 bins of equal width) and ``tokens_per_s`` (of the forward passes, output head included);
    ``cache``: None, or ``cache``, ``temperature``, ``num_tokens`` (predicted ones; of masked text those to be found
    out), ``loss_nats``, ``perplexity``, ``ece``, ``tokens_per_s`` as above, ``teacher_loss`` and ``teacher_perplexity``
    (the teacher's own on the same tokens; None of an imported cache), and, over the ``num_positions`` real positions
    (of masked text those that the cache kept), ``kl_to_teacher`` (nats a position, at the temperature), ``overlap``
    (the sum of min(p, q)) and
    ``agreement`` (how often the most probable token is the teacher's). ``kl_is`` tells what the
    cache's encoding allows: ``exact`` over the whole vocabulary; ``lower-bound`` where KL and overlap are between
    distributions over the cached head and one bucket for the rest, which makes overlap an upper bound; None for drawn
    or imported targets, which do not tell, and then all three are None.

    Texts, cache, tokenizers and configurations are all checked before the first weight is loaded. Raises
    BadInputError, among its kinds ``unknown-model``, ``unreadable-weights``, ``not-a-language-model``,
    ``not-a-causal-lm``, ``not-a-masked-lm``, ``no-tokenizer``,
    ``block-too-long``, ``student-vocabulary``, ``vocabulary-mismatch`` and those of ``read_text``; and KdpipeError
    ``non-finite-loss`` or ``out-of-memory``.
    """
    device = pick_device(config.device)
    reader = None if config.cache is None else CacheReader.open(config.cache, config)
    if reader is not None:
        reader.manifest.temperature_index(config.temperature)
    texts = {name: read_text(Path(name).expanduser(), config.limit_bytes) for name in config.text}
    # Models warn of padding without a mask, where blocks hold an id that is also the padding's.
    hint = "fewer --batch-blocks, a smaller --block-tokens or --dtype bfloat16 takes less"
    with quiet_transformers(), out_of_memory_at(f"evaluation on {device}", hint):
        sources = [find_model(name, texts, reader, config) for name in config.models]
        return [_measure(source, reader, config, device, quiet) for source in sources]


def _measure(
    source: FoundModel, reader: CacheReader | None, config: EvaluateConfig, device: torch.device, quiet: bool
) -> dict[str, Any]:
    scorer = load_scorer(source, None if reader is None else reader.manifest, device, pick_dtype(config.dtype, device))

    def bar(on: str, num_tokens: int) -> tqdm[Any]:
        description = f"{Path(source.name).name} on {Path(on).name}"
        return tqdm(total=num_tokens, unit="tok", unit_scale=True, desc=description, disable=quiet or None)

    texts = []
    for name, text in source.texts.items():
        with bar(name, len(text.ids)) as progress:
            texts.append({"text": name, **_text_figures(scorer, text, config.batch_blocks, progress.update)})
    cache = None
    if reader is not None:
        with bar(reader.place, reader.manifest.corpus.num_tokens) as progress:
            cache = cache_figures(scorer, reader, config.temperature, config.batch_blocks, progress.update)
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
    scorer: Scorer, text: TokenisedText, batch_blocks: int, seen: Callable[[int], object]
) -> dict[str, Any]:
    sum_nats, seconds, calibration = 0.0, 0.0, Calibration()
    for ids_BT in text.batches(batch_blocks):
        input_ids_BT = from_numpy(ids_BT).to(scorer.device)
        lengths_B = torch.full((len(ids_BT),), ids_BT.shape[1], device=scorer.device)
        labels_N = shift_labels(input_ids_BT, lengths_B)[0].flatten()
        started = time.perf_counter()
        chunks = scorer.logits(input_ids_BT, lengths_B)
        measures = _joined(measure_labels(logits, labels_N[rows]) for rows, logits in chunks)
        sum_nats += float(measures.loss_C.cpu().double().sum())
        seconds += time.perf_counter() - started
        calibration.add(measures)
        seen(ids_BT.size)
    num_bytes = text.num_predicted_bytes
    return {
        "num_tokens": text.num_predicted,
        "num_bytes": num_bytes,
        **_loss(scorer.name, sum_nats, text.num_predicted),
        "bits_per_byte": sum_nats / math.log(2) / num_bytes,
        "ece": calibration.error,
        "tokens_per_s": round(len(text.ids) / seconds, 1),
    }


@torch.inference_mode()
def cache_figures(
    scorer: Scorer, reader: CacheReader, temperature: float, batch_blocks: int, seen: Callable[[int], object]
) -> dict[str, Any]:
    manifest = reader.manifest
    # A head is compared with one bucket for the rest, whatever else is known of the tail: that bounds the full figures.
    teacher = TeacherTargets.of_cache(
        reader, temperature=temperature, tail=pick_tail(None, manifest) and _comparable_tail(manifest)
    ).to(scorer.device)
    sum_nats, seconds, calibration, compared = 0.0, 0.0, Calibration(), np.zeros(len(TeacherMeasures._fields))
    kind: str | None = None
    num_targets = num_positions = num_run = 0
    teacher_nats = 0.0
    knows_loss = "block_loss" in reader.specs
    names = [*reader.batch_arrays(with_hidden=False), *(["block_loss"] if knows_loss else [])]
    for blocks in reader.sequence(batch_blocks, names):
        batch = to_tensors(reader.batch(blocks, temperature, with_hidden=False)).to(scorer.device)
        read_ids_BT = (batch.input_ids_BT if batch.masked is None else batch.masked.read_ids_BT).long()
        labels_BT, mask_BT = labels_of(batch)
        labels_N, mask_N = labels_BT.flatten(), mask_BT.flatten()
        started = time.perf_counter()
        targets = teacher(batch.targets, labels_N)
        kind = _kl_kind(targets, manifest)
        of_labels: list[LabelMeasures] = []
        for rows, logits_CV in scorer.logits(read_ids_BT, batch.lengths_B):
            of_labels.append(measure_labels(logits_CV, labels_N[rows]))
            measures = None if kind is None else _compare(logits_CV, targets, rows, mask_N, temperature)
            if measures is not None:
                compared += torch.stack(measures).cpu().double().sum(dim=1).numpy()
        labels = _joined(of_labels)
        sum_nats += float(labels.loss_C.cpu().double().sum())
        seconds += time.perf_counter() - started
        calibration.add(labels)
        targets_B = (labels_BT != NO_LABEL).sum(dim=1).cpu().numpy()
        if knows_loss:
            loss_B = reader.read("block_loss", blocks).astype(np.float64)
            teacher_nats += float((loss_B * targets_B)[targets_B > 0].sum())
        num_targets += int(targets_B.sum())
        num_positions += int(mask_BT.sum())
        num_run += read_ids_BT.numel()
        seen(int(batch.lengths_B.sum()))
    if not num_targets:
        raise BadInputError("too-little-text", reader.place, expected="a block of at least 2 tokens")
    if not np.isfinite([sum_nats, *compared]).all():
        raise _non_finite(scorer.name, [sum_nats, *compared.tolist()])
    kl, agreement, overlap = (None if kind is None else total / num_positions for total in compared.tolist())
    unknown: dict[str, float | None] = {"loss_nats": None, "perplexity": None}
    teacher_loss = _loss("the cache's teacher", teacher_nats, num_targets) if knows_loss else unknown
    return {
        "cache": reader.place,
        "temperature": temperature,
        "num_tokens": num_targets,
        "num_positions": num_positions,
        **_loss(scorer.name, sum_nats, num_targets),
        "ece": calibration.error,
        "kl_is": kind,
        "kl_to_teacher": kl,
        "agreement": agreement,
        "overlap": overlap,
        "teacher_loss": teacher_loss["loss_nats"],
        "teacher_perplexity": teacher_loss["perplexity"],
        "tokens_per_s": round(num_run / seconds, 1),
    }


def _joined(chunks: Iterable[LabelMeasures]) -> LabelMeasures:
    return LabelMeasures(*(torch.cat(measures) for measures in zip(*chunks, strict=True)))


def _comparable_tail(manifest: Manifest) -> Tail:
    return "bucket" if manifest.imported is None else manifest.imported.tails[0]


def _kl_kind(targets: HeadLossTargets, manifest: Manifest) -> str | None:
    """What the divergence from these targets says of that from the teacher's full distribution; None: nothing."""
    vocab_size = manifest.teacher.vocab_size
    if manifest.imported is not None:
        return None  # The mass outside the head is known as well as the values were rounded, or not at all.
    if isinstance(targets, BucketTargets):
        return "exact" if targets.ids_NK.shape[1] == vocab_size else "lower-bound"
    # Of drawn tokens no divergence can be told, only its mean over draws but for a constant.
    return "exact" if isinstance(targets, DenseTargets) else None


def _compare(
    logits_CV: Tensor, targets: HeadLossTargets, rows: slice, mask_N: Tensor, temperature: float
) -> TeacherMeasures | None:
    rows_C = torch.arange(rows.start, rows.stop, device=mask_N.device)
    chunk, mask_C = targets.rows(rows_C, logits_CV.dtype), mask_N[rows_C]
    if isinstance(chunk, BucketTargets):
        return compare_with_bucket(logits_CV, mask_C, chunk, temperature)
    if isinstance(chunk, DenseTargets):
        teacher_CV = F.linear(chunk.hidden_ND, chunk.weight_VD, chunk.bias_V)
        return compare_with_logits(logits_CV, mask_C, teacher_CV, temperature)
    return None


def _loss(name: str, sum_nats: float, num_tokens: int) -> dict[str, float | None]:
    loss_nats = sum_nats / num_tokens
    if not math.isfinite(loss_nats):
        raise _non_finite(name, loss_nats)
    return {"loss_nats": loss_nats, "perplexity": math.exp(loss_nats) if loss_nats < 700 else None}


def _non_finite(name: str, found: object) -> KdpipeError:
    return KdpipeError("non-finite-loss", name, expected="finite losses", found=found)


_KL_WORDS = {
    "exact": "exact KL and overlap",
    "lower-bound": "KL from below and overlap from above",
    None: "of drawn or imported targets, which tell neither KL nor overlap,",
}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for people: for each text and for the cache, the models under each other."""
    lines: list[str] = []
    for number, text in enumerate(rows[0]["texts"] if rows else []):
        pairs = [(row, row["texts"][number]) for row in rows]
        lines += ["", str(text["text"]), *_aligned(_cells(pairs, {"bits_per_byte": "bits/byte", "ece": "ECE"}))]
    if rows and (cache := rows[0]["cache"]) is not None:
        names = {"ece": "ECE", "kl_to_teacher": "KL", "agreement": "agreement", "overlap": "overlap"}
        header, *cells = _cells([(row, row["cache"]) for row in rows], names)
        teacher = ["(the teacher)", "", cells[0][2], _figure(cache["teacher_loss"])]
        teacher += [_figure(cache["teacher_perplexity"], 2), *[""] * (len(header) - 5)]
        place = f"{cache['cache']}, {_KL_WORDS[cache['kl_is']]} at temperature {cache['temperature']:g}"
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
