"""How good language models are: on corpora, on plain text, and against the teacher whose targets a cache holds.

In: names of models, corpora, text files, a held-out cache. Out: one dictionary of figures for each model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cache_spec.durable import make_folder, replace_file
from cache_spec.reader import CacheReader
from train.evaluation.bootstrap import Bootstrap
from train.evaluation.config import EvaluateConfig
from train.evaluation.corpora import read_corpus
from train.evaluation.harness import require_harness, run_harness
from train.evaluation.on_cache import cache_figures
from train.evaluation.on_corpus import CorpusMeasured, add_differences, corpus_figures
from train.evaluation.on_text import text_figures
from train.evaluation.samples import write_samples
from train.evaluation.scorer import FoundModel, find_models, load_scorer, pick_dtype
from train.evaluation.speed import SpeedConfig, measure_speeds
from train.evaluation.text import read_text
from train.memory import out_of_memory_at
from train.run import pick_device
from train.student import quiet_transformers


def evaluate_models(config: EvaluateConfig, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure each model on each corpus, each text and the cache; returns a dictionary of plain JSON values for each.

    ``name``, ``parameters``, ``dtype``, ``device``, ``file_bytes`` (of its weights), and
    ``corpora``: for each what ``corpus_figures`` returns, with the difference to the first model;
    ``texts``: for each text ``text``, ``num_tokens`` (predicted ones), ``num_bytes`` (UTF-8 bytes they stand for),
    ``loss_nats`` (mean over them), ``perplexity`` (None where it is beyond a float), ``bits_per_byte`` (their total
    loss in bits by ``num_bytes``), ``ece`` (expected calibration error of the most probable token against the text's
    own, in 15 bins of equal width) and ``tokens_per_s`` (of the forward passes, output head included);
    ``cache``: None, or ``cache``, ``temperature``, ``num_tokens`` (predicted ones; of masked text those to be found
    out), ``loss_nats``, ``perplexity``, ``ece`` as above, ``teacher_loss`` and ``teacher_perplexity``
    (the teacher's own on the same tokens; None of an imported cache), and, over the ``num_positions`` real positions
    (of masked text those that the cache kept), ``kl_to_teacher`` (nats a position, at the temperature), ``overlap``
    (the sum of min(p, q)) and
    ``agreement`` (how often the most probable token is the teacher's). ``kl_is`` tells what the
    cache's encoding allows: ``exact`` over the whole vocabulary; ``lower-bound`` where KL and overlap are between
    distributions over the cached head and one bucket for the rest, which makes overlap an upper bound; None for drawn
    or imported targets, which do not tell, and then all three are None. ``intervals`` resample its blocks;
    ``speed``: None, or the fields of ``Speed``; ``samples``: for each prompt ``prompt`` and ``text``;
    ``harness``: None, or what ``run_harness`` returns.

    Corpora, texts, cache, tokenizers and configurations are all checked before the first weight is loaded. Raises
    BadInputError, among its kinds ``unknown-model``, ``unreadable-weights``, ``not-a-language-model``,
    ``not-a-causal-lm``, ``not-a-masked-lm``, ``no-tokenizer``,
    ``block-too-long``, ``student-vocabulary``, ``vocabulary-mismatch`` and those of ``read_text`` and ``read_corpus``;
    and KdpipeError ``non-finite-loss`` or ``out-of-memory``.
    """
    device = pick_device(config.device)
    if config.harness:
        require_harness()
    reader = None if config.cache is None else CacheReader.open(config.cache, config)
    if reader is not None:
        reader.manifest.temperature_index(config.temperature)
    texts = {name: read_text(Path(name).expanduser(), config.limit_bytes) for name in config.text}
    corpora = [read_corpus(given, count_line_ends=config.count_line_ends) for given in config.corpus]
    bootstrap = Bootstrap(resamples=config.bootstrap, level=config.level, seed=config.seed)
    # Models warn of padding without a mask, where blocks hold an id that is also the padding's.
    hint = "fewer --batch-blocks, a smaller --block-tokens or --window, or --dtype bfloat16 takes less"
    with quiet_transformers(), out_of_memory_at(f"evaluation on {device}", hint):
        sources = find_models(config, texts, corpora, reader)
        rows, measured = [], []
        for source in sources:
            row, of_corpora = _measure(source, reader, config, bootstrap, device, quiet)
            rows.append(row)
            measured.append(of_corpora)
        for of_models in zip(*measured, strict=True):
            add_differences(list(of_models), sources[0].name, bootstrap)
        if config.speed:
            _add_speeds(rows, sources, config, device)
    return rows


def report(config: EvaluateConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``kdpipe evaluate --json`` prints: ``models``, the rows, and ``bootstrap``, what intervals are made by."""
    settings = {"resamples": config.bootstrap, "level": config.level, "seed": config.seed}
    return {"models": rows, "bootstrap": settings}


def write_report(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all; BadInputError ``cannot-write``."""
    make_folder(path.parent)
    replace_file(path, json.dumps(facts, indent=2).encode() + b"\n")


def _measure(
    source: FoundModel,
    reader: CacheReader | None,
    config: EvaluateConfig,
    bootstrap: Bootstrap,
    device: torch.device,
    quiet: bool,
) -> tuple[dict[str, Any], list[CorpusMeasured]]:
    scorer = load_scorer(source, None if reader is None else reader.manifest, device, pick_dtype(config.dtype, device))

    def bar(on: str, num_tokens: int) -> tqdm[Any]:
        description = f"{Path(source.name).name} on {Path(on).name}"
        return tqdm(total=num_tokens, unit="tok", unit_scale=True, desc=description, disable=quiet or None)

    corpora = []
    for plan in source.corpora:
        with bar(plan.corpus.name, sum(window.num_scored for window in plan.windows)) as progress:
            batch_tokens = config.batch_blocks * plan.window
            corpora.append(corpus_figures(scorer, plan, bootstrap, batch_tokens, progress.update))
    texts = []
    for name, text in source.texts.items():
        with bar(name, len(text.ids)) as progress:
            texts.append({"text": name, **text_figures(scorer, text, config.batch_blocks, progress.update)})
    cache = None
    if reader is not None:
        with bar(reader.place, reader.manifest.corpus.num_tokens) as progress:
            cache = cache_figures(scorer, reader, config.temperature, config.batch_blocks, progress.update, bootstrap)
    row = {
        "name": source.name,
        "parameters": sum(parameter.numel() for parameter in scorer.model.parameters()),
        "dtype": str(scorer.model.dtype).removeprefix("torch."),
        "device": str(device),
        "file_bytes": sum(path.stat().st_size for path in source.folder.glob("*.safetensors")),
        "texts": texts,
        "cache": cache,
        "corpora": [measured.figures for measured in corpora],
        "speed": None,
        "samples": write_samples(scorer.model, source.tokenizer, config),
        "harness": run_harness(scorer.model, source.tokenizer, source.corpora, config.batch_blocks)
        if config.harness
        else None,
    }
    return row, corpora


def _add_speeds(
    rows: list[dict[str, Any]], sources: list[FoundModel], config: EvaluateConfig, device: torch.device
) -> None:
    settings = SpeedConfig(
        prompt_tokens=config.prompt_tokens, new_tokens=config.new_tokens, rounds=config.rounds, peak_memory=True
    )
    folders = {source.name: source.folder for source in sources}
    speeds = measure_speeds(folders, settings, device=device, dtype=pick_dtype(config.dtype, device))
    for row, source in zip(rows, sources, strict=True):
        row["speed"] = asdict(speeds[source.name])
