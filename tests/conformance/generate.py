"""The golden caches of format version 1, rebuilt from a seed.

In: nothing. Out: a folder with one small finished cache per case. Run ``python -m tests.conformance.generate FOLDER``
to write them; a released version's caches are never written again, they must open for ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cache_spec.manifest import Manifest
from cache_spec.shardfile import Array
from tests.synthetic import make_arrays, make_manifest, make_rows, write_cache

VALID = Path(__file__).parent / "valid"
# Functions like exp differ in their last bits between processors; on this grid they agree.
_FLOAT_GRID = 2.0**20
_KEPT_LENGTH = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One golden cache: what it shows, and how to make its manifest and rows."""

    claim: str
    sizes: dict[str, int | None] = field(default_factory=dict)
    """Arguments of ``make_manifest``."""
    adapt: Callable[[Manifest, dict[str, Array]], Manifest] = lambda manifest, rows: manifest
    """Changes rows in place and returns the manifest that describes them."""


def _keep_last_block(manifest: Manifest, rows: dict[str, Array]) -> Manifest:
    """Make the last block a partial one: three real tokens, padding, means over the real positions only."""
    blocks, teacher, length = manifest.blocks, manifest.teacher, _KEPT_LENGTH
    real = make_arrays(
        num_blocks=1,
        block_tokens=length,
        vocab_size=teacher.vocab_size,
        k=manifest.encoding.k,
        temperatures=manifest.temperatures,
        seed=7,
    )
    for name in ("input_ids", "head_ids"):
        rows[name][-1, :length] = real[name][0]
    for name in ("head_gaps", "log_normaliser", "log_tail_mass"):
        rows[name][-1, ..., :length] = real[name][0]
    for name in ("block_loss", "block_entropy"):
        rows[name][-1] = real[name][0]
    rows["input_ids"][-1, length:] = manifest.tokenizer.eos_token_id
    rows["block_lengths"][-1] = length
    assert manifest.hidden is not None
    rows["hidden"][-1, -(-length // manifest.hidden.window) :] = 0
    num_tokens = (blocks.num_blocks - 1) * blocks.block_tokens + length
    return manifest.model_copy(
        update={
            "blocks": blocks.model_copy(update={"last_block": "keep"}),
            "corpus": manifest.corpus.model_copy(update={"num_tokens": num_tokens}),
        }
    )


CASES = {
    "plain": Case(
        claim="two full shards, hidden states, two temperatures",
        sizes={"num_blocks": 4, "shard_blocks": 2},
    ),
    "no-hidden": Case(
        claim="the array hidden is optional",
        sizes={"num_blocks": 2, "shard_blocks": 2, "window": None},
    ),
    "partial-last-shard": Case(
        claim="the last shard may hold fewer blocks than the others",
        sizes={"num_blocks": 5, "shard_blocks": 3},
    ),
    "whole-vocabulary": Case(
        claim="with K = V nothing is outside the head: every log tail mass is minus infinity",
        sizes={"num_blocks": 2, "shard_blocks": 2, "vocab_size": 6, "k": 6, "window": None},
    ),
    "kept-last-block": Case(
        claim="a kept last block is padded, and its windows without real tokens are zero",
        sizes={"num_blocks": 3, "shard_blocks": 2},
        adapt=_keep_last_block,
    ),
    "wide-ids": Case(
        claim="above 65536 tokens in the vocabulary ids are uint32",
        sizes={"num_blocks": 2, "shard_blocks": 2, "block_tokens": 4, "vocab_size": 70_000, "window": None},
    ),
}


def write_case(name: str, path: Path) -> None:
    """Write one golden cache."""
    case = CASES[name]
    manifest = make_manifest(**case.sizes).model_copy(update={"provenance": provenance()})  # type: ignore[arg-type]
    rows = make_rows(manifest, seed=1)
    for array in ("log_normaliser", "block_loss", "block_entropy"):
        rows[array] = (np.rint(rows[array].astype(np.float64) * _FLOAT_GRID) / _FLOAT_GRID + 0.0).astype(np.float32)
    write_cache(path, case.adapt(manifest, rows), rows)
    for hidden in path.glob(".*"):
        hidden.unlink()


def provenance() -> dict[str, str]:
    """What decides the bytes of metadata and compressed chunks, beside the format."""
    return {name: version(name) for name in ("numcodecs", "numpy", "zarr")}


if __name__ == "__main__":
    for case_name in CASES:
        write_case(case_name, Path(sys.argv[1]) / case_name)
