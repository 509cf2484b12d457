"""Text to cache: resolve, stage blocks, run the teacher shard by shard, seal.

In: capture settings. Out: a finished cache folder. The state on disk is the truth: the same command run again, after
whatever happened, commits the shards that are missing and ends with the same arrays.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm

from cache_spec.commit import PUBLISH_LOCK, create_cache
from cache_spec.durable import TEMPORARY_PREFIX, make_folder, remove_leftovers, replace_file, writing
from cache_spec.errors import WouldLoseDataError
from cache_spec.layout import ARRAY_NAMES, array_specs, zarr_metadata
from cache_spec.manifest import (
    MANIFEST_NAME,
    Manifest,
    canonical_json,
    differences,
    sha256_hex,
)
from cache_spec.receipts import (
    RECEIPTS_FOLDER,
    SEAL_NAME,
    read_manifest,
    receipt_path,
    small_file_errors,
    whole_shards,
    write_seal,
)
from pipeline.blocks import StagedBlocks, stage_blocks
from pipeline.config import CaptureConfig
from pipeline.shard import capture_shard
from pipeline.source import Source, refuse_differences, resolve_source, staged_manifest
from pipeline.teacher import load_teacher
from pipeline.teacher_files import (
    TeacherFiles,
    load_tokenizer,
    save_teacher_description,
)

logger = logging.getLogger("kdpipe")

LOCK_NAME = ".lock"
STAGING_NAME = ".kdpipe-staging"
_OWN_FOLDERS = (*ARRAY_NAMES, RECEIPTS_FOLDER, "tokenizer", "teacher")


def capture(config: CaptureConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Make, or finish, the cache that ``config`` describes; returns its summary.

    Raises WouldLoseDataError if the folder holds another cache, other settings, or a capture that is running.
    """
    source = resolve_source(config)
    with exclusive(config.out):
        remove_leftovers([config.out, *(config.out / name for name in _OWN_FOLDERS)])
        existing = read_manifest(config.out) if (config.out / MANIFEST_NAME).exists() else None
        if existing is not None:
            refuse_differences(existing, source)
            _restore_small_files(source, existing)
            if (config.out / SEAL_NAME).exists() and not _missing_shards(config.out, existing):
                logger.info("%s is finished already: %d blocks", config.out, existing.blocks.num_blocks)
                shutil.rmtree(config.out / STAGING_NAME, ignore_errors=True)
                return summary(config.out, existing, captured=0)
        staged = _stage(source, quiet)
        manifest = staged_manifest(source, staged)
        if existing is None:
            # What a run killed before its manifest left may be of other settings; it is nobody's data yet.
            for name in _OWN_FOLDERS:
                shutil.rmtree(config.out / name, ignore_errors=True)
            files = _describe(source.files, config.out)
            manifest = create_cache(config.out, manifest.model_copy(update={"files": files}))
        elif existing.fingerprint != manifest.fingerprint:
            # The sources' digests are the same, so the tokenizer's library changed its mind.
            raise WouldLoseDataError("tokens-changed", config.out, found="; ".join(differences(existing, manifest)))
        else:
            manifest = existing
        todo = _missing_shards(config.out, manifest)
        with writing(config.out):
            for stale in [config.out / SEAL_NAME, *(receipt_path(config.out, shard) for shard in todo)]:
                stale.unlink(missing_ok=True)
        _run(source, manifest, staged, todo, quiet)
        write_seal(config.out, manifest)
        shutil.rmtree(config.out / STAGING_NAME, ignore_errors=True)
        return summary(config.out, manifest, captured=len(todo))


def _missing_shards(out: Path, manifest: Manifest) -> list[int]:
    """Shards still to be captured; a receipt whose files are gone or cut counts for nothing."""
    return sorted(set(range(manifest.blocks.num_shards)) - whole_shards(out, manifest))


def _restore_small_files(source: Source, manifest: Manifest) -> None:
    """Write missing or changed metadata, tokenizer and configuration again; refuse if they cannot be made the same."""
    out = source.config.out
    if next(small_file_errors(out, manifest), None) is None:
        return
    _describe(source.files, out)
    for path, data in zarr_metadata(manifest).items():
        make_folder((out / path).parent)
        replace_file(out / path, data)
    for error in small_file_errors(out, manifest):
        raise error


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Hold the cache folder for this process; refuse a folder in use, or one that holds something else."""
    if out.exists() and not out.is_dir():
        raise WouldLoseDataError("not-a-folder", out)
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    # A capture killed before its manifest leaves only what it writes before it, beside the staged blocks.
    ours = {LOCK_NAME, PUBLISH_LOCK, STAGING_NAME}
    if STAGING_NAME in names:
        ours |= {*_OWN_FOLDERS, "zarr.json"}
        ours |= {name for name in names if name.startswith(TEMPORARY_PREFIX)}
    foreign = names - ours
    if foreign and MANIFEST_NAME not in names:
        raise WouldLoseDataError("not-a-cache", out, expected="an empty folder or a cache", found=min(foreign))
    make_folder(out)
    lock = filelock.FileLock(out / LOCK_NAME)
    with writing(out):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            hint = "another process is writing it; wait for it, or stop it"
            raise WouldLoseDataError("cache-in-use", out, hint=hint) from None
    try:
        yield
    finally:
        lock.release()


def _describe(files: TeacherFiles, out: Path) -> dict[str, str]:
    """Put the tokenizer and the teacher's configuration into the cache; returns path to digest of each file."""
    folder = out / STAGING_NAME / "description"
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    with writing(folder):
        save_teacher_description(files, folder)
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        make_folder((out / name).parent)
        replace_file(out / name, data)
        digests[name] = sha256_hex(data)
    return digests


def _stage(source: Source, quiet: bool) -> StagedBlocks:
    config = source.config
    decides = {
        "sources": [info.model_dump(mode="json") for info in source.corpus.sources],
        "tokenizer": source.tokenizer.model_dump(mode="json"),
        "settings": config.model_dump(
            mode="json", include={"text_field", "split", "block_tokens", "last_block", "limit_tokens"}
        ),
        "vocab_size": source.teacher.vocab_size,
    }
    folder = config.out / STAGING_NAME
    make_folder(folder)
    return stage_blocks(
        source.corpus,
        load_tokenizer(source.files),
        folder=folder,
        block_tokens=config.block_tokens,
        eos_token_id=source.tokenizer.eos_token_id,
        vocab_size=source.teacher.vocab_size,
        limit_tokens=config.limit_tokens,
        last_block=config.last_block,
        key=sha256_hex(canonical_json(decides)),
        quiet=quiet,
    )


def _run(source: Source, manifest: Manifest, staged: StagedBlocks, todo: list[int], quiet: bool) -> None:
    """Capture the shards of ``todo``, here or on workers, behind one progress bar in tokens."""
    config, blocks = source.config, manifest.blocks
    total = blocks.num_blocks * blocks.block_tokens
    left = sum(blocks.shard_range(shard)[1] for shard in todo) * blocks.block_tokens
    with tqdm(
        total=total, initial=total - left, unit="tok", unit_scale=True, desc="teacher", disable=quiet or None
    ) as bar:
        if not todo:
            return
        if config.workers:
            from pipeline.workers import capture_on_workers

            capture_on_workers(source.files, config, manifest, staged, todo, bar.update)
            return
        teacher = load_teacher(source.files, device=config.device, dtype=config.dtype)
        for shard in todo:
            capture_shard(config.out, manifest, staged, teacher, shard, bar.update)


def summary(cache: Path, manifest: Manifest, *, captured: int) -> dict[str, Any]:
    """What a finished capture says for itself."""
    bytes_on_disk = sum(
        (cache / spec.shard_path(shard)).stat().st_size
        for spec in array_specs(manifest).values()
        for shard in range(manifest.blocks.num_shards)
    )
    return {
        "cache": str(cache),
        "fingerprint": manifest.fingerprint,
        "documents": manifest.corpus.num_documents,
        "tokens": manifest.corpus.num_tokens,
        "blocks": manifest.blocks.num_blocks,
        "shards": manifest.blocks.num_shards,
        "shards_captured_now": captured,
        "bytes": bytes_on_disk,
        "bytes_per_token": round(bytes_on_disk / manifest.corpus.num_tokens, 2),
    }
