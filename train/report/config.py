"""Settings of one report: what a recipe or the command line says comes in, one checked `ReportConfig` goes out.

Nothing here imports torch or a plotting library: the command line builds its options and their help from these fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from cache_spec.address import CacheAddress, CopySettings


class ReportConfig(CopySettings):
    """What to report on; raises pydantic's ValidationError for settings that make no sense."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    HEADINGS: ClassVar = {"out": "The page", "cache": "What is shown", "title": "How it is shown"}

    out: Path
    """The HTML file to write."""
    cache: CacheAddress | None = None
    """Cache to show: a folder, finished or not, or the address of a finished one."""
    run: tuple[Path, ...] = ()
    """Training run to show: its folder; may be given more than once."""
    family: Path | None = None
    """Family of students to show: its folder, with the runs in it."""
    evaluation: tuple[Path, ...] = ()
    """Evaluation to show: what `kdpipe evaluate` wrote as JSON; may be given more than once."""
    plan: Path | None = None
    """Plan to hold against what happened: what `kdpipe plan --json` printed, in a file."""
    title: str | None = Field(default=None, min_length=1)
    """Title of the page; default: made of what is shown."""
    sample_blocks: int = Field(default=64, ge=1)
    """Blocks of the cache that are decoded; figures of the sample say so."""
    examples: int = Field(default=6, ge=0)
    """Positions of the text to show with the teacher's most probable tokens."""
    seed: int = Field(default=0, ge=0)
    """Of the choice of blocks and examples."""
    plots: bool | None = None
    """Whether to draw plots; default: if matplotlib is there."""

    @model_validator(mode="after")
    def _something_is_shown(self) -> Self:
        if self.cache is None and self.family is None and self.plan is None and not (self.run or self.evaluation):
            raise ValueError("nothing to report on: give --cache, --run, --family, --evaluation or --plan")
        return self
