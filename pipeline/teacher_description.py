"""The small files of a cache that tell what its teacher is: configs, tokenizer, declared terms; no weights.

In: a teacher's files. Out: their description, the same bytes wherever the files lie.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cache_spec.durable import make_folder, writing
from pipeline.teacher_card import declared
from pipeline.teacher_files import TeacherFiles, generation_settings, load_config, load_tokenizer, quiet_transformers

# Where a file lay and which library read it is no part of what the model is.
_NOT_CONFIG = {
    "_name_or_path",
    "name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "quantization_config",
    "gguf_file",
}
_NOT_TOKENIZER = {
    *_NOT_CONFIG,
    "is_local",
    "local_files_only",
    "_commit_hash",
    "vocab_file",
    "merges_file",
    "tokenizer_file",
}


def teacher_description(files: TeacherFiles, scratch: Path) -> dict[str, bytes]:
    """The tokenizer's files and the teacher's configuration, as a cache keeps them: path to content.

    They are made in ``scratch``, a folder for nothing else.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    make_folder(scratch)
    with writing(scratch):
        save_teacher_description(files, scratch)
    return {
        path.relative_to(scratch).as_posix(): path.read_bytes() for path in sorted(scratch.rglob("*")) if path.is_file()
    }


def save_teacher_description(files: TeacherFiles, folder: Path) -> None:
    """Write ``teacher/config.json`` (and generation_config.json) and ``tokenizer/`` below ``folder``, no weights.

    The same teacher gives the same bytes, wherever its files lie.
    """
    save_config(files, folder)
    save_tokenizer(files, folder)


def save_config(files: TeacherFiles, folder: Path) -> None:
    """Write ``teacher/config.json``, below ``folder``, generation_config.json where there is one, and as ``card.json``
    what the teacher's card declares of its terms."""
    target = folder / "teacher"
    target.mkdir(parents=True, exist_ok=True)
    _write_json(target / "config.json", _without(load_config(files).to_diff_dict(), _NOT_CONFIG))
    generation = generation_settings(files)
    if generation is not None:
        _write_json(target / "generation_config.json", _without(generation, _NOT_CONFIG))
    if terms := declared(files.folder):
        _write_json(target / "card.json", terms)


def save_tokenizer(files: TeacherFiles, folder: Path) -> None:
    """Write ``tokenizer/`` below ``folder``."""
    with quiet_transformers():
        load_tokenizer(files).save_pretrained(folder / "tokenizer")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    _write_json(settings, _without(json.loads(settings.read_bytes()), _NOT_TOKENIZER))


def _without(value: Any, keys: set[str]) -> Any:
    """A copy of a JSON value with these keys left out at every depth."""
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list | tuple) else value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
