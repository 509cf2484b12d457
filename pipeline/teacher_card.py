"""What a teacher's own card declares of its terms: the licence, the data it was made from, the model it came from.

In: a teacher's folder. Out: those entries of its ``README.md``'s front matter, for the cards of caches and students.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD_NAME = "README.md"
DECLARED = ("license", "license_name", "license_link", "language", "datasets", "base_model")
_LONGEST_CARD_BYTES = 1 << 20
_LONGEST_ENTRY = 300


def declared(folder: Path) -> dict[str, str | list[str]]:
    """The declared entries that are text or lists of text; nothing where there is no card, or none that can be read."""
    import yaml

    path = folder / CARD_NAME
    try:
        if not path.is_file() or path.stat().st_size > _LONGEST_CARD_BYTES:
            return {}
        begin, *front = path.read_text(encoding="utf-8").split("---\n", 2)
        entries: Any = yaml.safe_load(front[0]) if len(front) == 2 and not begin.strip("\ufeff \n") else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(entries, dict):
        return {}
    found: dict[str, str | list[str]] = {}
    for name in DECLARED:
        value = entries.get(name)
        if isinstance(value, str) and _is_entry(value):
            found[name] = value
        elif isinstance(value, list) and (parts := [part for part in value if _is_entry(part)]):
            found[name] = parts[:100]
    return found


def _is_entry(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_ENTRY and value.isprintable()
