"""Text to staged blocks, beside the tokenizer alone on the same documents, and memory on ten times the text.

In: a tokenizer, documents, a number of turns. Out: seconds of CPU of both, their ratio, and most anonymous memory.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.workers import Peak
from cache_spec.manifest import SourceInfo
from pipeline.blocks import stage_blocks
from pipeline.corpus import Corpus, Source
from pipeline.demo_text import python_docs
from pipeline.token_stream import BATCH_PIECES


def measure(teacher: Path, *, num_documents: int, turns: int, times: int = 10) -> dict[str, Any]:
    """In turns; the documents are the first of the embedded text."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = [text for _, text in itertools.islice(python_docs("train"), num_documents)]
    alone_s: list[float] = []
    staging_s: list[float] = []
    num_tokens = 0
    _tokenise(tokenizer, texts[:1])
    for _ in range(turns):
        began = time.process_time()
        _tokenise(tokenizer, texts)
        alone_s.append(time.process_time() - began)
        began = time.process_time()
        num_tokens = _stage(tokenizer, texts, 1)
        staging_s.append(time.process_time() - began)
    peaks = {}
    for count in (1, times):
        with Peak() as peak:
            _stage(tokenizer, texts, count)
        peaks[count] = peak.most_bytes
    return {
        "tokens": num_tokens,
        "tokenizer_cpu_s": round(statistics.median(alone_s), 4),
        "text_to_blocks_cpu_s": round(statistics.median(staging_s), 4),
        "ratio": round(statistics.median(a / s for a, s in zip(alone_s, staging_s, strict=True)), 3),
        "anonymous_mb": {str(count): round(peak / 1e6, 1) for count, peak in peaks.items()},
        "memory_ratio": round(peaks[times] / peaks[1], 3),
    }


def _tokenise(tokenizer: Any, texts: list[str]) -> None:
    for first in range(0, len(texts), BATCH_PIECES):
        tokenizer(texts[first : first + BATCH_PIECES], add_special_tokens=False, verbose=False)


def _stage(tokenizer: Any, texts: list[str], times: int) -> int:
    """Tokens in the blocks that come of the texts, ``times`` over."""

    def records() -> Any:
        return (("text", (text,)) for _ in range(times) for text in texts)

    corpus = Corpus((Source(info=lambda: SourceInfo(name="texts", num_bytes=0, sha256="0" * 64), records=records),))
    with tempfile.TemporaryDirectory() as folder:
        return stage_blocks(
            corpus,
            tokenizer,
            folder=Path(folder),
            block_tokens=512,
            eos_token_id=tokenizer.eos_token_id,
            vocab_size=len(tokenizer),
            key="0" * 64,
            quiet=True,
        ).num_tokens
