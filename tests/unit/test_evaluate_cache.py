"""Figures on a cache equal naive ones in float64 for every encoding: loss, calibration, closeness to the teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train.evaluation.scorer
from cache_spec.commit import commit_shard, create_cache, tokens_digest
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import TopK
from cache_spec.reader import CacheReader
from cache_spec.receipts import write_seal
from cache_spec.targets import HeadTargets, HiddenTargets, dense
from tests.evaluation import PADDED, V, evaluate, naive_logprobs, save_cache, save_model, save_tokenizer
from tests.synthetic import make_manifest, make_rows, shard_rows
from train.evaluation.measures import Calibration, measure_labels
from train.loss_targets import NO_LABEL

ENCODINGS = {
    "topk": TopK(k=4),
    "whole-head": TopK(k=V),
    "prototype": Prototype(k=4, prototypes=3, residual_draws=2, calibration_tokens=40),
    "hidden": Hidden(dtype="float16"),
    "hidden-int8": Hidden(dtype="int8", head_dtype="float16", bias=True),
    "sampled": Sampled(draws=12),
    "sparsified": Sparsified(k=6),
}
NOTHING: Any = (None, None, None)
KINDS = {"topk": "lower-bound", "prototype": "lower-bound", "sampled": None, "sparsified": None}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.evaluation.scorer, "CHUNK_BYTES", 4 * V * 5)


def teacher_probs(reader: CacheReader, temperature: float) -> Any:
    """What the cache says, float64 [B, T, M] over V or over a head and one bucket; the head's ids; the top token."""
    targets = reader.batch(np.arange(reader.manifest.blocks.num_blocks), temperature).targets
    if isinstance(targets, HiddenTargets):
        weight_VD, bias_V = reader.output_head()
        p_BTV = dense(targets, temperature=temperature, vocab_size=V, head=(weight_VD, bias_V))
        return p_BTV, None, p_BTV.argmax(-1)
    assert isinstance(targets, HeadTargets)
    shape_BTK = np.exp(targets.logprobs_BTK.astype(np.float64) / temperature)
    in_head_BT1 = 1 / (1 + np.exp(targets.tail_log_odds_BT.astype(np.float64)))[..., None]
    p_BTK = in_head_BT1 * shape_BTK / shape_BTK.sum(-1, keepdims=True)
    ids_BTK = targets.ids_BTK.astype(np.int64)
    return np.concatenate([p_BTK, 1 - in_head_BT1], -1), ids_BTK, ids_BTK[..., 0]


def naive_figures(model: Any, reader: CacheReader, temperature: float, kind: str | None) -> dict[str, float | None]:
    """Every figure token by token, in float64, from the reader's decoded targets."""
    batch = reader.batch(np.arange(reader.manifest.blocks.num_blocks), temperature)
    p_BTM, ids_BTK, top_BT = teacher_probs(reader, temperature) if kind else NOTHING
    found: dict[str, list[float]] = {"loss_nats": [], "kl_to_teacher": [], "agreement": [], "overlap": []}
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for block, length in enumerate(batch.lengths_B.astype(int)):
        ids = torch.from_numpy(batch.input_ids_BT[block].astype(np.int64))
        logprobs = naive_logprobs(model, ids)
        for at in range(length):
            if at + 1 < length:
                found["loss_nats"].append(-float(logprobs[at, ids[at + 1]]))
                confidence, top = logprobs[at].exp().max(dim=0)
                bins[math.ceil(float(confidence) * 15) - 1].append((float(confidence), bool(top == ids[at + 1])))
            if not kind:
                continue
            q = (logprobs[at] / temperature).softmax(dim=0).numpy()
            found["agreement"].append(float(q.argmax() == top_BT[block, at]))
            if ids_BTK is not None:
                head = ids_BTK[block, at]
                q = np.append(q[head], np.delete(q, head).sum())
            p = p_BTM[block, at]
            found["kl_to_teacher"].append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
            found["overlap"].append(np.minimum(p, q).sum())
    means = {name: sum(values) / len(values) if values else None for name, values in found.items()}
    gaps = [abs(sum(right - confidence for confidence, right in members)) for members in bins]
    return {**means, "ece": sum(gaps) / len(found["loss_nats"])}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize(("family", "rows"), [("gpt2", PADDED), ("granite", V), ("gemma2", V)])
def test_figures_on_a_cache_equal_naive_ones(
    tmp_path: Path, family: str, rows: int, name: str, temperature: float
) -> None:
    model = save_model(tmp_path / "model", family, rows=rows)
    reader = save_cache(tmp_path / "cache", encoding=ENCODINGS[name], last_length=3)
    figures = evaluate(tmp_path / "model", cache=reader.path, temperature=temperature, batch_blocks=3)["cache"]
    kind = KINDS.get(name, "exact")
    assert figures["kl_is"] == kind
    for figure, expected in naive_figures(model, reader, temperature, kind).items():
        assert figures[figure] == (None if expected is None else pytest.approx(expected, rel=5e-5)), figure
    lengths = reader.lengths(range(7)).astype(int)
    losses = reader.read("block_loss", range(7))
    assert (figures["num_tokens"], figures["num_positions"]) == (lengths.sum() - 7, lengths.sum())
    assert figures["teacher_loss"] == pytest.approx((losses * (lengths - 1)).sum() / (lengths - 1).sum(), rel=1e-6)


def test_a_short_head_bounds_the_full_divergence_below_and_the_overlap_above(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    caches = [save_cache(tmp_path / f"cache-{k}", k=k) for k in (2, 20, V)]
    few, more, every = (evaluate(tmp_path / "model", cache=cache.path)["cache"] for cache in caches)
    assert few["kl_to_teacher"] < more["kl_to_teacher"] < every["kl_to_teacher"]
    assert few["overlap"] > more["overlap"] > every["overlap"]
    assert few["loss_nats"] == every["loss_nats"]


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_a_teacher_measured_on_its_own_hidden_states_agrees_with_itself(tmp_path: Path, temperature: float) -> None:
    model = save_model(tmp_path / "model", rows=PADDED, std=0.6)
    encoding = Hidden(dtype="float16")
    manifest = make_manifest(vocab_size=V, padded_vocab_size=PADDED, encoding=encoding, block_tokens=8, hidden_size=16)
    rows = make_rows(manifest)
    with torch.no_grad():
        hidden_NTD = model.transformer(input_ids=torch.from_numpy(rows["input_ids"].astype(int))).last_hidden_state
    rows["last_hidden"] = hidden_NTD.numpy().astype(np.float16)
    tables = {"output_head": model.lm_head.weight.detach().numpy()[:V]}
    corpus = manifest.corpus.model_copy(update={"tokens_sha256": tokens_digest(rows["input_ids"])})
    manifest = create_cache(tmp_path / "cache", manifest.model_copy(update={"corpus": corpus}), tables)
    for shard in range(manifest.blocks.num_shards):
        commit_shard(tmp_path / "cache", manifest, shard, shard_rows(manifest, rows, shard))
    write_seal(tmp_path / "cache", manifest)
    save_tokenizer(tmp_path / "cache" / "tokenizer")
    figures = evaluate(tmp_path / "model", cache=tmp_path / "cache", temperature=temperature)["cache"]
    assert 0 <= figures["kl_to_teacher"] < 1e-5
    assert figures["agreement"] == 1.0
    assert figures["overlap"] == pytest.approx(1.0, abs=1e-3)


def test_calibration_error_is_zero_for_honest_and_large_for_boasting_confidence() -> None:
    """Of two tokens the first has probability 0.75; where it comes three times in four, nothing is wrong."""
    logits_CV = torch.tensor([[math.log(3.0), 0.0]]).expand(8, 2)
    for labels, expected in (([0, 0, 0, 1] * 2, 0.0), ([1] * 8, 0.75), ([0] * 8, 0.25)):
        calibration = Calibration()
        for half in torch.tensor(labels).split(4):
            calibration.add(measure_labels(logits_CV[:4], half))
        calibration.add(measure_labels(logits_CV[:4], torch.full((4,), NO_LABEL)))
        assert calibration.error == pytest.approx(expected, abs=1e-6)


def test_calibration_counts_a_certain_prediction_in_the_last_bin() -> None:
    calibration = Calibration()
    calibration.add(measure_labels(torch.tensor([[1e4, 0.0], [1e4, 0.0]]), torch.tensor([0, 1])))
    assert calibration.error == pytest.approx(0.5)
