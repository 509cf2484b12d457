"""What a student inherits, for its model card: whose weights and text it was made from, and on what terms.

In: a cache's manifest and its small files. Out: rows of the card; no local path among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cache_spec.manifest import Manifest
from train.student import public_name

DECLARED_NAME = "teacher/card.json"
_SOURCES_SHOWN = 20


def inheritance(manifest: Manifest, cache_folder: Path) -> dict[str, object]:
    """What is known of the terms of teacher and text, as rows; what their cards do not say is called unknown."""
    teacher, corpus = manifest.teacher, manifest.corpus
    declared: dict[str, Any] = {}
    if DECLARED_NAME in manifest.files:
        declared = json.loads((cache_folder / DECLARED_NAME).read_text(encoding="utf-8"))
    licence = declared.get("license_name") or declared.get("license") or "not declared in the teacher's card"
    rows: dict[str, object] = {
        "teacher's weights": f"SHA-256 {teacher.weights_sha256}",
        "teacher's licence": licence,
    }
    for name, title in (
        ("license_link", "its text"),
        ("base_model", "teacher made from"),
        ("datasets", "teacher's data, as declared"),
    ):
        if name in declared:
            rows[title] = declared[name]
    shown = [
        f"{public_name(source.name)} ({source.num_bytes:,} bytes, SHA-256 {source.sha256[:12]}…)"
        for source in corpus.sources[:_SOURCES_SHOWN]
    ]
    rest = len(corpus.sources) - len(shown)
    rows["text"] = [*shown, f"{rest:,} more"] if rest else shown
    rows["documents"] = corpus.num_documents
    rows["licence of the text"] = "not recorded"
    rows["terms"] = (
        "Teacher and text have terms of their own, which may restrict students; biases of both, and text that the"
        " teacher has memorised, can pass on. Measure the student on what it is used for."
    )
    return rows
