"""Tokens a second of a capture, beside the bare teacher's forward pass on the same batches.

In: a teacher, sizes, turns. Out: for each turn wall-clock and CPU seconds a token of both, and what of the capture is
reading, encoding and committing. A turn captures a few shards through the code that ``kdpipe cache-teacher`` runs, then
computes the same batches' logits with the model itself; which comes first changes from turn to turn. What is done once
for a capture of any length, loading the model and the encoder's tables, is not in the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.capture.captures import Begun, begin
from cache_spec.commit import commit_shard
from pipeline import folder
from pipeline.encoders.spectrum import Encoder
from pipeline.place import InFolder
from pipeline.shard import batches, capture_shards, encode_hidden, encoder_of, joined, read_blocks


def measure(
    teacher: Path,
    work: Path,
    *,
    block_tokens: int,
    batch_blocks: int,
    shard_batches: int,
    turn_shards: int,
    turns: int,
    **settings: Any,
) -> dict[str, Any]:
    """``turns`` turns, after one batch that warms up; one shard more is taken apart."""
    shard_blocks = batch_blocks * shard_batches
    begun = begin(
        teacher,
        work,
        block_tokens=block_tokens,
        batch_blocks=batch_blocks,
        shard_blocks=shard_blocks,
        limit_tokens=(turns * turn_shards + 1) * shard_blocks * block_tokens,
        **settings,
    )
    encoder = encoder_of(begun.manifest, folder.read_tables(work, begun.manifest), begun.run.teacher.device)
    _forward(begun, [0], 1)
    made: dict[str, list[tuple[float, float]]] = {"capture": [], "forward": []}
    for turn in range(turns):
        shards = list(range(1 + turn * turn_shards, 1 + (turn + 1) * turn_shards))
        parts: dict[str, Callable[[], object]] = {
            "capture": partial(_capture, begun, encoder, shards),
            "forward": partial(_forward, begun, shards),
        }
        for name in sorted(parts, reverse=turn % 2 == 1):
            made[name].append(_timed(parts[name]))
    num_tokens = turn_shards * shard_blocks * block_tokens
    ratios = [
        [forward[clock] / capture[clock] for capture, forward in zip(made["capture"], made["forward"], strict=True)]
        for clock in (0, 1)
    ]
    return {
        "threads": torch.get_num_threads(),
        "turns": turns,
        "tokens_a_turn": num_tokens,
        "capture_tokens_per_s": round(num_tokens / statistics.median(s for s, _ in made["capture"]), 1),
        "forward_tokens_per_s": round(num_tokens / statistics.median(s for s, _ in made["forward"]), 1),
        "ratio": round(statistics.median(ratios[0]), 3),
        "cpu_ratio": round(statistics.median(ratios[1]), 3),
        "ratios": [round(ratio, 3) for ratio in ratios[0]],
        "cpu_ratios": [round(ratio, 3) for ratio in ratios[1]],
        "cpu_microseconds_a_token": _taken_apart(begun, encoder),
    }


def _capture(begun: Begun, encoder: Encoder, shards: list[int]) -> None:
    run = begun.run
    for _ in capture_shards(InFolder(begun.config.out), begun.manifest, run.staged, run.teacher, encoder, shards):
        pass


@torch.inference_mode()
def _forward(begun: Begun, shards: list[int], most: int | None = None) -> None:
    """The model's own logits, as whoever runs it without us gets them."""
    for shard in shards:
        for first, count in batches(begun.manifest, shard)[:most]:
            ids_BT = torch.from_numpy(begun.run.staged.read(first, count).astype("int64"))
            begun.run.teacher.model(input_ids=ids_BT)


def _taken_apart(begun: Begun, encoder: Encoder) -> dict[str, float]:
    """Steps of one shard, one after the other."""
    run, manifest, out = begun.run, begun.manifest, begun.config.out
    spent = dict.fromkeys(("blocks", "hidden_states", "encode", "commit"), 0.0)

    def step(name: str, action: Callable[..., Any], *arguments: Any) -> Any:
        began = time.process_time()
        result = action(*arguments)
        spent[name] += time.process_time() - began
        return result

    parts, num_tokens, staged = [], 0, run.staged
    for first, count in batches(manifest, 0):
        ids_BT, lengths_B = step("blocks", staged.read, first, count), staged.lengths(first, count)
        states = step("hidden_states", read_blocks, manifest, run.teacher, ids_BT, lengths_B, None)
        batch = (states, ids_BT, lengths_B, first)
        parts.append(step("encode", encode_hidden, manifest, run.teacher.head, encoder, *batch))
        num_tokens += ids_BT.size
    step("commit", commit_shard, out, manifest, 0, joined(parts))
    return {name: round(1e6 * seconds / num_tokens, 1) for name, seconds in spent.items()}


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    began = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - began[0], time.process_time() - began[1]
