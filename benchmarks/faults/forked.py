"""Processes that begin where this one is: everything is imported, so that kills fall on work and not on imports.

In: a function. Out: a process that runs it, says what it has to say to a log, and may be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

_TOLD = 400


def forked(body: Callable[[], object], log: Path) -> ForkProcess:
    """Start a process whose exit code is the number that ``body`` returns, 1 where it raises, else 0."""

    def run() -> None:
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 (until the process ends)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        torch.set_num_threads(1)
        code = 1
        try:
            told = body()
            code = told if isinstance(told, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def outcome(process: ForkProcess, log: Path) -> str:
    """How a process ended, and the last that it said."""
    return f"exit code {process.exitcode}: {log.read_text()[-_TOLD:].strip() if log.exists() else ''}"


def run_forked(body: Callable[[], object], log: Path) -> str | None:
    """Run ``body`` in such a process to its end; what it said if that was not a good one."""
    process = forked(body, log)
    process.join()
    return None if process.exitcode == 0 else outcome(process, log)
