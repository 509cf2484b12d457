"""Settings of one evaluation: what a recipe or the command line says comes in, one checked `EvaluateConfig` goes out.

Nothing here imports torch: the command line builds its options and their help from these fields, fast.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from cache_spec.address import CacheAddress, CopySettings


class EvaluateConfig(CopySettings):
    """Which models to measure on what; raises pydantic's ValidationError for settings that make no sense."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    HEADINGS: ClassVar = {"models": "What is measured", "batch_blocks": "Device and speed"}

    models: tuple[str, ...] = Field(min_length=1)
    """Model to measure: folder or hub name of a causal language model in safetensors; may be given more than once."""
    text: tuple[str, ...] = ()
    """Text to measure on: a UTF-8 file (one document, or .jsonl with a text on each line); may be given repeatedly."""
    cache: CacheAddress | None = None
    """Finished cache of held-out text (folder or address) to compare with its teacher."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the comparison with the teacher; one of those declared in the cache."""
    block_tokens: int = Field(default=1024, ge=2)
    """Tokens of a text that are read together; each block is predicted without the one before."""
    limit_tokens: int | None = Field(default=None, ge=2)
    """Measure on the first so many tokens of each text."""
    limit_bytes: int | None = Field(default=None, ge=1)
    """Measure on the first so many bytes of each text, the same for every tokenizer."""
    batch_blocks: int = Field(default=4, ge=1)
    """Blocks in one forward pass."""
    device: str = Field(default="auto", min_length=1)
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the models compute in; auto is bfloat16 on a CUDA device that has it, float32 elsewhere."""

    @model_validator(mode="after")
    def _something_to_measure_on(self) -> Self:
        if not self.text and self.cache is None:
            raise ValueError("give a text, a cache or both")
        if not self.text and (self.limit_tokens is not None or self.limit_bytes is not None):
            raise ValueError("limit_tokens and limit_bytes cut texts: give a text")
        if not all(self.models):
            raise ValueError("a model needs a name")
        return self
