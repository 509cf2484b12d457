"""Settings of one evaluation: what a recipe or the command line says comes in, one checked `EvaluateConfig` goes out.

Nothing here imports torch: the command line builds its options and their help from these fields, fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from cache_spec.address import CacheAddress, CopySettings

CORPORA = ("wikitext103", "ptb", "enwik8", "lambada", "common_gen")


class EvaluateConfig(CopySettings):
    """Which models to measure on what; raises pydantic's ValidationError for settings that make no sense."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    HEADINGS: ClassVar = {
        "models": "What is measured",
        "mode": "How corpora and texts are read",
        "bootstrap": "Intervals",
        "speed": "Speed",
        "sample": "What models write",
        "harness": "Device and output",
    }

    models: tuple[str, ...] = Field(min_length=1)
    """Model to measure: folder or hub name of a causal language model in safetensors; may be given more than once."""
    corpus: tuple[str, ...] = ()
    """Corpus to measure on, NAME (from the hub) or NAME=PATH (a file); wikitext103, ptb, enwik8, lambada, common_gen;
    may be given repeatedly."""
    text: tuple[str, ...] = ()
    """Text to measure on: a UTF-8 file (one document, or .jsonl with a text on each line); may be given repeatedly."""
    cache: CacheAddress | None = None
    """Finished cache of held-out text (folder or address) to compare with its teacher."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the comparison with the teacher; one of those declared in the cache."""
    mode: Literal["strided", "blocks"] = "strided"
    """How corpora of text are read: strided windows that score each token once, or blocks that do not overlap."""
    window: int | None = Field(default=None, ge=2)
    """Tokens of a corpus that are read together; default: 1024, or as many as each of the models can read."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from one strided window to the next; default: half a window."""
    count_line_ends: bool = False
    """Count the end of each line as a word in the word perplexity of WikiText and PTB."""
    block_tokens: int = Field(default=1024, ge=2)
    """Tokens of a text that are read together; each block is predicted without the one before."""
    limit_tokens: int | None = Field(default=None, ge=2)
    """Measure on so many tokens: the first ones of each text, and about as many, in windows spread evenly, of each
    corpus of text."""
    limit_examples: int | None = Field(default=None, ge=1)
    """Measure on so many examples of lambada and common_gen, spread evenly."""
    limit_bytes: int | None = Field(default=None, ge=1)
    """Measure on the first so many bytes of each text, the same for every tokenizer."""
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples that the intervals of corpora and caches are made from; 0: none."""
    level: float = Field(default=0.95, gt=0, lt=1)
    """Share of the resamples inside an interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resamples, and of sampled generation."""
    speed: bool = False
    """Time generation by each model, all in turns, and measure peak memory."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of the prompt of timed generation."""
    new_tokens: int = Field(default=32, ge=2)
    """Tokens of timed generation."""
    rounds: int = Field(default=3, ge=1)
    """Turns of each model in timed generation; the median counts."""
    sample: tuple[str, ...] = ()
    """Prompt to show what each model writes after it; may be given repeatedly."""
    sample_tokens: int = Field(default=64, ge=1)
    """Most tokens that are written after a prompt."""
    sample_temperature: float = Field(default=0.0, ge=0)
    """Temperature of what is written; 0: the most probable token each time."""
    harness: bool = False
    """Also measure the corpora by lm-evaluation-harness (extra 'harness'), in windows as long as ours."""
    batch_blocks: int = Field(default=4, ge=1)
    """Blocks or windows in one forward pass."""
    device: str = Field(default="auto", min_length=1)
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the models compute in; auto is bfloat16 on a CUDA device that has it, float32 elsewhere."""
    out: Path | None = None
    """Also write what --json prints to this file."""

    @model_validator(mode="after")
    def _something_to_measure_on(self) -> Self:
        if not (self.text or self.corpus or self.speed or self.sample) and self.cache is None:
            raise ValueError("give a corpus, a text, a cache, --speed or --sample")
        if self.limit_bytes is not None and not self.text:
            raise ValueError("limit_bytes cuts texts: give a text")
        if self.limit_tokens is not None and not (self.text or self.corpus):
            raise ValueError("limit_tokens cuts texts and corpora: give one")
        if self.limit_examples is not None and not self.corpus:
            raise ValueError("limit_examples cuts corpora: give one")
        if self.harness and (not self.corpus or self.limit_tokens is not None):
            raise ValueError("the harness measures corpora, and whole ones: give one, and no limit_tokens")
        if not all(self.models):
            raise ValueError("a model needs a name")
        return self

    @model_validator(mode="after")
    def _corpora_have_names(self) -> Self:
        for given in self.corpus:
            name, equals, path = given.partition("=")
            if name not in CORPORA or (equals and not path):
                raise ValueError(f"corpus {given!r}: NAME or NAME=PATH, of " + ", ".join(CORPORA))
        return self

    @model_validator(mode="after")
    def _windows_are_strided(self) -> Self:
        if self.stride is not None and self.mode == "blocks":
            raise ValueError("blocks do not overlap: a stride needs --mode strided")
        if self.stride is not None and self.window is not None and self.stride > self.window:
            raise ValueError("stride is at most the window: every token is scored")
        return self
