"""One shard of a cache as plain arrays: decoded, in types that every library of tensors has.

In: a reader and a shard's blocks. Out: arrays by name, and what they mean in a line each. Nothing is lost but what
``float16`` rounds, where it is asked for.

Legend of axes: N blocks, T tokens, K kept, M temperatures, R draws, J points, W windows, D teacher width, C prototypes,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache_spec.masking import REPLACEMENTS, SELECTED
from cache_spec.reader import CacheReader
from cache_spec.targets import Array, HeadTargets, HiddenTargets, PointTargets

MEANING = {
    "input_ids": "[N, T] token ids; positions from a block's length on are padding",
    "block_lengths": "[N] real tokens of each block",
    "head_ids": "[N, T, K] the K most probable next tokens after position t, most probable first",
    "head_logprobs": "[N, T, K] their log-probabilities at temperature 1; at temperature x the probabilities are"
    " (1 - exp(log_tail_mass)) * softmax(head_logprobs / x)",
    "log_tail_mass": "[N, M, T] log of the probability of all other tokens, at each of the temperatures",
    "tail_prototype": "[N, T] row of prototypes that other tokens follow: p(v) = exp(log_tail_mass) * u(v) / sum of u"
    " over all tokens outside the head",
    "residual_ids": "[N, M, T, R] tokens whose residual_weights are added to that",
    "residual_weights": "[N, M, T, R] signed probabilities",
    "point_ids": "[N, M, T, J] drawn tokens; where point_probs is 0 there is none",
    "point_probs": "[N, M, T, J] their probabilities, which sum to one",
    "last_hidden": "[N, T, D] last hidden state: logits are output_head @ last_hidden + output_bias",
    "hidden": "[N, W, D] mean of last hidden states over each window's real tokens",
    "block_loss": "[N] the teacher's mean loss, nats",
    "block_entropy": "[N] the teacher's mean entropy, nats",
    "selected": "[N, T] 1 at tokens that were to be found out",
    "replacement_ids": "[N, T] what the teacher read there",
    "kept": "[N, T] 1 where there are targets, which describe the token at that position",
    "prototypes": "[M, C, V] shared tail distributions, rows sum to one",
    "output_head": "[V, D] weight of the teacher's output head",
    "output_bias": "[V] its bias",
}


def shard_arrays(reader: CacheReader, blocks: Sequence[int] | Array, dtype: str) -> dict[str, Array]:
    """Every array of some blocks, by name; ids are int32, ``dtype`` is that of log-probabilities."""
    manifest = reader.manifest
    encoding = manifest.encoding
    single = encoding.any_temperature
    grid = manifest.temperatures[:1] if single else manifest.temperatures
    batches = [reader.batch(blocks, temperature, with_hidden=not at) for at, temperature in enumerate(grid)]
    first = batches[0]
    arrays = {"input_ids": first.input_ids_BT.astype(np.int32), "block_lengths": first.lengths_B.astype(np.int32)}
    if isinstance(first.targets, HiddenTargets):
        arrays["last_hidden"] = first.targets.hidden_BTD
    elif isinstance(first.targets, PointTargets):
        points = [batch.targets for batch in batches if isinstance(batch.targets, PointTargets)]
        arrays["point_ids"] = np.stack([p.ids_BTJ for p in points], 1).astype(np.int32)
        arrays["point_probs"] = np.stack([p.probs_BTJ for p in points], 1).astype(np.float32)
    else:
        arrays |= _heads([batch.targets for batch in batches if isinstance(batch.targets, HeadTargets)], dtype)
    if first.hidden_BWD is not None:
        arrays["hidden"] = first.hidden_BWD
    if first.masked is not None:
        arrays["kept"] = first.masked.kept_BT.astype(np.uint8)
        arrays[SELECTED] = reader.read(SELECTED, blocks)
        arrays[REPLACEMENTS] = reader.read(REPLACEMENTS, blocks).astype(np.int32)
    arrays |= {name: reader.read(name, blocks) for name in ("block_loss", "block_entropy") if name in reader.specs}
    return {name: np.ascontiguousarray(values) for name, values in arrays.items()}


def table_arrays(reader: CacheReader) -> dict[str, Array]:
    """What a cache keeps once, as plain arrays."""
    manifest = reader.manifest
    if "prototypes" in manifest.tables:
        return {"prototypes": np.stack([reader.prototypes(t) for t in manifest.temperatures])}
    return {name: reader.table(name) for name in manifest.tables}


def bytes_of_block(reader: CacheReader) -> int:
    """A bound of what a block's decoded arrays take, to size batches by."""
    manifest = reader.manifest
    per_token = sum(np.prod(part.row_shape) for part in manifest.encoding.arrays(manifest.geometry))
    return int(8 * per_token + 16 * manifest.blocks.block_tokens + 4 * manifest.num_windows * manifest.teacher.width)


def _heads(targets: list[HeadTargets], dtype: str) -> dict[str, Array]:
    first = targets[0]
    arrays = {
        "head_ids": first.ids_BTK.astype(np.int32),
        "head_logprobs": first.logprobs_BTK.astype(dtype),
        "log_tail_mass": np.stack(
            [-np.logaddexp(0, -t.tail_log_odds_BT.astype(np.float64)) for t in targets], 1
        ).astype(dtype),
    }
    if first.prototype_BT is not None:
        arrays["tail_prototype"] = first.prototype_BT.astype(np.int32)
    residual = [(t.residual_ids_BTS, t.residual_weights_BTS) for t in targets]
    ids = [ids for ids, _ in residual if ids is not None]
    weights = [weights for _, weights in residual if weights is not None]
    if ids:
        arrays["residual_ids"] = np.stack(ids, 1).astype(np.int32)
        arrays["residual_weights"] = np.stack(weights, 1).astype(np.float32)
    return arrays
