"""A teacher's files, from the Hugging Face hub or from disk, and what is known of it without its weights.

In: a hub name, a folder or a GGUF file. Out: ``TeacherFiles``; its config and fast tokenizer, checked; what the
manifest says of both, and the copies of them that a cache keeps. Nothing is unpickled, no remote code run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from cache_spec.manifest import TeacherInfo, TokenizerInfo, canonical_json, sha256_hex
from pipeline.teacher_card import CARD_NAME
from pipeline.teacher_kind import MASKED_LM_HEADS, is_masked_lm, model_class, unused_positions

_HUB_PATTERNS = ["model*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja", CARD_NAME]
_UNSAFE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_TOKENIZER_PATTERNS = ["tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json"]


@dataclass(frozen=True, kw_only=True)
class TeacherFiles:
    """Where a teacher's files lie on this machine."""

    name: str
    """Hub name; for local files the folder's or GGUF file's own name, so that a moved folder is the same teacher."""
    folder: Path
    weight_files: tuple[str, ...]
    """Names of the weight files inside ``folder``, sorted."""
    gguf_file: str | None
    revision: str | None
    """Commit of the hub repository; None for local files."""

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 over the concatenated SHA-256 hex digests of the weight files, in the order of their names."""
        digests = []
        for name in self.weight_files:
            with (self.folder / name).open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return sha256_hex("".join(digests).encode())


def resolve_teacher(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> TeacherFiles:
    """Find a teacher's files: an existing folder or GGUF file, else a hub name, fetched or taken from the hub's cache.

    Raises BadInputError: ``unknown-teacher``, ``no-weights``, ``unsafe-weights``, ``bad-weights-index``,
    ``revision-of-a-folder``.
    """
    # These say no to what cannot be a path, a name too long or an unknown ~user, where pathlib raises.
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        if path.suffix != ".gguf" or gguf_file is not None:
            hint = "give the folder that it lies in"
            raise BadInputError("unknown-teacher", f"teacher {name}", expected="a folder", found="a file", hint=hint)
        path, gguf_file = path.parent, path.name
    if os.path.isdir(path):
        if revision is not None:
            raise BadInputError("revision-of-a-folder", f"teacher {name}", hint="a revision needs a hub name")
        label = path.resolve().name if gguf_file is None else gguf_file
        label = os.fsencode(label).decode(errors="backslashreplace")
        weights = _weight_files(path, gguf_file, name, [file.name for file in path.iterdir()])
        return TeacherFiles(name=label, folder=path, weight_files=weights, gguf_file=gguf_file, revision=None)
    folder = _fetch(name, revision, [gguf_file] if gguf_file else _HUB_PATTERNS)
    present = [file.name for file in folder.iterdir()]
    if gguf_file is None and not any(file.endswith(".safetensors") for file in present):
        # Without a network the names serve no more than the message; its errors change with the hub's HTTP library.
        with contextlib.suppress(Exception):
            present += huggingface_hub.list_repo_files(name, revision=revision)
    weights = _weight_files(folder, gguf_file, name, present)
    return TeacherFiles(name=name, folder=folder, weight_files=weights, gguf_file=gguf_file, revision=folder.name)


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise BadInputError("unknown-teacher", f"teacher {name}", found="no such file or folder")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        raise BadInputError(
            "unknown-teacher",
            f"teacher {name}{at}",
            expected="a local folder, or a hub name that is cached or can be fetched",
            found=first_line(error),
            hint="check the name and the network; for a gated model run `hf auth login`",
        ) from None


def _weight_files(folder: Path, gguf_file: str | None, name: str, present: list[str]) -> tuple[str, ...]:
    """The files that ``from_pretrained`` will read, by the same order of precedence."""
    place = f"teacher {name}"
    if gguf_file is not None:
        if Path(gguf_file).name != gguf_file or not (folder / gguf_file).is_file():
            raise BadInputError("unknown-teacher", place, found=f"no file {gguf_file}")
        return (gguf_file,)
    if (folder / "model.safetensors").is_file():
        return ("model.safetensors",)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            good = bool(files) and all(Path(file).name == file and (folder / file).is_file() for file in files)
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise BadInputError("bad-weights-index", index, expected="a weight_map to files beside it")
        return tuple(files)
    if any(Path(file).suffix in _UNSAFE_SUFFIXES for file in present):
        raise BadInputError(
            "unsafe-weights",
            place,
            expected="safetensors or GGUF weights",
            found="only pickled ones, which can run code",
            hint="convert with `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)` if you trust them",
        )
    gguf = sorted(file for file in present if file.endswith(".gguf"))
    hint = f"name the GGUF file, one of: {', '.join(gguf[:5])}" if gguf else None
    raise BadInputError("no-weights", place, expected="model.safetensors or its index, or a GGUF file", hint=hint)


def tokenizer_files(name: str) -> TeacherFiles:
    """The files of a tokenizer alone, from a folder or a hub name; raises ``unknown-teacher``."""
    folder = Path(name).expanduser()
    if not os.path.isdir(folder):
        folder = _fetch(name, None, [*_TOKENIZER_PATTERNS, "tokenizer_config.json", "config.json"])
    return TeacherFiles(name=name, folder=folder, weight_files=(), gguf_file=None, revision=None)


def load_tokenizer(files: TeacherFiles) -> Any:
    """The teacher's fast tokenizer; BadInputError ``no-tokenizer`` where there is none."""
    place = f"teacher {files.name}"
    # Without any file the library makes up an empty tokenizer of the model's family and says nothing.
    if files.gguf_file is None and not any(any(files.folder.glob(pattern)) for pattern in _TOKENIZER_PATTERNS):
        raise BadInputError("no-tokenizer", place, expected="tokenizer.json or another vocabulary file")
    try:
        with quiet_transformers():
            tokenizer = _tokenizer_class(files).from_pretrained(
                files.folder, trust_remote_code=False, **source_options(files)
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise BadInputError("no-tokenizer", place, found=first_line(error)) from None
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        if type(error) is not Exception:
            raise
        raise BadInputError("no-tokenizer", place, found=first_line(error)) from None
    if not getattr(tokenizer, "is_fast", False):
        raise BadInputError("no-tokenizer", place, expected="a fast tokenizer", found=type(tokenizer).__name__)
    if not tokenizer.get_vocab():
        raise BadInputError("no-tokenizer", place, expected="a vocabulary", found="an empty one")
    return tokenizer


def _tokenizer_class(files: TeacherFiles) -> Any:
    """The plain fast tokenizer where the folder declares it: AutoTokenizer would put that of the model's family in its
    place (for Qwen2, among others), which reads the same vocabulary and splits text in another way."""
    settings = files.folder / "tokenizer_config.json"
    declared = json.loads(settings.read_bytes()) if files.gguf_file is None and settings.is_file() else {}
    if declared.get("tokenizer_class") in {"PreTrainedTokenizerFast", "TokenizersBackend"}:
        return transformers.PreTrainedTokenizerFast
    return AutoTokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of vocabulary (by id), the fast tokenizer's whole definition and its special tokens."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation are settings of the last call, not of the tokenizer.
    definition.update(padding=None, truncation=None)
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256_hex(canonical_json({"vocabulary": vocabulary, "definition": definition, "special": special}))


def describe_teacher(files: TeacherFiles) -> tuple[TeacherInfo, TokenizerInfo]:
    """What the manifest says of teacher and tokenizer, without loading a weight (the files are hashed).

    Raises BadInputError: ``unreadable-config``, ``not-a-language-model``, ``no-tokenizer``, ``no-eos``,
    ``vocabulary-mismatch``, ``unsupported-head``.
    """
    config, tokenizer = load_config(files), load_tokenizer(files)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = model_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture fails in its own way on numbers that make no sense
        found = f"{type(error).__name__}: {first_line(error)}"
        raise BadInputError("unreadable-config", f"teacher {files.name}", found=found) from None
    return describe_model(files, model, tokenizer)


def check_block_tokens(info: TeacherInfo, block_tokens: int) -> None:
    """Refuse blocks longer than the teacher's positions: BadInputError ``block-too-long``."""
    if info.max_positions is not None and block_tokens > info.max_positions:
        raise BadInputError(
            "block-too-long",
            f"blocks for teacher {info.name}",
            expected=f"at most {info.max_positions} tokens",
            found=f"{block_tokens} tokens",
            hint="give a smaller --block-tokens, or a teacher with more positions",
        )


def load_config(files: TeacherFiles) -> Any:
    """The config of a language model, causal or masked: ``unreadable-config``, ``not-a-language-model``."""
    place = f"teacher {files.name}"
    if files.gguf_file is None and not (files.folder / "config.json").is_file():
        raise BadInputError("unreadable-config", place, found="no config.json")
    try:
        with quiet_transformers():
            config: Any = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, **source_options(files))
    except Exception as error:  # what is wrong with a value, its own class of configuration says in its own way
        raise BadInputError("unreadable-config", place, found=first_line(error)) from None
    generation_settings(files)
    kind = config.model_type
    found = None
    if config.is_encoder_decoder:
        found = f"{kind}, an encoder-decoder"
    elif is_masked_lm(config):
        named = config.architectures or []
        if named and not any(name.endswith(MASKED_LM_HEADS) for name in named):
            found = f"{kind}, {named[0]}"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = kind
    if found is not None:
        expected = "a decoder-only or a masked language model"
        raise BadInputError("not-a-language-model", place, expected=expected, found=found)
    return config


def generation_settings(files: TeacherFiles) -> dict[str, Any] | None:
    """What generation_config.json says, None where there is none: BadInputError ``unreadable-config``."""
    path = files.folder / "generation_config.json"
    if files.gguf_file is not None or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInputError("unreadable-config", path, found=first_line(error)) from None
    if not isinstance(settings, dict):
        raise BadInputError("unreadable-config", path, expected="a JSON object", found=type(settings).__name__)
    return settings


def describe_model(files: TeacherFiles, model: Any, tokenizer: Any) -> tuple[TeacherInfo, TokenizerInfo]:
    """``describe_teacher`` for a model that exists, with its weights or without."""
    place = f"teacher {files.name}"
    config, text = model.config, model.config.get_text_config()
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None or head.weight.ndim != 2:
        raise BadInputError("unsupported-head", place, expected="one linear output head")
    rows, width = head.weight.shape
    if is_masked_lm(config) and width != text.hidden_size:
        expected = f"an output head that reads {text.hidden_size} numbers, the model's width"
        raise BadInputError("unsupported-head", place, expected=expected, found=width)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    if vocab_size > rows:
        raise BadInputError(
            "vocabulary-mismatch",
            place,
            expected=f"a tokenizer of at most {rows} ids, the rows of the output head",
            found=f"{vocab_size} ids",
            hint="tokenizer and model do not belong together",
        )
    eos = tokenizer.eos_token_id
    if eos is None and is_masked_lm(config):
        eos = tokenizer.sep_token_id
    if eos is None:
        eos = next((e for e in (text.eos_token_id, config.eos_token_id) if e is not None), None)
    eos = eos[0] if isinstance(eos, list | tuple) and eos else eos
    if not isinstance(eos, int):
        raise BadInputError("no-eos", place, expected="an end-of-text token in the tokenizer or config")
    if not 0 <= eos < vocab_size:
        raise BadInputError("vocabulary-mismatch", place, expected=f"eos id below {vocab_size}", found=eos)
    positions = ("max_position_embeddings", "n_positions", "max_seq_len")
    try:
        teacher_info = TeacherInfo(
            name=files.name,
            revision=files.revision,
            model_type=config.model_type,
            weights_sha256=files.weights_sha256,
            vocab_size=vocab_size,
            padded_vocab_size=rows,
            hidden_size=width,
            num_layers=text.num_hidden_layers,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            max_positions=next(
                (n - unused_positions(model) for key in positions if (n := getattr(text, key, None))), None
            ),
        )
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{first['loc'][0]} {first['input']}: {first['msg']}"
        raise BadInputError("unreadable-config", place, found=found) from None
    return teacher_info, TokenizerInfo(sha256=tokenizer_sha256(tokenizer), eos_token_id=eos)


def source_options(files: TeacherFiles) -> dict[str, Any]:
    """The options of ``from_pretrained`` that keep to these files."""
    return {"local_files_only": True} | ({"gguf_file": files.gguf_file} if files.gguf_file else {})


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the library's advice and progress bars off the terminal; what matters is raised as an error of ours."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        # The bar of a GGUF file's conversion asks nobody.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
