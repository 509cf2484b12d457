"""The index of an export: which cache and settings it is of, which files are whole, and whether all are.

In: an ``export.json``. Out: the same as one checked object, and back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from cache_spec.durable import replace_file
from cache_spec.errors import BadInputError
from cache_spec.record import Record

INDEX_NAME = "export.json"


class ExportedFile(Record):
    """One whole file."""

    num_bytes: int = Field(ge=0)
    sha256: str
    first_block: int = Field(ge=0)
    num_blocks: int = Field(ge=0)
    """0: what the cache keeps once."""


class Index(Record):
    """Format 1 of an export."""

    format: Literal["kdpipe-export"] = "kdpipe-export"
    format_version: Literal[1] = 1
    fingerprint: str
    """Of the cache."""
    settings: dict[str, Any]
    finished: bool = False
    files: dict[str, ExportedFile] = Field(default_factory=dict)
    """By path below the export's folder."""
    page_sha256: str | None = None
    """Of the README.md that was written last, to tell it from one that somebody edited."""


def read_index(path: Path) -> Index:
    """The index at ``path``; BadInputError ``broken-export`` for what is none."""
    try:
        return Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInputError("broken-export", path, expected="the index of an export", found=error.strerror) from None
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{first['msg']} at {'.'.join(map(str, first['loc'])) or 'its start'}"
        raise BadInputError("broken-export", path, expected="the index of an export", found=found) from None


def write_index(path: Path, index: Index) -> None:
    """Put an index in the place of the one before, at once."""
    replace_file(path, (index.model_dump_json(indent=1) + "\n").encode())
