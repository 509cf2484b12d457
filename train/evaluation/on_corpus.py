"""How good a model is on a corpus: a loaded model and its windows come in, figures with their intervals go out.

Sums over tokens are in float64. Windows of about one length share a forward pass, padded on the right.

Legend: B batch, T time, N rows (B x T), M rows that are scored, W windows, U units, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from train.distil_batch import from_numpy
from train.evaluation.bootstrap import Bootstrap, Figures, Sums
from train.evaluation.measures import LabelMeasures, joined, loss_figures, measure_labels
from train.evaluation.scorer import Scorer
from train.evaluation.windows import Window, WindowPlan

_NATS, _TOKENS, _WORDS, _BYTES, _EXAMPLES, _RIGHT = range(6)


class CorpusMeasured(NamedTuple):
    """Figures of one model on one corpus."""

    figures: dict[str, Any]
    """Plain JSON values."""
    replicates: Figures
    """Figures of each resample, [R]."""
    scored_digest: str
    """That of the windows: two models with equal ones were measured on the same tokens."""


def corpus_figures(
    scorer: Scorer, plan: WindowPlan, bootstrap: Bootstrap, batch_tokens: int, seen: Callable[[int], object]
) -> CorpusMeasured:
    """Measure a model on a corpus; ``batch_tokens`` are read in one forward pass.

    ``loss_nats`` is the mean over scored tokens, for a last word over examples; ``perplexity`` is exp of it.
    ``word_perplexity`` is exp of all nats by the corpus's words, ``bits_per_byte`` all bits by its bytes, ``accuracy``
    the share of examples of which every scored token was the first choice; each is None where the corpus does not mean
    it. ``intervals`` has those of the figures that are not None. Raises KdpipeError ``non-finite-loss``.
    """
    corpus = plan.corpus
    nats_W, right_W = score_windows(scorer, plan.windows, batch_tokens, seen)
    windows = plan.windows
    columns = [nats_W, [w.num_scored for w in windows], [w.words for w in windows], [w.num_bytes for w in windows]]
    sums_WS = np.stack([*map(np.asarray, columns), np.ones(len(windows)), right_W], axis=1).astype(np.float64)
    units_W = np.unique([window.unit for window in windows], return_inverse=True)[1]
    sums_US = np.zeros((units_W.max() + 1, sums_WS.shape[1]))
    np.add.at(sums_US, units_W, sums_WS)
    total_S = sums_US.sum(axis=0)
    # One name for the loss: what it is a mean over differs, and the protocol says it.
    per = _EXAMPLES if corpus.is_last_word else _TOKENS

    def figures(sums: Sums) -> dict[str, NDArray[np.float64]]:
        nats = sums[..., _NATS]
        found = {"loss_nats": nats / sums[..., per], "perplexity": np.exp(nats / sums[..., per])}
        if corpus.counts_words:
            found["word_perplexity"] = np.exp(nats / sums[..., _WORDS])
        if not corpus.is_last_word:
            found["bits_per_byte"] = nats / math.log(2) / sums[..., _BYTES]
        if corpus.is_last_word:
            found["accuracy"] = sums[..., _RIGHT] / sums[..., _EXAMPLES]
        return found

    loss_figures(scorer.name, float(total_S[_NATS]), int(total_S[per]))
    with np.errstate(over="ignore"):
        point = {name: float(value) for name, value in figures(total_S).items()}
    replicates = bootstrap.replicates(sums_US, figures)
    meant = dict.fromkeys(("loss_nats", "perplexity", "word_perplexity", "bits_per_byte", "accuracy"))
    result = {
        "corpus": corpus.name,
        "source": corpus.source,
        "protocol": plan.protocol,
        "mode": plan.mode,
        "window_tokens": plan.window,
        "stride": plan.stride,
        "num_tokens": int(total_S[_TOKENS]),
        "num_words": round(float(total_S[_WORDS])) if corpus.counts_words else None,
        "num_bytes": None if corpus.is_last_word else round(float(total_S[_BYTES])),
        "num_examples": len(windows) if corpus.examples else None,
        "num_units": len(sums_US),
        **meant,
        **{name: value if math.isfinite(value) else None for name, value in point.items()},
        "intervals": bootstrap.intervals(replicates),
        "interval_unit": plan.unit,
        "sampled": plan.is_sampled,
        "difference": None,
    }
    return CorpusMeasured(result, replicates, plan.scored_digest)


def add_differences(measured: list[CorpusMeasured], name: str, bootstrap: Bootstrap) -> None:
    """Add ``difference`` to the first model, ``name``, to each other one's figures on a corpus.

    ``to`` is that name; ``loss_nats`` (and ``accuracy``) how much more the model has; ``intervals`` are those of pairs.
    It stays None for a model of other tokens, whose losses do not compare.
    """
    first, *others = measured
    for other in others:
        if other.scored_digest != first.scored_digest:
            continue
        names = [key for key in ("loss_nats", "accuracy") if first.figures[key] is not None]
        replicates = {key: other.replicates[key] - first.replicates[key] for key in names if key in first.replicates}
        other.figures["difference"] = {
            "to": name,
            **{key: other.figures[key] - first.figures[key] for key in names},
            "intervals": bootstrap.intervals(replicates),
        }


@torch.inference_mode()
def score_windows(
    scorer: Scorer, windows: tuple[Window, ...], batch_tokens: int, seen: Callable[[int], object]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Nats of all scored tokens of each window, and whether each of them was the first choice."""
    nats_W, right_W = np.zeros(len(windows)), np.zeros(len(windows), dtype=np.bool_)
    for numbers in _batches(windows, batch_tokens):
        batch = [windows[number] for number in numbers]
        longest = max(len(window.ids) for window in batch) - 1
        read_BT = np.zeros((len(batch), longest), dtype=np.int64)
        target_BT = np.zeros_like(read_BT)
        is_scored_BT = np.zeros(read_BT.shape, dtype=np.bool_)
        for row, window in enumerate(batch):
            num_read = len(window.ids) - 1
            read_BT[row, :num_read], target_BT[row, :num_read] = window.ids[:-1], window.ids[1:]
            is_scored_BT[row, num_read - window.num_scored : num_read] = True
        rows_M = np.flatnonzero(is_scored_BT)
        measures = _measured(scorer, read_BT, [len(window.ids) - 1 for window in batch], rows_M, target_BT)
        window_M = rows_M // longest
        loss_M, is_right_M = (x.cpu().double().numpy() for x in (measures.loss_C, measures.is_right_C))
        nats_W[numbers] = np.bincount(window_M, loss_M, minlength=len(batch))
        right_W[numbers] = np.bincount(window_M, 1 - is_right_M, minlength=len(batch)) == 0
        seen(sum(window.num_scored for window in batch))
    return nats_W, right_W


def _measured(
    scorer: Scorer, read_BT: NDArray[np.int64], lengths: list[int], rows_M: NDArray[np.int64], target_BT: Any
) -> LabelMeasures:
    rows, labels = (from_numpy(x).to(scorer.device) for x in (rows_M, target_BT.reshape(-1)[rows_M]))
    chunks = scorer.logits(from_numpy(read_BT).to(scorer.device), torch.tensor(lengths, device=scorer.device), rows)
    return joined(measure_labels(logits_CV, labels[of_M]) for of_M, logits_CV in chunks)


def _batches(windows: tuple[Window, ...], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of windows of similar lengths, the longest first: memory is short at the beginning or not at all."""
    batch: list[int] = []
    for number in sorted(range(len(windows)), key=lambda number: -len(windows[number].ids)):
        if batch and (len(batch) + 1) * (len(windows[batch[0]].ids) - 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
