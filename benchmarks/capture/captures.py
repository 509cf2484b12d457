"""A capture that is ready to make its shards: blocks staged, cache begun, teacher loaded.

In: a teacher and sizes. Out: what ``kdpipe cache-teacher`` holds at that moment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cache_spec.manifest import Manifest
from pipeline import folder
from pipeline.capture import Run, stage
from pipeline.config import CaptureConfig
from pipeline.place import InFolder
from pipeline.source import resolve_source


class Begun(NamedTuple):
    """A cache without shards, and what makes them."""

    config: CaptureConfig
    run: Run
    manifest: Manifest


def begin(teacher: Path, out: Path, **settings: Any) -> Begun:
    """Stage the embedded text for a teacher, and begin its cache in ``out``."""
    config = CaptureConfig(
        teacher=str(teacher),
        text=("python-docs:train",),
        out=out,
        device="cpu",
        **settings,
    )
    source = resolve_source(config)
    run = Run(source, InFolder(out), stage(source, quiet=True), True, False)
    return Begun(config, run, folder.create(out, *run.start()))
