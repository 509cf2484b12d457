"""What an import starts from: files, columns, tokenizer, and what is declared; all checked but the rows.

In: settings. Out: one object, and the small files of the cache to be.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from cache_spec.durable import make_folder, writing
from cache_spec.errors import BadInputError
from cache_spec.manifest import TokenizerInfo
from pipeline import folder
from pipeline.interop.columns_in import Columns, find_columns
from pipeline.interop.config import ImportConfig
from pipeline.interop.files_in import check_exports, parquet_files
from pipeline.interop.rows_in import Declared
from pipeline.teacher_description import save_config, save_tokenizer
from pipeline.teacher_files import (
    TeacherFiles,
    load_config,
    load_tokenizer,
    tokenizer_files,
    tokenizer_sha256,
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files, and what is declared of them."""

    config: ImportConfig
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    """Of the files, for the record: their paths below what was given, each another."""
    columns: tuple[Columns, ...]
    """Of each file."""
    declared: Declared
    tokenizer: TokenizerInfo
    tokenizer_files: TeacherFiles
    config_files: TeacherFiles | None
    """Where the teacher's configuration lies, if it is known."""
    model_type: str | None
    num_rows: int
    """Of the teacher's output head; V where it is not known."""

    @classmethod
    def of(cls, config: ImportConfig) -> Source:
        """Find and check everything but the rows."""
        paths, names = parquet_files(config.from_)
        check_exports(paths, config.logprobs)
        files = tokenizer_files(config.tokenizer)
        loaded = load_tokenizer(files)
        own_size = max(loaded.get_vocab().values()) + 1
        vocab_size = config.vocab_size or own_size
        if vocab_size < own_size:
            expected = f"at least {own_size}, the ids of the tokenizer"
            raise BadInputError("vocabulary-mismatch", f"--vocab-size {vocab_size}", expected=expected)
        if loaded.eos_token_id is None:
            raise BadInputError("no-eos", f"tokenizer {config.tokenizer}", expected="an end-of-text token")
        config_folder = config.teacher_config or (files.folder if (files.folder / "config.json").is_file() else None)
        config_files, model, num_rows = None, None, vocab_size
        if config_folder is not None:
            config_files = TeacherFiles(
                name=str(config_folder), folder=config_folder, weight_files=(), gguf_file=None, revision=None
            )
            model = load_config(config_files)
            num_rows = int(model.get_text_config().vocab_size)
            if num_rows < vocab_size:
                expected = f"a vocabulary of at most {num_rows}, the teacher's"
                raise BadInputError("vocabulary-mismatch", config_folder, expected=expected, found=vocab_size)
        return cls(
            config=config,
            paths=paths,
            names=names,
            columns=tuple(find_columns(config, path) for path in paths),
            declared=Declared(
                vocab_size=vocab_size,
                logprobs=config.logprobs,
                mass_error=config.mass_error,
                shift=config.shift,
                ignore_mask=config.ignore_mask,
            ),
            tokenizer=TokenizerInfo(sha256=tokenizer_sha256(loaded), eos_token_id=loaded.eos_token_id),
            tokenizer_files=files,
            config_files=config_files,
            model_type=None if model is None else model.model_type,
            num_rows=num_rows,
        )

    def files(self) -> dict[str, bytes]:
        """The cache's small files that are not about its arrays: path to content."""
        scratch = self.config.out / folder.STAGING_NAME / "description"
        shutil.rmtree(scratch, ignore_errors=True)
        make_folder(scratch)
        with writing(scratch):
            save_tokenizer(self.tokenizer_files, scratch)
            if self.config_files is not None:
                save_config(self.config_files, scratch)
        found = (path for path in sorted(scratch.rglob("*")) if path.is_file())
        return {path.relative_to(scratch).as_posix(): path.read_bytes() for path in found}
