"""Corpora in memory.

In: documents. Out: a ``Corpus`` that streams them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from cache_spec.manifest import SourceInfo
from pipeline.corpus import Corpus, Source
from pipeline.textfiles import Record


def corpus_of(texts: Iterable[str]) -> Corpus:
    """A corpus of these documents, each in one chunk."""
    held = list(texts)
    return corpus_from(lambda: ((f"document {number}", (text,)) for number, text in enumerate(held)))


def corpus_from(records: Callable[[], Iterator[Record]]) -> Corpus:
    """A corpus of one source whose records a call gives."""
    return Corpus((Source(info=lambda: SourceInfo(name="test", num_bytes=0, sha256="0" * 64), records=records),))
