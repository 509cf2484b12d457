"""Settings of ``export`` and ``import``: each is a flag, a recipe key and a line of help at once.

In: values from flags and recipes. Out: one frozen, checked object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from cache_spec.address import CacheAddress, CopySettings
from cache_spec.imported import MAX_MASS_ERROR
from cache_spec.record import Record

Logprobs = Literal["renormalised", "full"]
_OF_PARQUET = ("temperature", "k", "logprobs", "tail", "shards_per_file")


class ExportConfig(CopySettings):
    """What to write a cache's targets as, for programs that do not read caches."""

    HEADINGS: ClassVar = {"cache": "Cache and export", "temperature": "Values"}

    cache: CacheAddress
    """Cache to export: its folder, or its address in a store."""
    to: Literal["parquet", "safetensors"]
    """Form: parquet, rows of lists that Hugging Face datasets opens and axolotl's KD plugin takes; or safetensors,
    plain arrays, a file for each shard."""
    out: Path
    """Folder of the export: new, empty, or one that the same command began."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Temperature that log-probabilities are written at, for parquet: one that the cache has."""
    k: int | None = Field(default=None, ge=1)
    """Tokens for each position, for parquet.  [default: all of the cache's heads, 16 of hidden states]"""
    logprobs: Logprobs = "renormalised"
    """What log-probabilities of parquet add up to: one over the kept tokens, as axolotl's KD plugin takes them; or,
    full, one with the mass of all others."""
    tail: bool = False
    """Add columns log_tail_mass_tX to parquet: log of the mass of all other tokens at each temperature X of the cache;
    of hidden states, which have any, at --temperature alone."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of log-probabilities."""
    shards_per_file: int = Field(default=1, ge=1)
    """Shards of the cache that a file of parquet holds."""

    @field_validator("out", mode="after")
    @classmethod
    def _at_home(cls, out: Path) -> Path:
        return out.expanduser()

    @model_validator(mode="after")
    def _all_used(self) -> Self:
        if self.to == "safetensors" and (unused := sorted(self.model_fields_set & set(_OF_PARQUET))):
            raise ValueError(f"{unused[0]} means nothing to safetensors, which keep what the cache keeps")
        return self


class ImportConfig(Record):
    """Which Parquet files to make a cache of, and what is declared of them."""

    model_config = ConfigDict(strict=False)

    HEADINGS: ClassVar = {
        "from_": "Files and cache",
        "logprobs": "What the files hold",
        "k": "What is kept",
        "block_tokens": "Blocks",
    }

    from_: tuple[Path, ...] = Field(min_length=1)
    """Parquet file, or folder of them; may be given more than once. Files are read in the order of their names."""
    out: Path
    """Folder of the cache."""
    tokenizer: str
    """Tokenizer of the ids: a folder or a hub name, the teacher's."""
    teacher: str = "unknown"
    """Name of the model that the log-probabilities are of, for the record."""
    teacher_config: Path | None = None
    """Folder of the teacher's config.json, which students are described by.  [default: the tokenizer's, if it has
    one]"""
    vocab_size: int | None = Field(default=None, ge=1)
    """V, tokens of the teacher's vocabulary.  [default: the tokenizer's]"""
    logprobs: Logprobs = "full"
    """What the values are: full, of the whole vocabulary, so that a row's sum is below one; or renormalised, of the
    kept tokens alone."""
    mass_error: float = Field(default=0.001, ge=0, le=MAX_MASS_ERROR, allow_inf_nan=False)
    """How far a row's sum may be off one, for the values were rounded; a larger error is refused."""
    shift: int = Field(default=0, ge=0, le=1)
    """0 where row j of the lists tells what follows token j, as axolotl and kdpipe have it; 1 where it tells of token j
    itself, as prompt_logprobs of vLLM."""
    ignore_mask: bool = False
    """Take targets also where the mask leaves out a position inside a row."""
    tokens_column: str | None = None
    """Column of token ids.  [default: the one that is there of input_ids, prompt_token_ids, tokens]"""
    ids_column: str | None = None
    """Column of lists of kept ids.  [default: the one that is there of target_token_ids, topk_ids, top_ids]"""
    logprobs_column: str | None = None
    """Column of lists of log-probabilities, or of pairs of id and log-probability.  [default: the one that is there of
    target_logprobs, prompt_logprobs, topk_logprobs, top_logprobs]"""
    mask_column: str | None = None
    """Column of lists that are 0 at what is padding.  [default: target_mask, if it is there]"""
    k: int | None = Field(default=None, ge=1)
    """Tokens kept for each position.  [default: as many as the shortest list has]"""
    levels: int = Field(default=4096, ge=2, lt=1 << 16)
    """Levels that square roots of probabilities are rounded to."""
    odds_step_nats: float = Field(default=1 / 64, gt=0, le=1)
    """Step that the tail's log odds are rounded to."""
    block_tokens: int | None = Field(default=None, ge=2)
    """Tokens in a block; a longer row is refused.  [default: the longest row's]"""
    shard_blocks: int = Field(default=256, ge=1)
    """Blocks in a shard: the unit that is committed at once, and the most that an interruption costs."""

    @field_validator("from_", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("out", "teacher_config", mode="after")
    @classmethod
    def _at_home(cls, path: Path | None) -> Path | None:
        return path and path.expanduser()

    @field_validator("from_", mode="after")
    @classmethod
    def _sources_at_home(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(path.expanduser() for path in paths)
