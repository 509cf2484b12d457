"""Settings of ``cache-teacher`` and ``transcode``: each is a flag, a recipe key and a line of help at once.

In: values from flags and recipes. Out: one frozen, checked object.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from cache_spec.address import CacheAddress
from cache_spec.manifest import sha256_hex
from cache_spec.store import home_folder, is_url
from pipeline.encoding_config import EncodingConfig, EncodingName
from pipeline.workers_config import WorkersConfig


class CaptureConfig(EncodingConfig, WorkersConfig):
    """What to run the teacher on, and what to keep of it."""

    HEADINGS: ClassVar = {
        "teacher": "Teacher and text",
        "block_tokens": "Blocks",
        "temperatures": "What is kept",
        "mask_probability": "Masked language models",
        "hidden_window": "What is kept",
        "batch_blocks": "Device and speed",
    }

    teacher: str
    """Causal or masked language model: a local folder, a GGUF file or a hub name."""
    text: tuple[str, ...] = Field(min_length=1)
    """Text: file (.jsonl, .json, .parquet, .txt, each also .gz or .zst), folder, glob, hub data set as
    NAME, NAME:CONFIG, NAME@REVISION or NAME:CONFIG@REVISION, or python-docs:train or :heldout; may be given more than
    once."""
    out: Path
    """Folder of the cache, or its address in an object store: s3://BUCKET/NAME, gs://BUCKET/NAME, az://ACCOUNT/NAME."""
    store: str | None = None
    """Address that the shards go to; --out is then the folder of what stays here while the cache is made: the staged
    blocks and the small files. An address as --out takes a folder of its own for these, below ~/.cache/kdpipe."""
    revision: str | None = None
    """Revision of the teacher's hub repository."""
    gguf_file: str | None = None
    """GGUF file inside the teacher's folder or repository."""
    text_field: str = "text"
    """Field or column that holds the text."""
    split: str = "train"
    """Split of a hub data set."""
    block_tokens: int = Field(default=1024, ge=2)
    """Tokens in a block."""
    last_block: Literal["drop", "keep", "each"] = "drop"
    """What to do with partial blocks: drop or keep the last one, padded with the end-of-text token, or begin a block
    with each document and keep each one's last."""
    limit_tokens: int | None = Field(default=None, ge=1)
    """Stop after this many tokens of the corpus."""
    temperatures: tuple[float, ...] = (1.0, 2.0)
    """Temperatures that students may be trained at, ascending, from 0.05 to 100."""
    mask_probability: float = Field(default=0.15, gt=0, le=1)
    """Share of a block's tokens that a masked language model has to find out; special ones are left out."""
    mask_keep: float = Field(default=0.1, ge=0, le=1)
    """Share of these that it reads as they are."""
    mask_random: float = Field(default=0.1, ge=0, le=1)
    """Share of these in whose place it reads a random token; of all others it reads the mask."""
    mask_smoothing: float = Field(default=0.7, ge=0)
    """Tokens are masked in proportion to their count in the text to the power of minus this; 0 treats all alike."""
    mask_seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of what is masked."""
    mask_positions: Literal["masked", "all"] = "masked"
    """Which targets of a masked language model are kept: those of masked tokens, or all."""
    hidden_window: int = Field(default=32, ge=0)
    """Tokens averaged into one stored hidden state; 1 keeps each, 0 keeps none."""
    hidden_dtype: Literal["float16", "int8"] = "int8"
    """Type of the averaged hidden states; int8 has a scale for each dimension of a block."""
    batch_blocks: int = Field(default=4, ge=1)
    """Blocks in one forward pass of the teacher; at most a shard's."""
    shard_blocks: int = Field(default=256, ge=1)
    """Blocks in a shard: the unit that is committed at once, and the most that an interruption costs."""
    device: str = "auto"
    """Device of the teacher: auto, cpu, cuda, cuda:N or mps."""
    spread: bool = False
    """Lay the teacher's layers over all GPUs that its process sees, for one that is larger than a GPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type the teacher computes in; auto is bfloat16 on CUDA, float32 elsewhere."""
    compile: bool = False
    """Compile the teacher with torch.compile: a slow start, then faster passes, and other last bits: another cache."""

    @model_validator(mode="before")
    @classmethod
    def _out_may_be_a_store(cls, values: Any) -> Any:
        if isinstance(values, dict) and is_url(values.get("out", "")):
            if values.get("store") is not None:
                raise ValueError("out is a folder where store is the address")
            url = str(values["out"])
            values = {**values, "out": home_folder() / "captures" / sha256_hex(url.encode())[:16], "store": url}
        return values

    @field_validator("store")
    @classmethod
    def _store_that_commits(cls, store: str | None) -> str | None:
        if store is not None and not is_url(store):
            raise ValueError(f"{store} is no address of a store")
        if store is not None and store.startswith("hf://"):
            raise ValueError("the hub takes a finished cache: capture to a folder, then push it")
        return store

    @field_validator("text", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("text")
    @classmethod
    def _texts_at_home(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(os.path.expanduser, texts))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.hidden_window and "hidden_dtype" in self.model_fields_set:
            raise ValueError("hidden_dtype means nothing without hidden_window")
        if self.hidden_window and self.block_tokens % self.hidden_window:
            raise ValueError(f"hidden_window {self.hidden_window} does not divide block_tokens {self.block_tokens}")
        if self.mask_keep + self.mask_random > 1 + 1e-6:
            raise ValueError(f"mask_keep {self.mask_keep:g} and mask_random {self.mask_random:g} are more than all")
        if self.spread and self.workers > 1:
            raise ValueError("spread takes all GPUs for one teacher: give at most one worker, or a scheduler")
        if self.spread and ":" in self.device:
            raise ValueError(f"spread takes all GPUs, device {self.device} is one")
        if self.batch_blocks > self.shard_blocks:
            raise ValueError(f"batch_blocks {self.batch_blocks} is more than shard_blocks {self.shard_blocks}")
        if self.limit_tokens is not None and self.last_block == "drop" and self.limit_tokens < self.block_tokens:
            raise ValueError(f"limit_tokens {self.limit_tokens} is less than one block of {self.block_tokens}")
        return self


class TranscodeConfig(EncodingConfig):
    """Which cache to make from a richer one; what is not given is as in that one, or else the default."""

    HEADINGS: ClassVar = {"cache": "Caches", "temperatures": "What is kept", "device": "Device"}

    cache: CacheAddress
    """Cache to start from: its folder, or its address in a store."""
    out: Path
    """Folder of the new cache."""

    @field_validator("out", mode="before")
    @classmethod
    def _folder(cls, out: Any) -> Any:
        if is_url(out):
            raise ValueError(f"a folder is expected, not {out}: push the cache when it is made")
        return out

    encoding: EncodingName | None = None  # type: ignore[assignment]
    """How targets are kept: topk, prototype, sampled, sparsified or hidden.  [default: as in CACHE]"""
    temperatures: tuple[float, ...] | None = None
    """Temperatures to keep, ascending; any from 0.05 to 100 where CACHE has hidden.  [default: as in CACHE]"""
    hidden_window: int | None = Field(default=None, ge=0)
    """Tokens averaged into one stored hidden state, 0 to keep none.  [default: as in CACHE]"""
    hidden_dtype: Literal["float16", "int8"] | None = None
    """Type of the averaged hidden states.  [default: as in CACHE]"""
    device: str = "auto"
    """Device that hidden states become targets on: auto, cpu, cuda, cuda:N or mps."""
