"""How good a model is on a text: a loaded model and the text in its tokens come in, figures go out.

Blocks do not overlap and are predicted one by one, each without the text before it; the first token of a block is not
predicted. Sums over tokens are in float64.

Legend: B batch, T time, N rows (B x T).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from train.distil_batch import from_numpy
from train.distiller import shift_labels
from train.evaluation.measures import Calibration, joined, loss_figures, measure_labels
from train.evaluation.scorer import Scorer
from train.evaluation.text import TokenisedText


@torch.inference_mode()
def text_figures(
    scorer: Scorer, text: TokenisedText, batch_blocks: int, seen: Callable[[int], object]
) -> dict[str, Any]:
    """Measure a model on a text, as ``evaluate_models`` tells."""
    sum_nats, seconds, calibration = 0.0, 0.0, Calibration()
    for ids_BT in text.batches(batch_blocks):
        input_ids_BT = from_numpy(ids_BT).to(scorer.device)
        lengths_B = torch.full((len(ids_BT),), ids_BT.shape[1], device=scorer.device)
        labels_N = shift_labels(input_ids_BT, lengths_B)[0].flatten()
        started = time.perf_counter()
        chunks = scorer.logits(input_ids_BT, lengths_B)
        measures = joined(measure_labels(logits, labels_N[rows]) for rows, logits in chunks)
        sum_nats += float(measures.loss_C.cpu().double().sum())
        seconds += time.perf_counter() - started
        calibration.add(measures)
        seen(ids_BT.size)
    num_bytes = text.num_predicted_bytes
    return {
        "num_tokens": text.num_predicted,
        "num_bytes": num_bytes,
        **loss_figures(scorer.name, sum_nats, text.num_predicted),
        "bits_per_byte": sum_nats / math.log(2) / num_bytes,
        "ece": calibration.error,
        "tokens_per_s": round(len(text.ids) / seconds, 1),
    }
