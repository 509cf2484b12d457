"""A text as a cache that no teacher has seen: what a run needs that learns from the text alone.

In: capture settings. Out: a finished cache of the blocks that a capture with these settings would have, in its order.
Its targets are one draw for each position, the text's own next token, and what a teacher would say of blocks is zero.

Legend of axes: B blocks, T tokens; one temperature and one draw stand between them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cache_spec.commit import commit_shard
from pipeline import folder
from pipeline.blocks import StagedBlocks
from pipeline.capture import description, stage
from pipeline.config import CaptureConfig
from pipeline.source import resolve_source, staged_manifest

ENCODING: dict[str, Any] = {"encoding": "sampled", "draws": 1, "temperatures": (1.0,), "hidden_window": 0}
"""What ``CaptureConfig`` has to say for such a cache."""


def make_text_cache(config: CaptureConfig) -> int:
    """Make the cache, of which nothing may be there yet; returns its number of tokens."""
    source = resolve_source(config)
    with folder.exclusive(config.out):
        staged = stage(source, quiet=True)
        manifest = staged_manifest(source, staged, source.encoding)
        manifest = folder.create(config.out, manifest, description(source), {})
        for shard in range(manifest.blocks.num_shards):
            commit_shard(config.out, manifest, shard, _arrays(staged, *manifest.blocks.shard_range(shard)))
        folder.seal(config.out, manifest)
    return manifest.corpus.num_tokens


def _arrays(staged: StagedBlocks, first: int, count: int) -> dict[str, np.ndarray[Any, Any]]:
    ids_BT = staged.read(first, count)
    next_BT = np.pad(ids_BT[:, 1:], ((0, 0), (0, 1)))
    return {
        "input_ids": ids_BT,
        "block_lengths": staged.lengths(first, count),
        "draw_ids": next_BT[:, None, None, :],
        "draw_counts": np.ones_like(next_BT, np.uint8)[:, None, None, :],
        "block_loss": np.zeros(count, np.float32),
        "block_entropy": np.zeros(count, np.float32),
    }
