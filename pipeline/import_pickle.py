"""``import-pickle``: a pickle of token ids becomes a folder of ids, once, and text for a capture from then on.

In: a pickle, a tokenizer. Out: a folder that ``pipeline.idfolder`` describes, and its figures.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cache_spec.durable import TEMPORARY_PREFIX, make_folder, remove_leftovers, writing
from cache_spec.errors import BadInputError, WouldLoseDataError
from pipeline.idfolder import HEADER_NAME, IdFolder, open_ids, write_ids
from pipeline.pickled import documents
from pipeline.teacher_files import load_tokenizer, tokenizer_files, tokenizer_sha256
from pipeline.textfiles import file_info

logger = logging.getLogger("kdpipe")


def import_ids(pickle: Path, out: Path, *, tokenizer: str, quiet: bool = False) -> dict[str, Any]:
    """Import a pickle into ``out``, or find that it was imported there before; returns the folder's header.

    Raises BadInputError ``bad-pickle``, ``vocabulary-mismatch``, ``no-text``, ``cannot-read``, and what the tokenizer
    raises; WouldLoseDataError ``other-ids`` or ``not-ids`` for a folder that holds something else.
    """
    loaded = load_tokenizer(tokenizer_files(tokenizer))
    source = file_info(pickle, pickle.name)
    about = {
        "tokenizer": {"name": Path(tokenizer).name, "sha256": tokenizer_sha256(loaded)},
        "source": source.model_dump(mode="json"),
    }
    existing = _existing(out)
    if existing is not None:
        if {name: existing.header[name] for name in about} != about:
            found = f"ids of {existing.header['source'].get('name')} by {existing.tokenizer_name}"
            raise WouldLoseDataError("other-ids", out, found=found, hint="give another --out")
        logger.info("%s is imported already: nothing to do", out)
        return _facts(existing)
    make_folder(out)
    remove_leftovers([out])
    with tqdm(unit="tok", unit_scale=True, desc="import", disable=quiet or None) as bar:
        folder = write_ids(
            out,
            documents(pickle),
            vocab_size=max(loaded.get_vocab().values()) + 1,
            about=about,
            on_document=bar.update,
        )
    return _facts(folder)


def _existing(out: Path) -> IdFolder | None:
    """The ids that an earlier import finished in ``out``."""
    with writing(out):
        if out.exists() and not out.is_dir():
            raise WouldLoseDataError("not-ids", out, expected="a new or empty folder", found="a file")
        names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if HEADER_NAME in names:
        return open_ids(out)
    # Of an import that was interrupted, only the data may lie there: they are made again.
    foreign = [name for name in names if name != "ids.parquet" and not name.startswith(TEMPORARY_PREFIX)]
    if foreign:
        hint = "give another --out"
        raise WouldLoseDataError("not-ids", out, expected="a new or empty folder", found=foreign[0], hint=hint)
    return None


def _facts(folder: IdFolder) -> dict[str, Any]:
    if not folder.header["num_tokens"]:
        raise BadInputError("no-text", folder.folder, expected="at least one token", found="none")
    return {"out": str(folder.folder), **folder.header}
