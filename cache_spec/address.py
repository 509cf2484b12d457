"""Where a cache is: in a folder, or in a store whose caches are read through local copies.

In: what a user wrote. Out: a path or a URL, and where copies lie and how large they may become.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cache_spec.store import home_folder, is_url

BYTES_PER_GB = 10**9


def as_address(value: str | Path) -> Path | str:
    """A URL as text, which a path would cut a slash from; a folder as a path."""
    return Path(value) if isinstance(value, str) and not is_url(value) else value


# As text first: JSON has no paths, and a URL must not become one.
CacheAddress = Annotated[str | Path, Field(union_mode="left_to_right"), AfterValidator(as_address)]
"""A cache's folder, or its URL in a store."""


class CopySettings(BaseModel):
    """How caches in a store are read."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    HEADINGS: ClassVar = {"copy_folder": "Copies of caches in a store"}

    copy_folder: Path | None = None
    """Folder of the local copies of caches that are read from a store; default: copies in $KDPIPE_HOME, or else in
    ~/.cache/kdpipe."""
    copy_gb: float = Field(default=50.0, ge=0)
    """Gigabytes that the copies in that folder may take together: what was not used for longest goes first; 0: no
    bound."""

    @property
    def copies(self) -> Path:
        """The folder of all copies."""
        return home_folder() / "copies" if self.copy_folder is None else self.copy_folder.expanduser()

    @property
    def copies_limit_bytes(self) -> int | None:
        """Of all copies; None: no bound."""
        return int(self.copy_gb * BYTES_PER_GB) if self.copy_gb else None
