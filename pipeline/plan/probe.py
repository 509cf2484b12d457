"""A short capture, timed part by part: the code that ``cache-teacher`` runs, on the real teacher, text and disk.

In: capture settings, and how long to go on. Out: a finished small cache, seconds of each part and bytes of each array.
It runs in a process of its own (``pipeline.plan.children``), which is timed from outside.

Legend of axes: B blocks, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from cache_spec.encodings.prototype import Prototype
from cache_spec.layout import array_specs
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from cache_spec.receipts import Receipt
from cache_spec.shardfile import index_bytes
from pipeline import folder
from pipeline.capture import Run, stage
from pipeline.config import CaptureConfig
from pipeline.place import InFolder
from pipeline.shard import capture_shards, encoder_of
from pipeline.source import Source, resolve_source
from pipeline.teacher import Teacher

_MOST_BATCHES = 64


class _TimedPlace(InFolder):
    """The cache's folder, with a stopwatch on commits."""

    commit_s = 0.0

    def publish(self, manifest: Manifest, packed: Any) -> Receipt:
        began = time.perf_counter()
        receipt = super().publish(manifest, packed)
        self.commit_s += time.perf_counter() - began
        return receipt


def probe(order: dict[str, Any]) -> dict[str, Any]:
    """Make a small cache and say what it took.

    ``order``: ``settings`` of a capture, ``seconds``, and ``least_blocks`` that what comes after would like to have.
    """
    return _probe(CaptureConfig.model_validate(order["settings"]), order["seconds"], order["least_blocks"])


def _probe(config: CaptureConfig, seconds: float, least_blocks: int) -> dict[str, Any]:
    source = resolve_source(_limited(config, 1))
    with folder.exclusive(config.out):
        place = _TimedPlace(config.out)
        first, first_stage_s = _timed(lambda: stage(source, quiet=True))
        run = Run(source, place, first, True, False)
        teacher, load_s = _timed(lambda: run.teacher)
        block_s, warm_up_s = _timed_block(run)
        num_blocks = _blocks_for(config, source, seconds, block_s, least_blocks)
        run.source = source = _learning_little(replace(source, config=_limited(config, num_blocks)), num_blocks)
        run.staged, stage_s = _timed(lambda: stage(source, quiet=True))
        manifest, create_s = _timed(lambda: folder.create(config.out, *run.start()))
        place.begin(manifest)
        with _forward_timed(teacher) as forward:
            cpu_began, capture_began = time.process_time(), time.perf_counter()
            stamps = _capture(run, manifest)
            capture_s, cpu_s = time.perf_counter() - capture_began, time.process_time() - cpu_began
        place.seal(manifest)
    size = config.batch_blocks
    batch_s = [after - before for before, after in zip([capture_began, *stamps], stamps, strict=False)]
    learnt = _learnt_blocks(manifest)
    tokens = manifest.blocks.block_tokens
    return {
        "blocks": run.staged.num_blocks,
        "tokens": run.staged.num_tokens,
        "text_tokens_per_s": _rate(run.staged.num_tokens - first.num_tokens, stage_s - first_stage_s),
        "teacher_load_s": load_s,
        "warm_up_s": warm_up_s,
        # A batch of fewer blocks takes as long: it is filled up.
        "batch_tokens": size * tokens,
        "batch_s": batch_s,
        "token_s": statistics.median(batch_s) / (size * tokens),
        "forward_token_s": statistics.median(forward) / (size * tokens),
        "create_s": create_s,
        "learnt_batch_tokens": -(-learnt // size) * size * tokens,
        "commit_s": place.commit_s,
        "capture_s": capture_s,
        "cpu_share": cpu_s / (capture_s * torch.get_num_threads()),
        "threads": torch.get_num_threads(),
        "device": str(teacher.device),
        "dtype": teacher.dtype_name,
        "vocab_size": manifest.teacher.vocab_size,
        "encoding": manifest.encoding.model_dump(mode="json"),
        "block_bytes": _block_bytes(place, manifest),
        "table_bytes": _table_bytes(place, manifest),
    }


def _limited(config: CaptureConfig, num_blocks: int) -> CaptureConfig:
    return config.model_copy(update={"limit_tokens": num_blocks * config.block_tokens})


def _timed(body: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    made = body()
    return made, time.perf_counter() - began


def _timed_block(run: Run) -> tuple[float, float]:
    """Seconds of one block's forward pass, and of this warm-up: a first pass also pays for what is set up once."""
    began = time.perf_counter()
    ids_BT, lengths_B = run.staged.read(0, 1), run.staged.lengths(0, 1)
    block_s = 0.0
    for _ in range(2):
        before = time.perf_counter()
        run.teacher.states(ids_BT, lengths_B).read_BTD[0, 0, 0].item()
        block_s = time.perf_counter() - before
        if block_s > 1:
            break
    return block_s, time.perf_counter() - began


def _blocks_for(config: CaptureConfig, source: Source, seconds: float, block_s: float, least_blocks: int) -> int:
    """Whole batches that fit, one at least; prototypes are learnt from some of them, which reads these twice."""
    size = config.batch_blocks
    learnt = 0
    if isinstance(source.encoding, Prototype) and source.prototypes is None:
        learnt = -(-_learnt_tokens(source.encoding, config) // config.block_tokens)
    affordable = int(seconds / (block_s * size)) - -(-learnt // size)
    wanted = max(1, min(affordable, _MOST_BATCHES), -(-learnt // size))
    # What trains from this cache would like whole batches too, if that is not far beyond the time.
    return size * max(wanted, min(-(-least_blocks // size), 2 * max(affordable, 1)))


def _learnt_tokens(encoding: Prototype, config: CaptureConfig) -> int:
    """Few, but as many as there are prototypes."""
    batch_tokens = config.batch_blocks * config.block_tokens
    blocks = -(-encoding.prototypes // config.block_tokens)
    return min(encoding.calibration_tokens, max(batch_tokens, blocks * config.block_tokens))


def _learning_little(source: Source, num_blocks: int) -> Source:
    if not isinstance(source.encoding, Prototype) or source.prototypes is not None:
        return source
    tokens = min(_learnt_tokens(source.encoding, source.config), num_blocks * source.config.block_tokens)
    return replace(source, encoding=source.encoding.model_copy(update={"calibration_tokens": tokens}))


def _learnt_blocks(manifest: Manifest) -> int:
    tokens = getattr(manifest.encoding, "calibration_tokens", 0)
    return min(manifest.blocks.num_blocks, max(1, tokens // manifest.blocks.block_tokens)) if tokens else 0


def _capture(run: Run, manifest: Manifest) -> list[float]:
    """Capture all shards; the moment at which each batch was done."""
    stamps: list[float] = []
    encoder = encoder_of(manifest, folder.read_tables(run.source.config.out, manifest), run.teacher.device)
    shards = range(manifest.blocks.num_shards)
    made = capture_shards(
        run.place, manifest, run.staged, run.teacher, encoder, shards, lambda _: stamps.append(time.perf_counter())
    )
    for _ in made:
        pass
    return stamps


@contextmanager
def _forward_timed(teacher: Teacher) -> Iterator[list[float]]:
    """Seconds of each forward pass up to the output head, by hooks."""
    seconds: list[float] = []
    began = [0.0]

    def wait() -> None:
        if teacher.device.type == "cuda":
            torch.cuda.synchronize(teacher.device)

    def start(*_: Any) -> None:
        wait()
        began[0] = time.perf_counter()

    def end(*_: Any) -> None:
        wait()
        seconds.append(time.perf_counter() - began[0])

    model = teacher.model.base_model
    hooks = [model.register_forward_pre_hook(start), model.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _block_bytes(place: InFolder, manifest: Manifest) -> dict[str, float]:
    """Bytes of one block in each array's files, what a shard has beside its blocks left out."""
    specs, shards = array_specs(manifest), range(manifest.blocks.num_shards)
    receipts = [receipt for shard in shards if (receipt := place.receipt(manifest, shard)) is not None]
    return {
        name: float(spec.dtype.itemsize)
        if not spec.row_shape
        else sum(receipt.files[name].num_bytes - index_bytes(spec) for receipt in receipts) / manifest.blocks.num_blocks
        for name, spec in specs.items()
    }


def _table_bytes(place: InFolder, manifest: Manifest) -> dict[str, int]:
    reader = CacheReader.open(place.out)
    return {part.name: reader.table_bytes(part.name) for part in manifest.encoding.tables(manifest.geometry)}


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 1e-4 else None
