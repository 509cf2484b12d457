"""The Parquet files that an import reads, and whether those of an export of kdpipe are what they are declared to be.

In: files and folders that a user named. Out: paths and a name for each; or a refusal.
"""

from __future__ import annotations

import os
from pathlib import Path

from cache_spec.errors import BadInputError
from cache_spec.imported import TEMPERATURE
from pipeline.interop.index import INDEX_NAME, read_index


def parquet_files(sources: tuple[Path, ...]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Every file of ``sources`` in order, and its name: its path below its source; where two share one, below the
    folder that all sources lie in.

    Raises BadInputError ``no-text`` for a source without files, ``repeated-file`` for a file that is named twice.
    """
    paths: list[Path] = []
    names: list[str] = []
    for source in sources:
        found = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
        found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts)]
        if not all(path.is_file() for path in found) or not found:
            raise BadInputError("no-text", source, expected="a Parquet file, or a folder of them")
        paths += found
        names += [path.relative_to(source).as_posix() if path != source else path.name for path in found]
    resolved = [path.resolve() for path in paths]
    seen: dict[Path, Path] = {}
    for path, real in zip(paths, resolved, strict=True):
        if real in seen:
            hint = "name each file once"
            raise BadInputError("repeated-file", path, expected="another file", found=seen[real], hint=hint)
        seen[real] = path
    if len(set(names)) < len(names):
        absolute = [Path(os.path.abspath(path)) for path in paths]
        shared = Path(os.path.commonpath(absolute))
        names = [path.relative_to(shared).as_posix() for path in absolute]
    return tuple(paths), tuple(names)


def check_exports(paths: tuple[Path, ...], logprobs: str) -> None:
    """Refuse files of an export whose index tells that they are something else than what is declared.

    Raises BadInputError ``unfinished-export``, ``undeclared-temperature``, ``other-logprobs`` or ``broken-export``.
    """
    folders = {path.resolve().parent for path in paths}
    # An export has its rows in a folder below its index.
    places = {place / INDEX_NAME for folder in folders for place in (folder, folder.parent)}
    for index_path in sorted(place for place in places if place.is_file()):
        _check_index(index_path, logprobs)


def _check_index(index_path: Path, logprobs: str) -> None:
    index = read_index(index_path)
    if not index.finished:
        hint = "finish it with the command that began it"
        raise BadInputError("unfinished-export", index_path, expected="a finished export", hint=hint)
    temperature, declared = index.settings.get("temperature"), index.settings.get("logprobs")
    if temperature != TEMPERATURE:
        hint = f"export at --temperature {TEMPERATURE:g}: truncated values cannot be brought to another"
        expected, found = f"log-probabilities at temperature {TEMPERATURE:g}", f"temperature {temperature}"
        raise BadInputError("undeclared-temperature", index_path, expected=expected, found=found, hint=hint)
    if declared != logprobs:
        expected, hint = f"{logprobs} log-probabilities, as declared", f"--logprobs {declared}"
        raise BadInputError("other-logprobs", index_path, expected=expected, found=declared, hint=hint)
