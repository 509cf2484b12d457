"""The hyper-parameter file of a published recipe, as people have it.

In: a folder and changes. Out: the file's path, with a student's config beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Every key as it was published, in its three spellings.
PUBLISHED: dict[str, Any] = {
    "force": True,
    "dump path": "run",
    "data file": "data/binarized.pickle",
    "student-type": "gpt2",
    "student config": "student.json",
    "teacher type": "gpt2",
    "teacher_name": "gpt2",
    "temperature": 2.0,
    "alpha ce": 5.0,
    "alpha mlm": 0.0,
    "alpha clm": 2.0,
    "alpha mse": 0.0,
    "Alpha Cos": 1.0,
    "mlm": False,
    "word mask": 0.8,
    "word keep": 0.1,
    "word rand": 0.1,
    "restrict ce to mask": False,
    "freeze pos embs": True,
    "freeze token type embds": False,
    "n epoch": 4,
    "batch size": 1,
    "tokens per batch": -1,
    "shuffle": True,
    "group by size": True,
    "gradient accumulation steps": 500,
    "warmup prop": 0.05,
    "weight decay": 0.0,
    "learning rate": 0.00025,
    "adam epsilon": 1e-06,
    "max grad norm": 5.0,
    "initializer range": 0.02,
    "fp16": False,
}
STUDENT = {"n_layer": 6, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


def write_paper(folder: Path, *, student: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The published file with some keys changed, added, or, where the change is ``...``, left out."""
    body = {"_".join(key.lower().replace("-", " ").split()): value for key, value in PUBLISHED.items()}
    body["student_config"] = str(folder / "student.json")
    body |= changes
    (folder / "student.json").write_text(json.dumps(STUDENT if student is None else student))
    path = folder / "paper.json"
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not ...}))
    return path
