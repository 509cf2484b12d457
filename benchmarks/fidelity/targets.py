"""Part one: for every configuration its bytes, its distance from the teacher, its gradients and its speed.

In: a capture, and a student for each temperature. Out: one dictionary of figures for each configuration. All of them
see the same held-out positions, in the same batches, drawn from shuffled blocks as training draws them.

Legend of axes: B blocks, T tokens, N positions, V vocabulary, D width, J tokens that a target names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.encoding import TimedHead
from benchmarks.fidelity.captures import HELD_OUT, Capture, disk_bytes, encoded
from benchmarks.fidelity.configurations import Configuration
from benchmarks.fidelity.measures import (
    Angles,
    Distance,
    Gradient,
    Head,
    Named,
    Positions,
    add_distances,
    chunks,
    gradient,
)
from benchmarks.fidelity.rivals import DistillKit
from cache_spec.reader import CacheReader
from cache_spec.targets import Array, HiddenTargets
from pipeline.encoders import make_encoder
from pipeline.targets import encode_batch
from train.distil_batch import HeadTensors, PointTensors, StoredTensors, to_tensors
from train.distiller import output_head, shift_labels
from train.lm_kind import student_states
from train.loss_targets import BucketTargets, DenseTargets, HeadLossTargets, LinearTargets
from train.teacher_targets import TeacherTargets, pick_tail

_FORWARD_BLOCKS = 4
_SPEED_TOKENS = 4_096
_SPEED_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class Batches:
    """How held-out blocks are batched: the larger batch is made of whole smaller ones."""

    larger: list[list[Array]]
    """For each larger batch the blocks of its smaller ones, int64 [B] each."""
    positions: tuple[int, int]
    """Tokens of a smaller and of a larger batch."""


def batches(reader: CacheReader, positions: tuple[int, int], *, most: int | None, seed: int) -> Batches:
    """As many whole batches as there are, up to ``most`` tokens; with too few blocks, one batch of what there is."""
    blocks_info = reader.manifest.blocks
    order = np.random.default_rng(seed).permutation(blocks_info.num_blocks)
    per_small = max(1, positions[0] // blocks_info.block_tokens)
    smaller = [order[i : i + per_small] for i in range(0, len(order) - per_small + 1, per_small)] or [order]
    per_large = min(len(smaller), max(1, positions[1] // positions[0]))
    larger = [smaller[i : i + per_large] for i in range(0, len(smaller) - per_large + 1, per_large)]
    if most is not None:
        larger = larger[: max(1, most // (per_small * per_large * blocks_info.block_tokens))]
    tokens = len(larger[0][0]) * blocks_info.block_tokens
    return Batches(larger=larger, positions=(tokens, tokens * per_large))


@dataclass(frozen=True, kw_only=True)
class _Batch:
    blocks: Array
    at: Positions
    full: Gradient


class Source:
    """A configuration's cache, giving the product's targets of any blocks at one temperature."""

    def __init__(self, reader: CacheReader, configuration: Configuration, temperature: float) -> None:
        tail = pick_tail(configuration.tail, reader.manifest)
        self._reader, self._temperature = reader, temperature
        self._make = TeacherTargets.of_cache(reader, temperature=temperature, tail=tail)

    def targets(self, batch: _Batch) -> tuple[HeadLossTargets, Named | None]:
        """Targets of a batch, and the tokens that they name."""
        read = self._reader.batch(batch.blocks, self._temperature, with_hidden=False)
        stored = to_tensors(read).targets
        return self._make(stored, batch.at.labels_N), _named(stored)


class RivalSource:
    """The same for a rival, from the teacher's own distributions."""

    def __init__(self, rival: DistillKit, head: Head, temperature: float) -> None:
        self._rival, self._head, self._temperature = rival, head, temperature

    def targets(self, batch: _Batch) -> tuple[HeadLossTargets, Named | None]:
        """Targets of a batch, and the tokens that they name."""
        hidden_ND = batch.at.teacher_ND
        pieces = [
            self._rival.targets(F.linear(hidden_ND[rows], *self._head).log_softmax(dim=1), self._temperature)
            for rows in chunks(len(hidden_ND), len(self._head.weight_VD))
        ]
        merged = _merged(pieces)
        ids_NJ = merged.ids_NK if isinstance(merged, BucketTargets) else merged.ids_NJ
        return merged, Named(ids_NJ, torch.ones_like(ids_NJ, dtype=torch.bool))


def _merged(pieces: Sequence[LinearTargets | BucketTargets]) -> LinearTargets | BucketTargets:
    def joined(name: str) -> Tensor:
        return torch.cat([getattr(piece, name) for piece in pieces])

    if isinstance(pieces[0], BucketTargets):
        return BucketTargets(
            ids_NK=joined("ids_NK"), log_probs_NK=joined("log_probs_NK"), log_rest_N=joined("log_rest_N")
        )
    return LinearTargets(ids_NJ=joined("ids_NJ"), weights_NJ=joined("weights_NJ"), self_nats_N=joined("self_nats_N"))


def _named(stored: StoredTensors) -> Named | None:
    if isinstance(stored, HeadTensors):
        ids_NJ = stored.ids_BTK.flatten(0, 1).long()
        return Named(ids_NJ, torch.ones_like(ids_NJ, dtype=torch.bool))
    if isinstance(stored, PointTensors):
        return Named(stored.ids_BTJ.flatten(0, 1).long(), stored.probs_BTJ.flatten(0, 1) > 0)
    return None


@dataclass(slots=True)
class _Tally:
    distance: Distance = field(default_factory=Distance)
    smaller: Angles = field(default_factory=Angles)
    larger: Angles = field(default_factory=Angles)


def measure_targets(
    capture: Capture,
    configurations: Sequence[Configuration],
    rivals: Sequence[DistillKit],
    students: Mapping[float, Path],
    *,
    positions: tuple[int, int],
    most: int | None,
    seed: int,
    quiet: bool,
) -> dict[str, Any]:
    """Measure every configuration and rival at every temperature that has a student."""
    held_out = capture.held_out
    plan = batches(held_out, positions, most=most, seed=seed)
    weight_VD, bias_V = held_out.output_head()
    head = Head(torch.from_numpy(weight_VD), None if bias_V is None else torch.from_numpy(bias_V))
    readers = {one.name: encoded(capture, HELD_OUT, one) for one in configurations}
    rows: dict[str, dict[str, Any]] = {}
    for one in configurations:
        reader = readers[one.name]
        record = reader.manifest.encoding.model_dump(mode="json")
        rows[one.name] = {"encoding": record, "tail": pick_tail(one.tail, reader.manifest), "grid": one.temperatures}
        rows[one.name] |= disk_bytes(reader) | {"tokens_per_s": _speed(held_out, reader, head)}
    for rival in rivals:
        rows[rival.name] = {"rival": True, "bytes_per_token": rival.bytes_per_token(len(head.weight_VD))}
    for row in rows.values():
        row["temperatures"] = {}
    passes = sum(len(smaller) for smaller in plan.larger) * len(students)
    with tqdm(total=passes, unit="batch", desc="gradients", disable=quiet or None) as bar:
        for temperature, folder in students.items():
            sources: dict[str, Source | RivalSource] = {
                one.name: Source(readers[one.name], one, temperature)
                for one in configurations
                if temperature in one.temperatures or readers[one.name].manifest.encoding.any_temperature
            }
            sources |= {rival.name: RivalSource(rival, head, temperature) for rival in rivals}
            tallies = _compare(held_out, head, folder, sources, plan, temperature, bar)
            for name, tally in tallies.items():
                rows[name]["temperatures"][f"{temperature:g}"] = {
                    **tally.distance.figures(),
                    "gradient": {"smaller": tally.smaller.figures(), "larger": tally.larger.figures()},
                }
    first = next(iter(tallies.values()))
    return {
        "positions": first.distance.num_positions,
        "batch_positions": plan.positions,
        "batches": [sum(map(len, plan.larger)), len(plan.larger)],
        "rows": [{"name": name, **row} for name, row in rows.items()],
    }


def _compare(
    held_out: CacheReader,
    head: Head,
    student_folder: Path,
    sources: Mapping[str, Source | RivalSource],
    plan: Batches,
    temperature: float,
    bar: Any,
) -> dict[str, _Tally]:
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32, local_files_only=True).eval()
    weight_VD, bias_V = output_head(model)
    vocab_size = len(head.weight_VD)
    student = Head(weight_VD[:vocab_size].detach(), None if bias_V is None else bias_V[:vocab_size].detach())
    tallies = {name: _Tally() for name in sources}
    for larger in plan.larger:
        made = [_batch(held_out, head, model, student, blocks, temperature) for blocks in larger]
        of: dict[str, list[HeadLossTargets]] = {name: [] for name in sources}
        for batch in made:
            named: dict[str, Named] = {}
            for name, source in sources.items():
                targets, tokens = source.targets(batch)
                of[name].append(targets)
                if tokens is not None:
                    named[name] = tokens
            distances = {name: tally.distance for name, tally in tallies.items()}
            here = {name: targets[-1] for name, targets in of.items()}
            add_distances(distances, here, named, batch.at, head, temperature)
        # One configuration at a time: a gradient on the head is as large as the head.
        full = _sum(batch.full for batch in made)
        for name, tally in tallies.items():
            tally.larger.add(_sum(_gradients(made, of[name], student, temperature, tally.smaller)), full)
        bar.update(len(made))
    return tallies


def _gradients(
    made: Sequence[_Batch], targets: Sequence[HeadLossTargets], student: Head, temperature: float, angles: Angles
) -> Iterator[Gradient]:
    """That of each batch, whose angle is counted."""
    for batch, some in zip(made, targets, strict=True):
        mine = gradient(some, batch.at, student, temperature)
        angles.add(mine, batch.full)
        yield mine


@torch.no_grad()
def _hidden(model: Any, input_ids_BT: Tensor) -> Tensor:
    lengths_B = torch.full((len(input_ids_BT),), input_ids_BT.shape[1])
    parts = zip(input_ids_BT.split(_FORWARD_BLOCKS), lengths_B.split(_FORWARD_BLOCKS), strict=True)
    return torch.cat([student_states(model, ids_BT, lengths).last_BTD for ids_BT, lengths in parts])


def _batch(held_out: CacheReader, head: Head, model: Any, student: Head, blocks: Array, temperature: float) -> _Batch:
    read = held_out.batch(blocks, temperature, with_hidden=False)
    assert isinstance(read.targets, HiddenTargets)
    tensors = to_tensors(read)
    input_ids_BT = tensors.input_ids_BT.long()
    at = Positions(
        teacher_ND=torch.from_numpy(read.targets.hidden_BTD).flatten(0, 1).float(),
        student_ND=_hidden(model, input_ids_BT).flatten(0, 1),
        labels_N=shift_labels(input_ids_BT, tensors.lengths_B)[0].flatten(),
    )
    exact = DenseTargets(hidden_ND=at.teacher_ND, weight_VD=head.weight_VD, bias_V=head.bias_V)
    return _Batch(blocks=blocks, at=at, full=gradient(exact, at, student, temperature))


def _sum(gradients: Iterable[Gradient]) -> Gradient:
    """Of batches with as many positions each, of which one is held at a time."""
    total: Gradient | None = None
    for one in gradients:
        if total is None:
            total = Gradient(*(part.clone() for part in one))
        else:
            for part, more in zip(total, one, strict=True):
                part += more
    assert total is not None
    return total


def _speed(held_out: CacheReader, reader: CacheReader, head: Head) -> dict[str, float]:
    """Tokens a second of processor time, medians of a few turns: encoding after the head's product, and decoding."""
    manifest = reader.manifest
    tokens = manifest.blocks.block_tokens
    blocks = np.arange(min(manifest.blocks.num_blocks, max(1, _SPEED_TOKENS // tokens)))
    read = held_out.batch(blocks, manifest.temperatures[0], with_hidden=False)
    assert isinstance(read.targets, HiddenTargets)
    hidden_BTD = torch.from_numpy(read.targets.hidden_BTD)
    tables = {name: reader.table(name) for name in manifest.tables}
    encoder = make_encoder(manifest.encoding, manifest.geometry, tables=tables)
    timed = TimedHead(weight_VD=head.weight_VD, bias_V=head.bias_V, spent=[])
    encode_s, decode_s = [], []
    for _ in range(_SPEED_TURNS):
        timed.spent.clear()
        began = time.process_time()
        encode_batch(timed, hidden_BTD, read.input_ids_BT, read.lengths_B, encoder=encoder, first_block=0)
        encode_s.append(time.process_time() - began - sum(timed.spent))
        began = time.process_time()
        reader.batch(blocks, manifest.temperatures[0], with_hidden=False)
        decode_s.append(time.process_time() - began)
    num_tokens = len(blocks) * tokens
    return {"encode": num_tokens / float(np.median(encode_s)), "decode": num_tokens / float(np.median(decode_s))}
