"""Checkpoints written behind the student's back: snapshots in host memory come in, published folders go out.

One write at a time: the next one, and the end of the run, wait for it. A write that failed fails the run at the next
step, and the checkpoint before it stands.
"""

from __future__ import annotations

import threading
from pathlib import Path

from train.checkpoint import Snapshot, publish


class CheckpointWriter:
    """Publishes snapshots in ``folder``: in a thread, or at once."""

    def __init__(self, folder: Path, *, in_background: bool) -> None:
        self._folder = folder
        self._in_background = in_background
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Publish a snapshot that nobody changes any more; raises what kept the one before from being published."""
        self.wait()
        if not self._in_background:
            publish(self._folder, snapshot)
            return
        self._thread = threading.Thread(target=self._publish, args=(snapshot,), name="kdpipe-checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what kept a snapshot from being published; does not wait."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Return when everything is published; raises what kept it from being."""
        self.close()
        self.check()

    def close(self) -> None:
        """Return when nothing is being written any more; a failure is left for ``check``."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _publish(self, snapshot: Snapshot) -> None:
        try:
            publish(self._folder, snapshot)
        except BaseException as error:  # whatever it is, it must reach the training thread
            self._failure = error
