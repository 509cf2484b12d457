"""``python -m benchmarks.encoding --teacher FOLDER``: what making targets costs beside the teacher's forward.

In: a teacher's folder, and the README's text. Out: JSON: processor time per token, summed over threads, of the teacher
(base model and output head) and of each encoding (all after the head's matrix product, pooled hidden states included),
medians over turns in which teacher and encodings follow each other, and their ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype, encode_prototypes
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import TopK
from cache_spec.targets import Geometry
from pipeline.encoders import make_encoder
from pipeline.encoders.spectrum import Encoder
from pipeline.targets import encode_batch
from pipeline.teacher import OutputHead, Teacher, load_teacher
from pipeline.teacher_files import resolve_teacher

README = Path(__file__).parents[1] / "README.md"
TEMPERATURES = (1.0, 2.0)
WINDOW = 32
PROTOTYPES = 64
ENCODINGS: dict[str, Encoding] = {
    "topk, K = 32": TopK(k=32),
    "prototype, K = 32": Prototype(k=32, prototypes=PROTOTYPES, calibration_tokens=1),
    "prototype, K = 32, S = 16": Prototype(k=32, prototypes=PROTOTYPES, calibration_tokens=1, residual_draws=16),
    "sampled, N = 50": Sampled(draws=50),
    "sparsified, K = 32": Sparsified(k=32),
    "hidden, float16": Hidden(),
    "hidden, int8": Hidden(dtype="int8"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedHead(OutputHead):
    """An output head that counts the time of its matrix products."""

    spent: list[float]

    def logits(self, hidden_ND: torch.Tensor, out_NV: torch.Tensor) -> torch.Tensor:
        began = time.process_time()
        result = super().logits(hidden_ND, out_NV)
        self.spent.append(time.process_time() - began)
        return result


def make_encoders(teacher: Teacher, block_tokens: int) -> dict[str, Encoder]:
    """The encoders that are measured; their prototypes are random, which costs the same as learnt ones."""
    info = teacher.info
    geometry = Geometry(block_tokens, TEMPERATURES, info.vocab_size, info.width)
    rng = np.random.default_rng(0)
    shared = rng.exponential(size=(len(TEMPERATURES), PROTOTYPES, info.vocab_size))
    tables = {
        "prototype_classifier": rng.normal(size=(PROTOTYPES, info.width + 1)).astype(np.float32),
        "prototypes": encode_prototypes(shared / shared.sum(-1, keepdims=True)),
    }
    return {
        name: make_encoder(record, geometry, tables=tables, device=teacher.device) for name, record in ENCODINGS.items()
    }


def measure(teacher: Teacher, *, num_blocks: int, block_tokens: int, turns: int) -> dict[str, Any]:
    """Microseconds of processor time per token, medians over ``turns`` after one that is thrown away."""
    tokens = teacher.tokenizer(README.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    ids_BT = np.resize(np.asarray(tokens, dtype=np.int64), (num_blocks, block_tokens))
    lengths_B = np.full(num_blocks, block_tokens)
    head = TimedHead(weight_VD=teacher.head.weight_VD, bias_V=teacher.head.bias_V, spent=[])
    encoders = make_encoders(teacher, block_tokens)
    seen: dict[str, list[float]] = {name: [] for name in ("base model", "head", *encoders)}
    for _ in range(turns + 1):
        began = time.process_time()
        hidden_BTD = teacher.hidden(ids_BT)
        seen["base model"].append(time.process_time() - began)
        products = []
        for name, encoder in encoders.items():
            head.spent.clear()
            began = time.process_time()
            encode_batch(head, hidden_BTD, ids_BT, lengths_B, encoder=encoder, first_block=0, window=WINDOW)
            products.append(sum(head.spent))
            seen[name].append(time.process_time() - began - products[-1])
        seen["head"].append(statistics.median(products))
    medians = {name: statistics.median(times[1:]) / ids_BT.size * 1e6 for name, times in seen.items()}
    forward = medians["base model"] + medians["head"]
    return {
        "device": str(teacher.device),
        "threads": torch.get_num_threads(),
        "vocab_size": teacher.info.vocab_size,
        "temperatures": TEMPERATURES,
        "tokens_a_turn": ids_BT.size,
        "turns": turns,
        "teacher_us_per_token": {
            "base_model": round(medians["base model"], 1),
            "head": round(medians["head"], 1),
            "both": round(forward, 1),
        },
        "encode": [
            {
                "encoding": name,
                "us_per_token": round(medians[name], 1),
                "percent_of_teacher": round(100 * medians[name] / forward, 2),
            }
            for name in encoders
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", required=True, help="a folder with a causal language model, or a hub name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and turns")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    teacher = load_teacher(resolve_teacher(options.teacher), device=options.device)
    limit = teacher.info.max_positions or 1024
    # In full, a batch of the default capture.
    num_blocks, block_tokens, turns = (1, 512, 3) if options.quick else (4, 1024, 5)
    block_tokens = min(block_tokens, limit // WINDOW * WINDOW)
    print(json.dumps(measure(teacher, num_blocks=num_blocks, block_tokens=block_tokens, turns=turns), indent=2))


if __name__ == "__main__":
    main()
