"""Probes in processes of their own: start-up is timed as a user pays for it, and memory is nobody else's.

In: the name of a module with a function ``probe``, and an order of plain JSON values. Out: its answer, and the seconds
from the process's start to its end; a KdpipeError of the probe is raised here again.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from cache_spec import errors
from cache_spec.errors import KdpipeError
from cache_spec.failures import first_line

_CODES = {code.exit_code: code for code in (errors.KdpipeError, errors.BadInputError, errors.WouldLoseDataError)}


class Answer(NamedTuple):
    """What a probe says, and how long its whole process took."""

    facts: dict[str, Any]
    wall_s: float


def ask(module: str, order: Mapping[str, Any]) -> Answer:
    """Run ``module.probe(order)`` in a process of its own.

    Raises what it raised, if that is for the user, else KdpipeError ``probe-failed`` with its last words.
    """
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", __name__, module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        out, words = child.communicate(json.dumps(order))
    except BaseException:
        child.kill()
        child.wait()
        raise
    wall_s = time.perf_counter() - began
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        last = (words.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise KdpipeError("probe-failed", module, found=last[:300]) from None
    if "error" in answer:
        told = answer["error"]
        raise _CODES[told.pop("exit_code")](told.pop("kind"), told.pop("place"), **told)
    return Answer(answer, wall_s)


def _serve(module: str) -> None:
    # Libraries print; the answer goes to a copy of standard output that they do not know.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    try:
        answer = import_module(module).probe(json.load(sys.stdin)) | {"peak_bytes": _peak_bytes()}
    except KdpipeError as error:
        told = {name: getattr(error, name) for name in ("kind", "place", "expected", "found", "hint", "exit_code")}
        answer = {"error": told}
    except Exception as error:  # whatever a library raises is one line to the user
        found = f"{type(error).__name__}: {first_line(error)}"
        code = errors.EXIT_FAILED
        answer = {"error": {"kind": "probe-failed", "place": module, "found": found, "exit_code": code}}
    print(json.dumps(answer), file=answers, flush=True)


def _peak_bytes() -> int:
    """The most memory this process held: of the GPU, if it worked on one, else of the machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    _serve(sys.argv[1])
