"""The golden caches of format version 2, rebuilt from a seed.

In: nothing. Out: a folder with one small finished cache per case. Run ``python -m tests.conformance.generate FOLDER``
to write them; a released version's caches are never written again, they must open for ever.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import TopK
from cache_spec.imported import ImportedInfo
from cache_spec.manifest import Manifest
from cache_spec.masking import MaskingInfo
from tests.synthetic import make_manifest, make_rows, write_cache

VALID = Path(__file__).parent / "valid"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One golden cache: what it shows, and the arguments of ``make_manifest``."""

    claim: str
    encoding: Encoding
    sizes: dict[str, Any] = field(default_factory=dict)


_KEPT_TOKENS = 3
_MISSING_TOKENS = 11
_SEED = 1
# Defaults may change; golden caches do not.
_STEPS: Any = {"levels": 128, "odds_step_nats": 1 / 64}
_SMALL = {"num_blocks": 2, "shard_blocks": 2, "window": None}
_TWO_SHARDS = {"num_blocks": 4, "shard_blocks": 2}
_MASKING: Any = {
    "mask_share": 0.5,
    "keep_share": 0.25,
    "random_share": 0.25,
    "smoothing": 0.5,
    "seed": 5,
    "mask_token_id": 1,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "special_ids": (0, 1, 2, 3),
}
CASES = {
    "plain": Case(
        claim="topk: two full shards, pooled hidden states, two temperatures",
        encoding=TopK(k=5, **_STEPS),
        sizes=_TWO_SHARDS,
    ),
    "no-hidden": Case(
        claim="the array hidden is optional",
        encoding=TopK(k=5, **_STEPS),
        sizes=_SMALL,
    ),
    "pooled-int8": Case(
        claim="pooled hidden states in 8 bits, with a scale for each dimension of a block; three temperatures",
        encoding=TopK(k=5, levels=4096, odds_step_nats=1 / 32),
        sizes=_SMALL | {"window": 2, "hidden_dtype": "int8", "temperatures": (0.5, 1.0, 2.0)},
    ),
    "partial-last-shard": Case(
        claim="the last shard may hold fewer blocks than the others",
        encoding=TopK(k=5, **_STEPS),
        sizes={"num_blocks": 5, "shard_blocks": 3},
    ),
    "kept-last-block": Case(
        claim="a kept last block is padded, and its windows without real tokens are zero",
        encoding=TopK(k=5, **_STEPS),
        sizes={"num_blocks": 3, "shard_blocks": 2},
    ),
    "a-document-a-block": Case(
        claim="each document begins a block, and each one's last block is padded",
        encoding=TopK(k=5, **_STEPS),
        sizes={"num_blocks": 4, "shard_blocks": 3},
    ),
    "whole-vocabulary": Case(
        claim="with K = V nothing is outside the head",
        encoding=TopK(k=6, **_STEPS),
        sizes=_SMALL | {"vocab_size": 6},
    ),
    "wide-ids": Case(
        claim="above 65536 tokens in the vocabulary ids are uint32",
        encoding=TopK(k=5, **_STEPS),
        sizes=_SMALL | {"vocab_size": 70_000, "block_tokens": 4},
    ),
    "prototype": Case(
        claim="prototype: a head and one of three shared tail distributions",
        encoding=Prototype(k=5, prototypes=3, calibration_tokens=1000, **_STEPS),
        sizes=_TWO_SHARDS,
    ),
    "prototype-residual": Case(
        claim="prototype: more than 256 of them, and four draws from what they leave over",
        encoding=Prototype(k=3, prototypes=270, residual_draws=4, seed=5, calibration_tokens=1000, **_STEPS),
        sizes=_SMALL | {"vocab_size": 8, "hidden_size": 2},
    ),
    "sampled": Case(
        claim="sampled: 20 draws, counts in 8 bits",
        encoding=Sampled(draws=20, seed=5),
        sizes=_TWO_SHARDS | {"window": None},
    ),
    "sampled-many": Case(
        claim="sampled: more draws than 8 bits count, from fewer tokens",
        encoding=Sampled(draws=300, seed=5),
        sizes=_SMALL | {"vocab_size": 12},
    ),
    "sparsified": Case(
        claim="sparsified: seven tokens each, some exact and some sampled",
        encoding=Sparsified(k=7, levels=4096, seed=5),
        sizes=_TWO_SHARDS | {"window": None},
    ),
    "hidden": Case(
        claim="hidden: float16 states and a float16 output head",
        encoding=Hidden(dtype="float16", head_dtype="float16"),
        sizes=_TWO_SHARDS,
    ),
    "hidden-int8": Case(
        claim="hidden: int8 states with a scale for each, a float32 output head and its bias",
        encoding=Hidden(dtype="int8", head_dtype="float32", bias=True),
        sizes=_SMALL,
    ),
    "imported": Case(
        claim="log-probabilities of the whole vocabulary from elsewhere, in finer levels; no teacher ran for them",
        encoding=TopK(k=5, levels=4096, odds_step_nats=1 / 64),
        sizes=_TWO_SHARDS
        | {
            "window": None,
            "temperatures": (1.0,),
            "imported": ImportedInfo(logprobs="full", mass_error=0.001),
        },
    ),
    "imported-renormalised": Case(
        claim="log-probabilities from elsewhere that sum to one over the kept tokens: the tail is not known",
        encoding=TopK(k=5, **_STEPS),
        sizes=_SMALL
        | {
            "temperatures": (1.0,),
            "imported": ImportedInfo(logprobs="renormalised", mass_error=0.0),
        },
    ),
    "masked": Case(
        claim="of a masked language model: targets of selected tokens alone, each document begins a block",
        encoding=TopK(k=5, **_STEPS),
        sizes={
            "num_blocks": 4,
            "shard_blocks": 3,
            "masking": MaskingInfo(probability=0.4, positions="masked", **_MASKING),
        },
    ),
    "masked-all": Case(
        claim="of a masked language model: targets of all real tokens; every selected one is exchanged at random",
        encoding=Hidden(dtype="int8", head_dtype="float32", bias=True),
        sizes=_SMALL
        | {
            "masking": MaskingInfo(
                probability=1.0,
                positions="all",
                **_MASKING | {"mask_share": 0.0, "keep_share": 0.0, "random_share": 1.0},
            )
        },
    ),
}


def write_case(name: str, path: Path) -> None:
    """Write one golden cache."""
    case = CASES[name]
    manifest = make_manifest(encoding=case.encoding, **case.sizes).model_copy(update={"provenance": provenance()})
    if name == "kept-last-block":
        manifest = _partial(manifest, "keep", manifest.blocks.block_tokens - _KEPT_TOKENS)
    if name in ("a-document-a-block", "masked"):
        manifest = _partial(manifest, "each", _MISSING_TOKENS)
    write_cache(path, manifest, make_rows(manifest, _SEED), seed=_SEED)
    for hidden in path.glob(".*"):
        hidden.unlink()


def _partial(manifest: Manifest, last_block: str, num_missing: int) -> Manifest:
    """The same with fewer real tokens: in the last block, or in each."""
    num_tokens = manifest.corpus.num_tokens - num_missing
    return manifest.model_copy(
        update={
            "blocks": manifest.blocks.model_copy(update={"last_block": last_block}),
            "corpus": manifest.corpus.model_copy(update={"num_tokens": num_tokens}),
        }
    )


def provenance() -> dict[str, str]:
    """What decides the bytes of metadata and compressed chunks, beside the format."""
    return {name: version(name) for name in ("numcodecs", "numpy", "zarr")}


if __name__ == "__main__":
    for case_name in CASES:
        write_case(case_name, Path(sys.argv[1]) / case_name)
