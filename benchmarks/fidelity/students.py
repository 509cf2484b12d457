"""Part two: the same student from every kind of target, and how much of what full distillation gains each one gives.

In: a capture, the teacher's folder for the student's first layers, configurations and seeds. Out: one result for each
run, kept as a file, so that a campaign goes on where it stopped and may run in several processes at once; and what the
results of all seeds come to. Student, initialisation, order of blocks and steps are the same in every run of a seed.

Legend of axes: C rows of a chunk, V vocabulary, N positions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from benchmarks.fidelity.captures import HELD_OUT, TRAIN, Capture, encoded, write_json
from benchmarks.fidelity.configurations import Configuration
from train.config import TrainConfig
from train.evaluation.config import EvaluateConfig
from train.evaluation.evaluate import evaluate_models
from train.loop import train

logger = logging.getLogger("kdpipe")

CROSS_ENTROPY, FULL = "cross-entropy", "full distillation"
KL_WEIGHT, CE_WEIGHT = 0.9, 0.1


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all runs have in common."""

    teacher: str
    """Folder of the teacher: the student starts from some of its layers."""
    num_layers: int
    steps: int
    step_tokens: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student."""

    name: str
    configuration: Configuration | None
    """None: cross-entropy or full distillation, from the hidden states."""
    temperature: float | None
    """None for cross-entropy, which has none."""
    seed: int


def runs(configurations: Sequence[Configuration], temperatures: Sequence[float], seeds: Iterable[int]) -> list[Run]:
    """Every run of a campaign, seed by seed, so that what is done early can be compared early."""
    made = []
    for seed in seeds:
        made.append(Run(name=CROSS_ENTROPY, configuration=None, temperature=None, seed=seed))
        for temperature in temperatures:
            made.append(Run(name=FULL, configuration=None, temperature=temperature, seed=seed))
            made += [
                Run(name=one.name, configuration=one, temperature=temperature, seed=seed)
                for one in configurations
                if temperature in one.temperatures
            ]
    return made


def settings(capture: Capture, run: Run, training: Training, out: Path) -> TrainConfig:
    """The product's settings of one run."""
    reader = capture.parts[TRAIN]
    if run.configuration is not None:
        reader = encoded(capture, TRAIN, run.configuration)
    blocks = reader.manifest.blocks
    batch_blocks = max(1, training.step_tokens // blocks.block_tokens)
    steps_per_epoch = -(-blocks.num_blocks // batch_blocks)
    return TrainConfig.model_validate(
        {
            "cache": reader.path,
            "out": out,
            "teacher": training.teacher,
            "num_layers": training.num_layers,
            "temperature": run.temperature or 1.0,
            "kl_weight": 0.0 if run.temperature is None else KL_WEIGHT,
            "ce_weight": 1.0 if run.temperature is None else CE_WEIGHT,
            "tail": run.configuration.tail if run.configuration else None,
            "batch_blocks": batch_blocks,
            "epochs": -(-training.steps // steps_per_epoch),
            "max_steps": training.steps,
            "checkpoint_every": training.steps,
            "log_every": training.steps,
            "tensorboard": False,
            "precision": training.precision,
            "seed": run.seed,
        }
    )


def trained(capture: Capture, run: Run, training: Training) -> Path:
    """The folder of a student, trained unless it is there."""
    out = capture.work / "probes" / _key(capture, run, training)
    out.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out.with_name(f"{out.name}.lock")):
        result = train(settings(capture, run, training, out), quiet=True)
    return out / str(result["student"])


def campaign(
    capture: Capture, wanted: Sequence[Run], training: Training, temperatures: Sequence[float]
) -> list[dict[str, Any]]:
    """Do every run that nobody has done or is doing; returns the results that are there in the end."""
    folder = capture.work / "students"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {run: folder / f"{_key(capture, run, training)}.json" for run in wanted}
    for run, path in paths.items():
        lock = filelock.FileLock(path.with_suffix(".lock"))
        try:
            # Held by the system for a living process alone: what a killed one had claimed is free again.
            lock.acquire(timeout=0)
        except filelock.Timeout:
            continue
        try:
            if not path.exists():
                logger.info("student: %s, T = %s, seed %d", run.name, run.temperature, run.seed)
                write_json(path, _result(capture, run, training, temperatures, path.with_suffix("")))
        finally:
            lock.release()
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths.values() if path.exists()]


def _result(capture: Capture, run: Run, training: Training, temperatures: Sequence[float], out: Path) -> dict[str, Any]:
    result = train(settings(capture, run, training, out), quiet=True)
    student = str(out / str(result["student"]))
    measured = {}
    for temperature in temperatures if run.temperature is None else (run.temperature,):
        config = EvaluateConfig(models=(student,), cache=capture.parts[HELD_OUT].path, temperature=temperature)
        figures = evaluate_models(config, quiet=True)[0]["cache"]
        measured[f"{temperature:g}"] = {name: value for name, value in figures.items() if name != "cache"}
    # Weights and the optimizer's state are ten times what a student of this size is worth keeping.
    shutil.rmtree(out)
    return {
        "name": run.name,
        "temperature": run.temperature,
        "seed": run.seed,
        "steps": result["steps"],
        "train_tokens": result["tokens"],
        "train_seconds": result["seconds"],
        "held_out": measured,
    }


def _key(capture: Capture, run: Run, training: Training) -> str:
    """A name that changes with whatever changes the result."""
    place = Path("-")
    facts = {
        "run": settings(capture, run, training, place).model_dump(mode="json", exclude={"cache", "out", "teacher"}),
        "train": capture.parts[TRAIN].manifest.fingerprint,
        "held_out": capture.parts[HELD_OUT].manifest.fingerprint,
        "flags": run.configuration.flags if run.configuration else None,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    words = "-".join("".join(c if c.isalnum() else " " for c in run.name).split())
    return f"{words}-{'' if run.temperature is None else f'T{run.temperature:g}-'}s{run.seed}-{digest}"


def summary(results: Sequence[Mapping[str, Any]], temperatures: Sequence[float]) -> list[dict[str, Any]]:
    """For each kind of target and temperature: means over seeds, spreads, and percent of the gap recovered.

    The gap is that between cross-entropy's student and full distillation's of the same seed; percents are those of
    each seed, averaged. None where full distillation gains nothing in some seed.
    """
    rows = []
    for temperature in temperatures:
        at = f"{temperature:g}"
        of: dict[str, dict[int, Mapping[str, float]]] = {}
        for result in results:
            if at in result["held_out"]:
                of.setdefault(result["name"], {})[result["seed"]] = result["held_out"][at]
        for name, by_seed in of.items():
            row: dict[str, Any] = {"name": name, "temperature": temperature, "seeds": sorted(by_seed)}
            for figure in ("loss_nats", "kl_to_teacher", "agreement", "overlap", "ece"):
                values = [figures[figure] for figures in by_seed.values() if figures.get(figure) is not None]
                row[figure] = _mean_and_spread(values)
            seeds = sorted(set(by_seed) & set(of.get(CROSS_ENTROPY, {})) & set(of.get(FULL, {})))
            for figure in ("loss_nats", "kl_to_teacher"):
                gaps = [of[CROSS_ENTROPY][seed][figure] - of[FULL][seed][figure] for seed in seeds]
                gains = [of[CROSS_ENTROPY][seed][figure] - by_seed[seed][figure] for seed in seeds]
                known = bool(gaps) and min(gaps) > 0
                percents = [100 * gain / gap for gain, gap in zip(gains, gaps, strict=True)] if known else []
                row[f"percent_of_gap_in_{figure}"] = _mean_and_spread(percents)
            ratios = [by_seed[seed]["kl_to_teacher"] / of[FULL][seed]["kl_to_teacher"] - 1 for seed in seeds]
            row["kl_above_full_percent"] = _mean_and_spread([100 * ratio for ratio in ratios])
            rows.append(row)
    return rows


def _mean_and_spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
