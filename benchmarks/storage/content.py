"""What every engine of the storage benchmark writes and reads: targets of a real cache, or made-up ones like them.

In: a finished cache with a head encoding, or sizes and a seed. Out: a folder of ``.npy`` files, mapped and not read at
once, so that memory measured beside them is the engine's. Needs numpy alone, for engines in environments of their own.

Legend of axes: N blocks, T tokens, K kept, M temperatures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

VOCAB_SIZE = 49_152
MODEL_ARRAYS = ("input_ids", "head_ids", "logprobs", "tail_log_odds")
"""What a rival keeps: ids uint16 [N, T] and [N, T, K], log-probabilities float16 [N, T, K], odds float16 [N, M, T]."""
CODE_ARRAYS = ("head_gaps", "odds_codes")
"""The same values as kdpipe codes them: uint8 [N, K, T] and int16 [N, M, T]; equal to the float16 ones once decoded."""
_META_NAME = "meta.json"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shape of a set."""

    num_blocks: int
    block_tokens: int
    k: int
    shard_blocks: int
    levels: int
    temperatures: tuple[float, ...]

    @property
    def num_shards(self) -> int:
        return -(-self.num_blocks // self.shard_blocks)

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_tokens

    @property
    def raw_bytes_per_token(self) -> int:
        """Of the model's arrays, uncompressed."""
        return 2 + 4 * self.k + 2 * len(self.temperatures)


class Source:
    """One set on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / _META_NAME).read_text())
        self.sizes = Sizes(**{**meta, "temperatures": tuple(meta["temperatures"])})

    def rows(self, name: str, first: int, count: int) -> Array:
        """A copy of some blocks of one array."""
        return np.array(np.load(self.folder / f"{name}.npy", mmap_mode="r")[first : first + count])

    def shards(self) -> Iterator[tuple[int, int, int]]:
        """Number, first block and number of blocks of each shard."""
        for shard in range(self.sizes.num_shards):
            first = shard * self.sizes.shard_blocks
            yield shard, first, min(self.sizes.shard_blocks, self.sizes.num_blocks - first)


def create(folder: Path, sizes: Sizes, parts: Iterator[dict[str, Array]]) -> Source:
    """Write a set; ``parts`` yields the arrays of consecutive stretches of blocks."""
    folder.mkdir(parents=True)
    n, t, k, m = sizes.num_blocks, sizes.block_tokens, sizes.k, len(sizes.temperatures)
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "input_ids": ((n, t), np.uint16),
        "head_ids": ((n, t, k), np.uint16),
        "logprobs": ((n, t, k), np.float16),
        "tail_log_odds": ((n, m, t), np.float16),
        "head_gaps": ((n, k, t), np.uint8),
        "odds_codes": ((n, m, t), np.int16),
    }
    files = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    }
    at = 0
    for part in parts:
        for name, rows in part.items():
            files[name][at : at + len(rows)] = rows
        at += len(part["input_ids"])
    assert at == n, (at, n)
    for file in files.values():
        file.flush()
    (folder / _META_NAME).write_text(json.dumps(asdict(sizes)))
    return Source(folder)


def copy_cache(cache: Path, folder: Path, shard_blocks: int | None = None) -> Source:
    """The set of a finished cache whose encoding keeps a head with 8-bit codes, such as the default one."""
    from cache_spec.encodings.topk import Head, encode_odds
    from cache_spec.reader import CacheReader
    from cache_spec.targets import HeadTargets

    reader = CacheReader.open(cache)
    manifest, blocks = reader.manifest, reader.manifest.blocks
    encoding = manifest.encoding
    if not isinstance(encoding, Head) or reader.specs["head_gaps"].dtype != np.uint8:
        raise SystemExit(f"{cache}: encoding {encoding.name} keeps no head with 8-bit codes")
    if manifest.geometry.vocab_size > 1 << 16:
        raise SystemExit(f"{cache}: a vocabulary of {manifest.geometry.vocab_size} needs wider ids than are compared")
    sizes = Sizes(
        num_blocks=blocks.num_blocks,
        block_tokens=blocks.block_tokens,
        k=encoding.k,
        shard_blocks=shard_blocks or blocks.shard_blocks,
        levels=encoding.levels,
        temperatures=manifest.temperatures,
    )

    def parts() -> Iterator[dict[str, Array]]:
        for first in range(0, sizes.num_blocks, 8):
            which = range(first, min(first + 8, sizes.num_blocks))
            batches = [reader.batch(which, t, with_hidden=False) for t in sizes.temperatures]
            targets = [batch.targets for batch in batches]
            heads = [head for head in targets if isinstance(head, HeadTargets)]
            odds_BMT = np.stack([head.tail_log_odds_BT for head in heads], axis=1)
            yield _part(
                batches[0].input_ids_BT,
                heads[0].ids_BTK,
                reader.read("head_gaps", which),
                encode_odds(odds_BMT, 1 / 64),
                sizes.levels,
            )

    return create(folder, sizes, parts())


def make_up(folder: Path, sizes: Sizes, seed: int = 0) -> Source:
    """A made-up set with the statistics of SmolLM2-135M on encyclopaedic text, so that it compresses about alike.

    Ids follow a Zipf law whose ranks are only roughly in the order of ids, and a token's head shares some ids with the
    one before; gaps between log-probabilities are exponential with about the means by rank that were measured there.
    """
    from cache_spec.encodings.topk import encode_gaps

    rng = np.random.default_rng(seed)
    ranks = np.arange(1, VOCAB_SIZE + 1)
    weights = 1.0 / (ranks + 6.0) ** 1.08
    order = np.argsort(np.log(ranks + 200.0) + rng.normal(scale=0.7, size=VOCAB_SIZE)).astype(np.uint16)
    # A draw is one look-up: each id has as many places as its share.
    places = order[np.searchsorted(np.cumsum(weights / weights.sum()), (np.arange(1 << 20) + 0.5) / (1 << 20))]
    rank_K = np.arange(sizes.k)
    means_K = np.where(rank_K == 0, 1.1, 1.75 / np.maximum(rank_K, 1) ** 1.05)

    def draw(shape: tuple[int, ...]) -> Array:
        drawn: Array = places[rng.integers(0, len(places), shape, dtype=np.uint32)]
        return drawn

    def parts() -> Iterator[dict[str, Array]]:
        for first in range(0, sizes.num_blocks, 16):
            count = min(16, sizes.num_blocks - first)
            shape_BTK = (count, sizes.block_tokens, sizes.k)
            ids_BTK = draw(shape_BTK)
            flat_NK = ids_BTK.reshape(-1, sizes.k)
            shared = rng.random((len(flat_NK) - 1, sizes.k)) < 0.2
            flat_NK[1:][shared] = flat_NK[:-1][shared]
            rows = np.arange(len(flat_NK))
            while len(rows):  # ids of a head are distinct: draw those again that are not
                ordered = np.sort(flat_NK[rows], axis=-1)
                rows = rows[(ordered[:, 1:] == ordered[:, :-1]).any(-1)]
                again = rng.random((len(rows), sizes.k)) < 0.5
                flat_NK[rows] = np.where(again, draw(again.shape), flat_NK[rows])
            logprobs_BTK = -np.cumsum(rng.standard_exponential(shape_BTK, np.float32) * means_K, axis=-1)
            # No head may weigh more than one; what is left is the tail's.
            mass_BT1 = np.exp(logprobs_BTK).sum(-1, keepdims=True)
            tail_BT1 = 1 / (1 + np.exp(-rng.normal(-2.5, 2.3, (*shape_BTK[:2], 1))))
            logprobs_BTK += np.log((1 - tail_BT1) / mass_BT1)
            odds_BT = np.log(tail_BT1 / (1 - tail_BT1))[..., 0]
            warmer = [
                odds_BT * 0.4 + 5 * (1 - 1 / t) + rng.normal(0, 0.3, odds_BT.shape) for t in sizes.temperatures[1:]
            ]
            odds_BMT = np.clip(np.stack([odds_BT, *warmer], axis=1), -31, 31)
            yield _part(
                draw(shape_BTK[:2]),
                ids_BTK,
                encode_gaps(logprobs_BTK, sizes.levels),
                np.rint(odds_BMT * 64).astype(np.int16),
                sizes.levels,
            )

    return create(folder, sizes, parts())


def _part(ids_BT: Array, head_ids_BTK: Array, gaps_BKT: Array, codes_BMT: Array, levels: int) -> dict[str, Array]:
    """All arrays of some blocks; the float16 ones are what the codes mean, rounded once."""
    from cache_spec.encodings.topk import LEAST_LEVEL, decode_gaps, decode_odds

    return {
        "input_ids": ids_BT,
        "head_ids": head_ids_BTK,
        "logprobs": decode_gaps(gaps_BKT, levels, least=LEAST_LEVEL).astype(np.float16),
        "tail_log_odds": decode_odds(codes_BMT, 1 / 64).astype(np.float16),
        "head_gaps": gaps_BKT,
        "odds_codes": codes_BMT,
    }
