"""What is compared works in processes of its own, told by lines what to do: nothing of one counts for another.

In: JSON objects on standard input, one a line. Out: one a line on standard output: figures, or what went wrong.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_SAMPLE_S = 0.002


class Process:
    """A worker, from outside: ``python -m MODULE ARGUMENTS``."""

    def __init__(
        self, module: str, *arguments: str, python: str = sys.executable, environment: Mapping[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=_ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """The answer to one order; RuntimeError for one that failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise RuntimeError(f"{do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def answer_orders(worker: object) -> None:
    """Be a worker: each order names a method of ``worker`` and its arguments, until standard input ends."""
    # Libraries print; answers go to a copy of standard output that they do not know.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(worker, order.pop("do"))(**order)
        except Exception as error:  # a rival may raise anything; the benchmark reports it beside the others' figures
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Peak:
    """The most anonymous memory since it was entered, by sampling."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.start_bytes = self.most_bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self.most_bytes = max(self.most_bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown_bytes(self) -> int:
        return self.most_bytes - self.start_bytes
