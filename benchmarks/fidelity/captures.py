"""Captures: the teacher's last hidden states on three parts of a text, and the caches that are made from them.

In: a teacher and a text, or a folder with the three ``hidden`` caches. Out: opened captures, cut to a size if asked
for, and encoded caches, each made by ``kdpipe transcode`` once and found again by the next run.

Legend of axes: B blocks.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from benchmarks.fidelity.configurations import Configuration
from cache_spec.commit import commit_shard, create_cache, tokens_digest
from cache_spec.errors import BadInputError, KdpipeError
from cache_spec.layout import array_specs, target_arrays
from cache_spec.reader import CacheReader
from cache_spec.receipts import read_receipt, write_seal
from pipeline.cli import run

logger = logging.getLogger("kdpipe")

CALIBRATION, TRAIN, HELD_OUT = "calibration", "train", "held-out"
PARTS = (CALIBRATION, TRAIN, HELD_OUT)
_EMPTY_DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The three parts of one capture, on disjoint documents, and where caches made from them are kept."""

    parts: dict[str, CacheReader]
    work: Path

    @property
    def held_out(self) -> CacheReader:
        """What everything is measured on."""
        return self.parts[HELD_OUT]


def kdpipe(*arguments: object) -> None:
    """Run one command of the product as a user would, silently; KdpipeError unless it succeeds."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = run([*map(str, arguments), "--json"])
    if code:
        raise KdpipeError("command-failed", " ".join(map(str, arguments)), found=f"exit code {code}")


def make_capture(teacher: str, text: Path, out: Path, tokens: dict[str, int], flags: list[str]) -> dict[str, Any]:
    """Split the documents of a JSON-lines file among the parts and run the teacher over each; returns an account.

    Documents are dealt in proportion to the parts' tokens, so that each part holds others, spread over the file.
    """
    documents = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    total = sum(tokens.values())
    owed = dict.fromkeys(PARTS, 0.0)
    dealt: dict[str, list[str]] = {part: [] for part in PARTS}
    for document in documents:
        for part in PARTS:
            owed[part] += tokens[part] / total
        part = max(PARTS, key=lambda part: owed[part])
        owed[part] -= 1
        dealt[part].append(document)
    account: dict[str, Any] = {"teacher": teacher, "documents": {}}
    texts = out / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        path = texts / f"{part}.jsonl"
        path.write_text("".join(document + "\n" for document in dealt[part]), encoding="utf-8")
        kdpipe(
            *("cache-teacher", "--encoding", "hidden", "--hidden-window", 0, "--teacher", teacher),
            *("--text", path, "--limit-tokens", tokens[part], "--out", out / part, *flags),
        )
        account["documents"][part] = len(dealt[part])
    return account


def open_capture(folder: Path, work: Path, limits: dict[str, int]) -> Capture:
    """Open the three parts, cut to at most so many tokens each; BadInputError for anything but ``hidden`` caches."""
    parts = {}
    for part in PARTS:
        reader = CacheReader.open(folder / part)
        if reader.manifest.encoding.name != "hidden":
            found = reader.manifest.encoding.name
            raise BadInputError("not-a-capture", folder / part, expected="encoding hidden", found=found)
        blocks = reader.manifest.blocks
        num_blocks = max(1, limits[part] // blocks.block_tokens) if part in limits else blocks.num_blocks
        if num_blocks < blocks.num_blocks:
            path = work / "captures" / f"{part}-{reader.manifest.fingerprint[:12]}-{num_blocks}"
            reader = cut(reader, num_blocks, path)
        parts[part] = reader
    return Capture(parts=parts, work=work)


def cut(source: CacheReader, num_blocks: int, out: Path) -> CacheReader:
    """A cache of some evenly spaced blocks of another; found again where it has been made."""
    with _making(out) as made:
        if made:
            return CacheReader.open(out)
        manifest = source.manifest
        blocks = np.linspace(0, manifest.blocks.num_blocks, num_blocks, endpoint=False).astype(np.int64)
        lengths_B = source.lengths(blocks).astype(np.int64)
        facts = {"num_tokens": int(lengths_B.sum()), "tokens_sha256": tokens_digest(source.read("input_ids", blocks))}
        small = {path: digest for path, digest in manifest.files.items() if not path.endswith("zarr.json")}
        for path in small:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / path, out / path)
        manifest = create_cache(
            out,
            manifest.model_copy(
                update={
                    "corpus": manifest.corpus.model_copy(update=facts),
                    "blocks": manifest.blocks.model_copy(update={"num_blocks": num_blocks, "limit_tokens": None}),
                    "files": small,
                }
            ),
            {name: source.table(name) for name in manifest.tables},
        )
        for shard in range(manifest.blocks.num_shards):
            first, count = manifest.blocks.shard_range(shard)
            rows = {name: source.read(name, blocks[first : first + count]) for name in array_specs(manifest)}
            commit_shard(out, manifest, shard, rows)
        write_seal(out, manifest)
    return CacheReader.open(out)


def encoded(capture: Capture, part: str, configuration: Configuration) -> CacheReader:
    """A part in another encoding; what is learnt, held-out text takes from the calibration part."""
    source = capture.parts[part]
    out = capture.work / "caches" / f"{configuration.cache_name}-{part}-{source.manifest.fingerprint[:12]}"
    learnt: list[object] = []
    if part == HELD_OUT and configuration.encoding == "prototype":
        learnt = ["--prototypes-from", encoded(capture, CALIBRATION, configuration).path]
    with _making(out) as made:
        if not made:
            logger.info("%s: %s", configuration.name, part)
            grid = ",".join(f"{temperature:g}" for temperature in configuration.temperatures)
            kdpipe("transcode", source.path, "--out", out, *configuration.flags, "--temperatures", grid, *learnt)
    return CacheReader.open(out)


@contextlib.contextmanager
def _making(out: Path) -> Iterator[bool]:
    """Hold a folder while it is made; gives whether it is there already. What a killed run left is thrown away."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out.with_name(f"{out.name}.lock")):
        made = (out / "seal.json").exists()
        if not made:
            shutil.rmtree(out, ignore_errors=True)
        yield made


def disk_bytes(reader: CacheReader) -> dict[str, Any]:
    """Bytes a token of the arrays that hold targets, from the sizes of their files, and all bytes of the tables."""
    manifest = reader.manifest
    num_bytes = dict.fromkeys(target_arrays(manifest), 0)
    others = 0
    for shard in range(manifest.blocks.num_shards):
        receipt = read_receipt(reader.path, manifest, shard)
        assert receipt is not None
        for name, file in receipt.files.items():
            if name in num_bytes:
                num_bytes[name] += file.num_bytes
            else:
                others += file.num_bytes
    num_tokens = manifest.corpus.num_tokens
    tables = sum(
        path.stat().st_size for name in manifest.tables for path in (reader.path / name).iterdir() if path.is_file()
    )
    return {
        "bytes_per_token": sum(num_bytes.values()) / num_tokens,
        "bytes_per_token_by_array": {name: size / num_tokens for name, size in num_bytes.items()},
        "other_arrays_bytes_per_token": others / num_tokens,
        "table_bytes": tables,
        "table_bytes_per_token_of_100M": tables / 1e8,
    }


def write_json(path: Path, value: object) -> None:
    """One JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
