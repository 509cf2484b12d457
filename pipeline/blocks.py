"""Documents to blocks: tokenised, joined by EOS, packed densely, and staged on disk as one flat file of ids.

In: a corpus and a tokenizer. Out: ``blocks-KEY.bin``, the ids of all blocks one after another (little-endian), and
``blocks-KEY.json``, which is written last: ids without it do not count. A run that finds both goes on from there.

With a frame, for masked language models, every block begins and ends with a token of its own, inside its T tokens, and
beside the ids lies how often each of them occurs.

B blocks in a batch, T tokens a block, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from array import array
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cache_spec.durable import TEMPORARY_PREFIX, make_folder, replace_file, sync_folder, writing
from cache_spec.errors import BadInputError
from pipeline.corpus import Corpus
from pipeline.token_stream import Frame, token_stream, vocabulary_mismatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("kdpipe")

LastBlock = Literal["drop", "keep", "each"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedBlocks:
    """The packed blocks of a corpus on disk; opens nothing until it is read, so it travels between processes."""

    path: Path
    """The file of ids."""
    key: str
    """Digest of everything that decides the ids."""
    num_blocks: int
    """N"""
    block_tokens: int
    """T"""
    last_block_tokens: int
    """Real tokens in the last block; T unless it is a kept partial one, which is padded with EOS."""
    num_documents: int
    """Documents with at least one token in the blocks."""
    num_tokens: int
    """Real tokens in the blocks, document ends included, padding not."""
    tokens_sha256: str
    """SHA-256 over every id of every block as little-endian uint32, whatever dtype they are stored in."""
    dtype: str
    """Little-endian dtype of the stored ids: ``<u2`` or ``<u4``."""
    by_document: bool = False
    """Whether each document begins a block; the lengths of all blocks then lie beside the ids, little-endian uint32."""
    framed: bool = False
    """Whether blocks have a frame; the counts of all ids then lie beside them, little-endian int64 [V]."""

    def read(self, first: int, count: int) -> NDArray[np.unsignedinteger[Any]]:
        """Blocks ``first`` to ``first + count - 1`` as a fresh array [count, T] of uint16 or uint32."""
        assert 0 <= first <= first + count <= self.num_blocks, (first, count, self.num_blocks)
        dtype = np.dtype(self.dtype)
        num_ids = count * self.block_tokens
        try:
            offset = first * self.block_tokens * dtype.itemsize
            ids = np.fromfile(self.path, dtype=dtype, count=num_ids, offset=offset)
        except OSError as error:
            raise BadInputError("cannot-read", self.path, found=error.strerror) from error
        if ids.size != num_ids:
            raise BadInputError("broken-file", self.path, expected=f"{num_ids} ids", found=f"{ids.size}")
        return ids.reshape(count, self.block_tokens)

    def lengths(self, first: int, count: int) -> NDArray[np.uint32]:
        """Real tokens of blocks ``first`` to ``first + count - 1`` as an array [count] of uint32."""
        assert 0 <= first <= first + count <= self.num_blocks, (first, count, self.num_blocks)
        if self.by_document:
            lengths_B = np.fromfile(lengths_path(self.path), dtype="<u4", count=count, offset=4 * first)
            if lengths_B.size != count:
                raise BadInputError("broken-file", lengths_path(self.path), expected=f"{count} lengths")
            return lengths_B.astype(np.uint32)
        lengths_B = np.full(count, self.block_tokens, dtype=np.uint32)
        if count and first + count == self.num_blocks:
            lengths_B[-1] = self.last_block_tokens
        return lengths_B

    def counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each id occurs in blocks that have a frame, padding left out: int64 [V]."""
        counts_V = np.fromfile(counts_path(self.path), dtype="<i8")
        if counts_V.size != vocab_size:
            raise BadInputError("broken-file", counts_path(self.path), expected=f"{vocab_size} counts")
        return counts_V.astype(np.int64)


def stage_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    block_tokens: int,
    eos_token_id: int,
    vocab_size: int,
    limit_tokens: int | None = None,
    last_block: LastBlock = "drop",
    frame: Frame | None = None,
    key: str,
    quiet: bool = False,
) -> StagedBlocks:
    """Pack the corpus into blocks of ``block_tokens`` ids on disk, or open them where an earlier run finished this.

    The stream is every document's tokens and one EOS after each; ``limit_tokens`` takes exactly its first tokens.
    The last partial block is dropped, or kept and padded with EOS; with ``each``, so is that of every document, and the
    next one begins a block of its own (documents of ids are then taken as they are, whatever they end with). A
    ``frame`` stands around each block's part of the stream; one that documents of ids bring along is taken off first,
    and with ``each`` documents end with the frame alone. ``key`` must change with everything that decides the ids. One
    process at a time may stage into ``folder``: leftovers of killed runs are removed.
    Raises ``vocabulary-mismatch`` for an id outside [0, vocab_size), ``too-little-text``, ``cannot-write``.
    """
    for name, value in (("block_tokens", block_tokens), ("limit_tokens", limit_tokens)):
        if value is not None and value < 1:
            raise BadInputError("bad-setting", name, expected="at least 1", found=value)
    if not 0 <= eos_token_id < vocab_size:
        raise vocabulary_mismatch("the EOS token", eos_token_id, vocab_size)
    make_folder(folder)
    ids_path, facts_path = _paths(folder, key)
    with writing(folder):
        for leftover in folder.glob(f"{TEMPORARY_PREFIX}blocks-*"):
            leftover.unlink()
    staged = _open(folder, key)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    if staged and (staged.block_tokens, staged.dtype) == (block_tokens, dtype):
        logger.info("blocks: reusing %d blocks of %d tokens", staged.num_blocks, staged.block_tokens)
        return staged
    with writing(facts_path):
        # The facts go first, so that they never stand beside ids that they do not describe.
        facts_path.unlink(missing_ok=True)
        ids_path.unlink(missing_ok=True)

    # disable=None: silent where nobody looks, such as a log file.
    bar = tqdm(total=limit_tokens, desc="tokens", unit="tok", unit_scale=True, disable=True if quiet else None)
    ends = last_block != "each"
    with bar, _BlockFile(ids_path, block_tokens, dtype, eos_token_id, last_block, frame, vocab_size) as file:
        for ids, starts in token_stream(corpus, tokenizer, eos_token_id, vocab_size, ends=ends, frame=frame):
            taken = ids if limit_tokens is None else ids[: limit_tokens - file.num_seen]
            file.add(taken, starts)
            bar.update(len(taken))
            if file.num_seen == limit_tokens:
                break
        staged = file.finish(key)
    replace_file(facts_path, (json.dumps(_facts(staged), indent=1) + "\n").encode())
    return staged


def open_staged(folder: Path, key: str) -> StagedBlocks:
    """Open blocks that ``stage_blocks`` finished in ``folder``; raises ``missing-blocks``."""
    staged = _open(folder, key)
    if staged is None:
        raise BadInputError("missing-blocks", _paths(folder, key)[0], expected="blocks that were staged before")
    return staged


def _open(folder: Path, key: str) -> StagedBlocks | None:
    ids_path, facts_path = _paths(folder, key)
    try:
        facts = json.loads(facts_path.read_bytes())
        staged = StagedBlocks(path=ids_path, **facts)
        num_bytes = staged.num_blocks * staged.block_tokens * np.dtype(staged.dtype).itemsize
        whole = staged.key == key and ids_path.stat().st_size == num_bytes
        whole = whole and (not staged.by_document or lengths_path(ids_path).stat().st_size == 4 * staged.num_blocks)
        whole = whole and (not staged.framed or counts_path(ids_path).is_file())
    except (OSError, ValueError, TypeError):
        return None
    return staged if whole else None


def lengths_path(path: Path) -> Path:
    """Where the lengths of blocks lie, given where their ids do."""
    return path.with_suffix(".lengths")


def counts_path(path: Path) -> Path:
    """Where the counts of ids lie, given where the ids do."""
    return path.with_suffix(".counts")


def _paths(folder: Path, key: str) -> tuple[Path, Path]:
    return folder / f"blocks-{key[:16]}.bin", folder / f"blocks-{key[:16]}.json"


def _facts(staged: StagedBlocks) -> dict[str, object]:
    return {name: value for name, value in asdict(staged).items() if name != "path"}


class _BlockFile:
    """Ids on their way to disk: takes any number at a time, writes whole blocks, and counts what it wrote."""

    def __init__(
        self,
        path: Path,
        block_tokens: int,
        dtype: str,
        eos_token_id: int,
        last_block: LastBlock,
        frame: Frame | None,
        vocab_size: int,
    ) -> None:
        self.path = path
        self.block_tokens = block_tokens
        self.frame = frame
        self.frame_tokens = 0 if frame is None else len(frame)
        self.stream_tokens = block_tokens - self.frame_tokens
        """Of the stream in a block."""
        self.counts_V = np.zeros(vocab_size, dtype=np.int64)
        self.dtype = np.dtype(dtype)
        self.eos_token_id = eos_token_id
        self.last_block = last_block
        self.lengths = array("I")
        self.temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
        self.digest = hashlib.sha256()
        self.pending = np.empty(0, dtype=np.int64)
        self.starts: deque[int] = deque()
        # Of the stream, without frames.
        self.num_seen = self.num_written = self.num_documents = 0

    def __enter__(self) -> _BlockFile:
        with writing(self.path):
            self.file = open(self.temporary, "xb")
        return self

    def __exit__(self, *_: object) -> None:
        # After a failed write, closing flushes and fails once more; the first error is the one to show.
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def add(self, ids: NDArray[np.int64], starts: Iterable[int]) -> None:
        """Append ids; ``starts`` are the places among them where documents start."""
        starts = [start for start in starts if start < len(ids)]
        self.starts.extend(self.num_seen + start for start in starts)
        self.num_seen += len(ids)
        first, *documents = np.split(ids, starts if self.last_block == "each" else [])
        self._add(first)
        for document in documents:
            self._pad()
            self._add(document)

    def _add(self, ids: NDArray[np.int64]) -> None:
        self.pending = np.concatenate([self.pending, ids])
        num_whole = len(self.pending) // self.stream_tokens * self.stream_tokens
        self._write(self.pending[:num_whole], num_whole)
        self.pending = self.pending[num_whole:]

    def _pad(self) -> None:
        """Write what is pending as a block that is padded with EOS."""
        if num_left := len(self.pending):
            padding = np.full(self.stream_tokens - num_left, self.eos_token_id, dtype=np.int64)
            self._write(np.concatenate([self.pending, padding]), num_left)
            self.pending = self.pending[:0]

    def _write(self, ids: NDArray[np.int64], num_real: int) -> None:
        """Write whole blocks' parts of the stream, the first ``num_real`` tokens of them real."""
        num_blocks = len(ids) // self.stream_tokens
        if self.frame is not None:
            ids = self._framed(ids.reshape(num_blocks, self.stream_tokens), self.frame, num_real)
        with writing(self.path):
            self.file.write(ids.astype(self.dtype).tobytes())
        self.digest.update(ids.astype("<u4").tobytes())
        if self.last_block == "each":
            self.lengths.extend([min(num_real, self.stream_tokens) + self.frame_tokens] * num_blocks)
        self.num_written += num_real
        while self.starts and self.starts[0] < self.num_written:
            self.starts.popleft()
            self.num_documents += 1

    def _framed(self, stream_BS: NDArray[np.int64], frame: Frame, num_real: int) -> NDArray[np.int64]:
        num_blocks, size = stream_BS.shape
        ids_BT = np.full((num_blocks, self.block_tokens), self.eos_token_id, dtype=np.int64)
        ids_BT[:, 0], ids_BT[:, 1:-1] = frame[0], stream_BS
        # A block is written in part only where it is written alone.
        last = min(num_real, size) + 1
        ids_BT[:, last] = frame[1]
        self.counts_V += np.bincount(ids_BT[:, : last + 1].reshape(-1), minlength=len(self.counts_V))
        return ids_BT.reshape(-1)

    def finish(self, key: str) -> StagedBlocks:
        """Deal with the last partial block and give the file its name, durably."""
        block_tokens, stream_tokens, num_left = self.block_tokens, self.stream_tokens, len(self.pending)
        if self.last_block != "drop" and num_left:
            self._pad()
            logger.info("blocks: kept the last block with %d of %d tokens, padded with EOS", num_left, block_tokens)
        elif num_left and self.num_written:
            logger.info("blocks: dropped the last %d tokens, less than a block of %d", num_left, block_tokens)
        if not self.num_written:
            hint = "give more text, keep the last partial block with --last-block keep, or make blocks shorter"
            expected = f"at least one block of {block_tokens} tokens"
            raise BadInputError(
                "too-little-text", "the corpus", expected=expected, found=f"{num_left} tokens", hint=hint
            )
        by_document = self.last_block == "each"
        if by_document:
            replace_file(lengths_path(self.path), np.asarray(self.lengths, dtype="<u4").tobytes())
        if self.frame is not None:
            replace_file(counts_path(self.path), self.counts_V.astype("<i8").tobytes())
        with writing(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            os.replace(self.temporary, self.path)
            sync_folder(self.path.parent)
        num_blocks = len(self.lengths) if by_document else -(-self.num_written // stream_tokens)
        last_tokens = self.num_written - (num_blocks - 1) * stream_tokens + self.frame_tokens
        last_tokens = self.lengths[-1] if by_document else last_tokens
        logger.info("blocks: %d of %d tokens, %d documents", num_blocks, block_tokens, self.num_documents)
        return StagedBlocks(
            path=self.path,
            key=key,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            last_block_tokens=last_tokens,
            num_documents=self.num_documents,
            num_tokens=self.num_written + num_blocks * self.frame_tokens,
            tokens_sha256=self.digest.hexdigest(),
            dtype=self.dtype.str,
            by_document=by_document,
            framed=self.frame is not None,
        )
