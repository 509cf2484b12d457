"""A small capture to do harm to: a tiny teacher, a short text, settings, and what an undisturbed run leaves.

In: a folder. Out: settings of captures beside each other in it, the commands a user would give for them, and caches
that nothing happened to, made once when they are first asked for.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.faults.forked import run_forked
from pipeline import cli
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from tests.models import make_folder, write_words

_KEPT: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "prototype": {"k": 4, "prototypes": 2, "residual_draws": 2, "calibration_tokens": 300},
    "sampled": {"draws": 20},
    "sparsified": {"k": 4},
    "hidden": {},
}
"""Settings of a small cache of each encoding."""
ENCODINGS = tuple(_KEPT)
BLOCK_TOKENS = 16
"""Of every block, unless settings say otherwise."""


@dataclass
class SmallCaptures:
    """Captures of one teacher and one text, in one folder."""

    folder: Path
    num_documents: int = 16
    """Of about 40 tokens."""
    _clean: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        make_folder(self.folder / "teacher", spread=4.0, n_layer=1)
        write_words(self.folder / "text.jsonl", num_documents=self.num_documents)
        # Libraries import much when they are first used: here, so that no child does.
        capture(self.config("first", limit_tokens=4 * BLOCK_TOKENS), quiet=True)
        shutil.rmtree(self.folder / "first")

    def settings(self, name: str, encoding: str = "topk", **changes: Any) -> dict[str, Any]:
        """Of a capture into ``folder / name``."""
        source = {"teacher": str(self.folder / "teacher"), "text": str(self.folder / "text.jsonl")}
        sizes = {"block_tokens": BLOCK_TOKENS, "batch_blocks": 2, "shard_blocks": 2, "hidden_window": 8}
        kept = {"encoding": encoding, **_KEPT[encoding]}
        return {**source, **sizes, **kept, "device": "cpu", "out": self.folder / name, **changes}

    def config(self, name: str, encoding: str = "topk", **changes: Any) -> CaptureConfig:
        return CaptureConfig(**self.settings(name, encoding, **changes))

    def command(self, name: str, encoding: str = "topk", **changes: Any) -> list[str]:
        """The arguments of ``kdpipe``."""
        settings = self.settings(name, encoding, **changes)
        return ["cache-teacher", *(p for key, v in settings.items() for p in (f"--{key.replace('_', '-')}", str(v)))]

    def clean(self, encoding: str = "topk", **changes: Any) -> Path:
        """A cache that nothing happened to."""
        key = "-".join(["clean", encoding, *(f"{name}={value}" for name, value in sorted(changes.items()))])
        if key not in self._clean:
            # In a process with as many threads as those that are harmed.
            problem = run_forked(lambda: cli.run(self.command(key, encoding, **changes)), self.folder / "log")
            assert problem is None, problem
            self._clean[key] = self.folder / key
        return self._clean[key]


def said_by(command: list[str]) -> tuple[int, str]:
    """Run ``kdpipe`` with these arguments, here: its exit code and what it said on standard error."""
    with redirect_stderr(StringIO()) as said, redirect_stdout(StringIO()):
        code = cli.run(command)
    return code, said.getvalue()


def digests(cache: Path) -> dict[str, str]:
    """Digest of every file but the manifest, which records when it was made; hidden files are nobody's data."""
    names = [p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return {n: hashlib.sha256((cache / n).read_bytes()).hexdigest() for n in names if not n.startswith(".")}
