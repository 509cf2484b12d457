"""Text to cache: resolve, stage blocks, make tables, run the teacher shard by shard, seal.

In: capture settings. Out: a finished cache folder. The state on disk is the truth: the same command run again, after
whatever happened, commits the shards that are missing and ends with the same arrays.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cache_spec.durable import make_folder
from cache_spec.errors import WouldLoseDataError
from cache_spec.manifest import Manifest, canonical_json, differences, sha256_hex
from cache_spec.targets import Array
from pipeline import folder
from pipeline.blocks import StagedBlocks, stage_blocks
from pipeline.config import CaptureConfig
from pipeline.folder import STAGING_NAME
from pipeline.masking import kept_first
from pipeline.place import Place, place_of
from pipeline.progress import Progress
from pipeline.shard import capture_shards, encoder_of, masker_of, read_blocks
from pipeline.source import Source, as_settled, refuse_differences, resolve_source, staged_manifest
from pipeline.tables import make_tables, settled
from pipeline.teacher import Teacher, load_teacher
from pipeline.teacher_description import teacher_description
from pipeline.teacher_files import load_tokenizer

logger = logging.getLogger("kdpipe")


def capture(config: CaptureConfig, *, quiet: bool = False, events: bool = False) -> dict[str, Any]:
    """Make, or finish, the cache that ``config`` describes; returns its summary.

    ``quiet`` shows no bars; ``events`` tells of shards in JSON lines on standard error in their place.
    Raises WouldLoseDataError if the folder holds another cache, other settings, or a capture that is running.
    """
    source, out = resolve_source(config), config.out
    place = place_of(out, config.store)
    with folder.exclusive(out) as local:
        existing = place.find(local)
        if existing is not None:
            refuse_differences(existing, source)
            folder.restore(out, existing, lambda: description(source))
            if place.is_finished(existing):
                logger.info("%s is finished already: %d blocks", place.name, existing.blocks.num_blocks)
                folder.drop_staging(out)
                return place.summary(existing, captured=0)
        run = Run(source, place, stage(source, quiet=quiet), quiet, events)
        if existing is None:
            manifest = folder.create(out, *run.start())
        else:
            manifest = existing
            run.go_on(existing)
        place.begin(manifest)
        todo = place.reopen(manifest)
        run.shards(manifest, todo)
        place.seal(manifest)
        return place.summary(manifest, captured=len(todo))


class Run:
    """A capture under way: its staged blocks, and its teacher, which is loaded when it is first needed."""

    def __init__(self, source: Source, place: Place, staged: StagedBlocks, quiet: bool, events: bool) -> None:
        self.source, self.place, self.staged, self.quiet, self.events = source, place, staged, quiet, events

    @cached_property
    def teacher(self) -> Teacher:
        config = self.source.config
        return load_teacher(
            self.source.files,
            device=config.device,
            dtype=config.dtype,
            spread=config.spread,
            compiled=config.compile,
        )

    def start(self) -> tuple[Manifest, dict[str, bytes], dict[str, Array]]:
        """Manifest, small files and tables of a cache that is begun."""
        encoding, files = self.source.encoding, description(self.source)
        manifest = staged_manifest(self.source, self.staged, encoding)
        if not manifest.tables:
            return manifest, files, {}
        manifest = staged_manifest(self.source, self.staged, settled(encoding, self.teacher.head))
        return manifest, files, self.tables(manifest)

    def go_on(self, existing: Manifest) -> None:
        """Refuse a cache of other tokens, and make its tables whole."""
        encoding = as_settled(self.source.encoding, existing.encoding)
        manifest = staged_manifest(self.source, self.staged, encoding).model_copy(update={"tables": existing.tables})
        if existing.fingerprint != manifest.fingerprint:
            # The sources' digests are the same, so the tokenizer's library changed its mind.
            found = "; ".join(differences(existing, manifest))
            raise WouldLoseDataError("tokens-changed", self.source.config.out, found=found)
        folder.restore_tables(self.source.config.out, existing, lambda: self.tables(existing))

    def tables(self, manifest: Manifest) -> dict[str, Array]:
        """What the encoding stores once; a pass over sampled blocks, where prototypes are learnt."""
        masker = masker_of(manifest, self.staged)
        with tqdm(unit="tok", unit_scale=True, desc="calibration", disable=self.quiet or None) as bar:

            def hidden_of(blocks: Sequence[int]) -> tuple[torch.Tensor, Array]:
                ids_BT = np.concatenate([self.staged.read(block, 1) for block in blocks])
                lengths_B = np.concatenate([self.staged.lengths(block, 1) for block in blocks])
                masks = None if masker is None else masker.masks(ids_BT, lengths_B, np.asarray(blocks))
                hidden_BTD = read_blocks(manifest, self.teacher, ids_BT, lengths_B, masks).read_BTD[: len(blocks)]
                bar.update(ids_BT.size)
                if manifest.masking is None or masks is None:
                    return hidden_BTD, lengths_B
                return kept_first(hidden_BTD, manifest.masking.kept(masks.selected_BT, lengths_B))

            return make_tables(manifest, self.teacher.head, hidden_of, self.source.prototypes)

    def shards(self, manifest: Manifest, todo: list[int]) -> None:
        """Capture the shards of ``todo``, here or on workers."""
        config = self.source.config
        with Progress(manifest.blocks, todo, quiet=self.quiet, events=self.events) as progress:
            if not todo:
                return
            if config.distributed:
                from pipeline.campaign import capture_on_workers

                capture_on_workers(self.source.files, config, manifest, self.staged, todo, progress)
                return
            tables = folder.read_tables(config.out, manifest)
            encoder = encoder_of(manifest, tables, self.teacher.device)
            progress.running(1)
            receipts = capture_shards(self.place, manifest, self.staged, self.teacher, encoder, todo, progress.read)
            for receipt in receipts:
                progress.committed(receipt.shard, receipt.num_bytes)


def description(source: Source) -> dict[str, bytes]:
    """The teacher's small files, as a cache keeps them."""
    return teacher_description(source.files, source.config.out / STAGING_NAME / "description")


def stage(source: Source, *, quiet: bool) -> StagedBlocks:
    """Tokenise the text into blocks beside the cache, or open those that an earlier run made."""
    config = source.config
    decides: dict[str, Any] = {
        "sources": [info.model_dump(mode="json") for info in source.corpus.sources],
        "tokenizer": source.tokenizer.model_dump(mode="json"),
        "settings": config.model_dump(
            mode="json", include={"text_field", "split", "block_tokens", "last_block", "limit_tokens"}
        ),
        "vocab_size": source.teacher.vocab_size,
    }
    masking = source.masking
    frame = None if masking is None else (masking.cls_token_id, masking.sep_token_id)
    if frame is not None:
        decides["frame"] = list(frame)
    staging = config.out / STAGING_NAME
    make_folder(staging)
    return stage_blocks(
        source.corpus,
        load_tokenizer(source.files),
        folder=staging,
        block_tokens=config.block_tokens,
        eos_token_id=source.tokenizer.eos_token_id,
        vocab_size=source.teacher.vocab_size,
        limit_tokens=config.limit_tokens,
        last_block=config.last_block,
        frame=frame,
        key=sha256_hex(canonical_json(decides)),
        quiet=quiet,
    )
