"""Text to documents: local files, folders, globs, the built-in Python documentation, and hub data sets.

In: what the user names as text. Out: a ``Corpus``: the digests of its sources, and a stream of documents, each a
stream of text pieces. Memory depends on the longest record of a file, never on the number of records or files;
plain text files, which are one document each, are read piece by piece whatever their size.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, takewhile
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from cache_spec.manifest import SourceInfo
from pipeline.idfolder import HEADER_NAME, IdFolder, open_ids
from pipeline.textfiles import READERS, Ids, Record, file_info, reader_of, text_of

if TYPE_CHECKING:
    from pipeline.demo_text import Split

logger = logging.getLogger("kdpipe")

PIECE_CHARS = 1 << 16
HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
PYTHON_DOCS = "python-docs"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file or data set: how to digest it and how to read it, each from its start at every call."""

    info: Callable[[], SourceInfo]
    records: Callable[[], Iterator[Record]]
    ids: IdFolder | None = None
    """What is known of the tokenizer, where the records are token ids."""


@dataclass(frozen=True)
class Corpus:
    """Text that was found and can be read as often as needed."""

    origins: tuple[Source, ...]

    @cached_property
    def sources(self) -> tuple[SourceInfo, ...]:
        """Name, size and SHA-256 of each source; reads every local file once, at the first use."""
        return tuple(origin.info() for origin in self.origins)

    def refuse_other_tokenizer(self, sha256: str) -> None:
        """BadInputError ``other-tokenizer`` where ids were made with another tokenizer than the one of this digest."""
        for origin in self.origins:
            if origin.ids is not None and origin.ids.tokenizer_sha256 != sha256:
                raise BadInputError(
                    "other-tokenizer",
                    origin.ids.folder,
                    expected=f"ids of the teacher's tokenizer, {sha256[:16]}",
                    found=f"those of {origin.ids.tokenizer_name}, {origin.ids.tokenizer_sha256[:16]}",
                    hint="import the pickle again with --tokenizer set to the teacher",
                )

    def documents(self) -> Iterator[Iterable[str] | Ids]:
        """Stream the documents, each as pieces that ``pieces`` cut or as ids; blank and null ones are logged.

        Read one document's pieces before asking for the next. Raises ``BadInputError`` for text that cannot be
        read, and ``no-text`` where nothing but white space was found.
        """
        num_documents = num_blank = num_null = 0
        for origin in self.origins:
            for _, text in origin.records():
                if text is None:
                    num_null += 1
                elif isinstance(text, np.ndarray):
                    num_blank += not text.size
                    num_documents += bool(text.size)
                    if text.size:
                        yield text
                elif (document := _unless_blank(pieces(text))) is None:
                    num_blank += 1
                else:
                    num_documents += 1
                    yield document
        skipped = f"{num_blank} documents of only white space and {num_null} without text"
        if num_blank or num_null:
            logger.info("text: %d documents; skipped %s", num_documents, skipped)
        if not num_documents:
            raise BadInputError("no-text", "the corpus", expected="at least one document", found=skipped)


def resolve(texts: Sequence[str], *, text_field: str = "text", split: str = "train") -> Corpus:
    """Find each text without reading it; only a name that is no path, and may be a hub name, is looked up online.

    A text is a file (.jsonl, .json with one object a line, .parquet, .txt; each also .gz or .zst), a folder, a
    glob, a folder of ``Dataset.save_to_disk`` or of ``import-pickle``, ``python-docs:train``, ``python-docs:heldout``,
    or a hub data set as ``name`` or ``name:config``, each also at a revision: ``name@revision``. Raises
    ``unknown-text``, ``unsupported-text``, ``bad-file-name``, ``bad-ids`` or ``no-text``.
    """
    origins = tuple(origin for text in texts for origin in _find(text, text_field, split))
    if not origins:
        raise BadInputError("no-text", "the corpus", expected="at least one text", found="none")
    return Corpus(origins)


def pieces(chunks: Iterable[str], max_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Re-cut a document's text into pieces of at most ``max_chars`` that join to the same text.

    A cut lies before a single space between two visible characters; where a window has none, after a single newline
    between two. Byte-level BPE with the pre-tokenisers of GPT-2, Llama 3, Qwen and their relatives splits at exactly
    these places, so the pieces' tokens are the whole text's. A window with neither, a tokenizer that puts a mark
    before every text, or one that merges across words, may change a few tokens at a cut.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > max_chars:
            end = _last_cut(held, start, start + max_chars)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _last_cut(text: str, start: int, end: int) -> int:
    for mark, num_before in ((" ", 0), ("\n", 1)):
        at = text.rfind(mark, start + 1, end)
        while at > start:
            if not (text[at - 1].isspace() or text[at + 1].isspace()):
                return at + num_before
            at = text.rfind(mark, start + 1, at)
    return end


def _unless_blank(document: Iterator[str]) -> Iterable[str] | None:
    leading: list[str] = []
    for piece in document:
        leading.append(piece)
        if not piece.isspace():
            return chain(leading, document)
    return None


def _find(text: str, text_field: str, split: str) -> Iterator[Source]:
    path = Path(text)
    # These say no to what cannot be a path, a name too long among others, where pathlib raises.
    exists = os.path.exists(path)
    if text.partition(":")[0] == PYTHON_DOCS and not exists:
        yield _python_docs(text)
    elif os.path.isdir(path):
        yield from _folder(path, text_field, split)
    elif exists:
        yield _file(path, path.name, text_field)
    elif glob.has_magic(text):
        yield from _matches(text, text_field)
    elif HUB_NAME.fullmatch(text) and not reader_of(path):
        yield _hub(text, text_field, split)
    else:
        raise _unknown(text, "no such file or folder")


def _unknown(text: str, found: str) -> BadInputError:
    hint = "give a file, folder, glob, python-docs:train, or the name of a data set that can be fetched"
    return BadInputError("unknown-text", text, found=found, hint=hint)


def _file(path: Path, name: str, text_field: str) -> Source:
    reader = reader_of(path)
    _check_name(path, name)
    if reader is None:
        expected = "one of " + ", ".join(READERS) + ", each also .gz or .zst"
        raise BadInputError("unsupported-text", path, expected=expected, found=path.suffix or "no suffix")
    if path.is_file() and not path.stat().st_size:
        raise BadInputError("no-text", path, found="an empty file")
    return Source(info=partial(file_info, path, name), records=partial(reader, path, text_field))


def _check_name(path: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise BadInputError("bad-file-name", shown, expected="a name in UTF-8", hint="rename the file") from None


def _folder(folder: Path, text_field: str, split: str) -> Iterator[Source]:
    if (folder / HEADER_NAME).is_file():
        _check_name(folder, folder.name)
        ids = open_ids(folder)
        yield Source(info=ids.info, records=ids.records, ids=ids)
        return
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split / "state.json").is_file():
            splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
            raise BadInputError("unknown-text", folder, expected=f"a split {split!r}", found=splits or "no split")
        folder = folder / split
    if (folder / "state.json").is_file():
        _check_name(folder, folder.name)
        records = partial(_saved_rows, folder, text_field)
        yield Source(info=partial(_saved_info, folder), records=records)
        return
    files = [path for path in sorted(folder.rglob("*")) if _is_text(path, path.relative_to(folder))]
    num_empty = 0
    for path in files:
        if path.stat().st_size:
            yield _file(path, path.relative_to(folder).as_posix(), text_field)
        else:
            num_empty += 1
    if num_empty == len(files):
        found = f"{num_empty} empty files" if files else "no text file"
        raise BadInputError("no-text", folder, expected="files " + ", ".join(READERS), found=found)
    if num_empty:
        logger.info("text: skipped %d empty files in %s", num_empty, folder)


def _is_text(path: Path, name: PurePath) -> bool:
    return not any(part.startswith(".") for part in name.parts) and path.is_file() and reader_of(path) is not None


def _matches(pattern: str, text_field: str) -> Iterator[Source]:
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if not Path(match).is_dir()]
    if not paths:
        raise BadInputError("no-text", pattern, expected="at least one matching file", found="none")
    root = Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parent.parts))
    for path in paths:
        yield _file(path, path.relative_to(root).as_posix(), text_field)


def _saved_info(folder: Path) -> SourceInfo:
    digest, num_bytes = hashlib.sha256(), 0
    for path in sorted(folder.iterdir()):
        if path.suffix == ".arrow" or path.name == "state.json":
            info = file_info(path, path.name)
            digest.update(f"{info.name}\0{info.sha256}\n".encode())
            num_bytes += info.num_bytes
    return SourceInfo(name=folder.name, num_bytes=num_bytes, sha256=digest.hexdigest())


def _python_docs(text: str) -> Source:
    split = text.partition(":")[2]
    if split not in ("train", "heldout"):
        raise _unknown(text, f"no such part of {PYTHON_DOCS}")
    part = cast("Split", split)
    return Source(info=partial(_python_docs_info, part), records=partial(_python_docs_records, part))


def _python_docs_records(split: Split) -> Iterator[Record]:
    from pipeline.demo_text import python_docs

    for name, text in python_docs(split):
        yield f"{PYTHON_DOCS}:{split}, {name}", (text,)


def _python_docs_info(split: Split) -> SourceInfo:
    digest, num_bytes = hashlib.sha256(), 0
    for _, chunks in _python_docs_records(split):
        data = "".join(chunks or ()).encode()
        digest.update(data + b"\0")
        num_bytes += len(data)
    return SourceInfo(name=f"{PYTHON_DOCS}:{split}", num_bytes=num_bytes, sha256=digest.hexdigest())


def _saved_rows(folder: Path, text_field: str) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise BadInputError("broken-file", folder, expected="a saved data set", found=first_line(error)) from error
    return _rows(rows, str(folder), text_field)


def _hub(text: str, text_field: str, split: str) -> Source:
    """A hub data set pinned to the commit that its name stands for now, or the local cache's copy when offline.

    Its digest covers name, configuration, split and commit, whether the user named the commit or the hub did; its size
    in bytes is not known and stands as 0.
    """
    import datasets

    match = HUB_NAME.fullmatch(text)
    assert match is not None
    name, config, revision = match.groups()
    commit = revision if revision and COMMIT.fullmatch(revision) else _commit(text, name, revision)
    try:
        # Streaming reads the hub and nothing else; a copy in the cache is on disk already.
        streaming = commit is not None
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming, revision=commit)
    except Exception as error:
        raise _unknown(f"{text}, split {split}", first_line(error)) from error
    plain = text.partition("@")[0]
    if commit is not None and commit != revision:
        logger.info("data set %s at commit %s; pin it with %s@%s", plain, commit, plain, commit)
    facts = f"{plain}\n{split}\n{commit or rows._fingerprint}"
    digest = hashlib.sha256(facts.encode()).hexdigest()
    info = SourceInfo(name=f"{plain}, split {split}", num_bytes=0, sha256=digest)
    return Source(info=lambda: info, records=partial(_rows, rows, plain, text_field))


def _commit(text: str, name: str, revision: str | None) -> str | None:
    """The commit that the hub says a revision is; None for the cache's copy where the hub cannot be reached."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except RevisionNotFoundError as error:
        raise _unknown(text, f"no revision {revision}") from error
    except (RepositoryNotFoundError, ValueError) as error:
        raise _unknown(text, "neither a file here nor a data set on the hub") from error
    except Exception as error:  # which errors mean "not reachable" changes with the client's HTTP library
        owner, slash, last = name.rpartition("/")
        cached = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}{'___' * len(slash)}{camelcase_to_snakecase(last)}"
        # The cache does not say which revision its copy is of.
        if revision is not None or not cached.is_dir():
            raise _unknown(text, "no such file, and the hub cannot be reached") from error
        return None


def _rows(rows: Any, name: str, text_field: str) -> Iterator[Record]:
    iterator = iter(rows)
    number = 0
    while True:
        number += 1
        place = f"{name}, row {number}"
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a stream can fail in as many ways as there are formats and networks
            raise BadInputError("cannot-read", place, found=first_line(error)) from error
        yield place, text_of(row, text_field, place)
