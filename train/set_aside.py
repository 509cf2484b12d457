"""Training into a folder that may hold another run: that run is moved aside, whole, and nothing is deleted.

In: settings of a run. Out: what ``train`` returns. A folder that holds anything but a run of ours is refused as ever.
"""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any

from cache_spec.durable import sync_folder, writing
from cache_spec.errors import WouldLoseDataError
from train.config import TrainConfig
from train.loop import train
from train.run_folder import claimed

logger = logging.getLogger("kdpipe")

_OF_ANOTHER_RUN = {"another-cache", "other-settings"}


def train_with_force(config: TrainConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Train as ``train`` does; a finished or begun run of other settings in its folder is moved to ``OUT.old-N``."""
    try:
        return train(config, quiet=quiet)
    except WouldLoseDataError as error:
        # One process moves a folder; several would each move what another has just begun.
        if error.kind not in _OF_ANOTHER_RUN or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise
    with claimed(config.out), writing(config.out):
        aside = _free_name(config.out)
        config.out.rename(aside)
        sync_folder(aside.parent)
    logger.info("the run in %s was moved to %s", config.out, aside)
    return train(config, quiet=quiet)


def _free_name(out: Path) -> Path:
    names = (out.with_name(f"{out.name}.old-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
