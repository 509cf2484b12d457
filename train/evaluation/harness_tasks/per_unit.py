"""What lm-evaluation-harness divides log-likelihoods by: a document and its result come in, weighted figures go out.

The harness imports this file by itself, so it imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Weighted = tuple[float, int]


def per_word_and_byte(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Weighted]:
    """Nats by the document's ``num_words`` and ``num_bytes``."""
    return {"word_perplexity": (_nats(results), doc["num_words"]), **per_byte(doc, results)}


def per_byte(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Weighted]:
    """Nats by the document's ``num_bytes``."""
    return {"bits_per_byte": (_nats(results), doc["num_bytes"])}


def _nats(results: Sequence[Any]) -> float:
    """Of one request; with a context it comes as a pair, whose other part says whether it was the first choice."""
    (result,) = results
    return float(result[0] if isinstance(result, tuple) else result)
