"""A causal language model from the Hugging Face hub or from disk, checked and ready to read blocks.

In: a hub name, a folder or a GGUF file. Out: ``Teacher``: last hidden states of a batch of blocks, the output head
cut to the real vocabulary, and what the manifest says of model and tokenizer. Nothing is unpickled, no remote code run.

Legend of axes: B blocks, T tokens, V real vocabulary, D width, N rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from cache_spec.errors import BadInputError
from cache_spec.manifest import TeacherInfo, TokenizerInfo, canonical_json, sha256_hex

_HUB_PATTERNS = ["model*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja"]
_UNSAFE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_TOKENIZER_PATTERNS = ["tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
_HEAD_CHECK_LOGIT = 100.0
"""The self-check scales logits up to this, so that a soft cap cannot hide behind small logits."""
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


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
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf" and gguf_file is None:
        path, gguf_file = path.parent, path.name
    if path.is_dir():
        if revision is not None:
            raise BadInputError("revision-of-a-folder", f"teacher {name}", hint="a revision needs a hub name")
        label = path.resolve().name if gguf_file is None else gguf_file
        weights = _weight_files(path, gguf_file, name, [file.name for file in path.iterdir()])
        return TeacherFiles(name=label, folder=path, weight_files=weights, gguf_file=gguf_file, revision=None)
    folder = _fetch(name, revision, [gguf_file] if gguf_file else _HUB_PATTERNS)
    present = [file.name for file in folder.iterdir()]
    if gguf_file is None and not any(file.endswith(".safetensors") for file in present):
        with contextlib.suppress(OSError, ValueError):
            present += huggingface_hub.list_repo_files(name, revision=revision)
    weights = _weight_files(folder, gguf_file, name, present)
    return TeacherFiles(name=name, folder=folder, weight_files=weights, gguf_file=gguf_file, revision=folder.name)


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise BadInputError("unknown-teacher", f"teacher {name}", found="no such file or folder")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise BadInputError(
            "unknown-teacher",
            f"teacher {name}{at}",
            expected="a local folder, or a hub name that is cached or can be fetched",
            found=_first_line(error),
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


def load_tokenizer(files: TeacherFiles) -> Any:
    """The teacher's fast tokenizer; BadInputError ``no-tokenizer`` where there is none."""
    place = f"teacher {files.name}"
    # Without any file the library makes up an empty tokenizer of the model's family and says nothing.
    if files.gguf_file is None and not any(any(files.folder.glob(pattern)) for pattern in _TOKENIZER_PATTERNS):
        raise BadInputError("no-tokenizer", place, expected="tokenizer.json or another vocabulary file")
    try:
        with _quiet():
            tokenizer = _tokenizer_class(files).from_pretrained(files.folder, trust_remote_code=False, **_source(files))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise BadInputError("no-tokenizer", place, found=_first_line(error)) from None
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        if type(error) is not Exception:
            raise
        raise BadInputError("no-tokenizer", place, found=_first_line(error)) from None
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

    Raises BadInputError: ``unreadable-config``, ``not-a-causal-lm``, ``no-tokenizer``, ``no-eos``,
    ``vocabulary-mismatch``, ``unsupported-head``.
    """
    config, tokenizer = _load_config(files), load_tokenizer(files)
    causal_lm: Any = AutoModelForCausalLM
    with _quiet(), torch.device("meta"):
        model = causal_lm.from_config(config, trust_remote_code=False)
    return _describe(files, model, tokenizer)


def check_block_tokens(info: TeacherInfo, block_tokens: int) -> None:
    """Refuse blocks longer than the teacher's positions: BadInputError ``block-too-long``."""
    if info.max_positions is not None and block_tokens > info.max_positions:
        raise BadInputError(
            "block-too-long",
            f"blocks for teacher {info.name}",
            expected=f"at most {info.max_positions} tokens",
            found=f"{block_tokens} tokens",
            hint="use shorter blocks or a teacher with more positions",
        )


def _load_config(files: TeacherFiles) -> Any:
    place = f"teacher {files.name}"
    if files.gguf_file is None and not (files.folder / "config.json").is_file():
        raise BadInputError("unreadable-config", place, found="no config.json")
    try:
        with _quiet():
            config: Any = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, **_source(files))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError("unreadable-config", place, found=_first_line(error)) from None
    kind = config.model_type
    found = None
    if config.is_encoder_decoder:
        found = f"{kind}, an encoder-decoder"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = kind
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (
        getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    ):
        found = f"{kind}, an encoder"
    if found is not None:
        raise BadInputError("not-a-causal-lm", place, expected="a decoder-only language model", found=found)
    return config


def _describe(files: TeacherFiles, model: Any, tokenizer: Any) -> tuple[TeacherInfo, TokenizerInfo]:
    place = f"teacher {files.name}"
    config, text = model.config, model.config.get_text_config()
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None or head.weight.ndim != 2:
        raise BadInputError("unsupported-head", place, expected="one linear output head")
    rows, width = head.weight.shape
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
    if eos is None:
        eos = next((e for e in (text.eos_token_id, config.eos_token_id) if e is not None), None)
    eos = eos[0] if isinstance(eos, list | tuple) and eos else eos
    if not isinstance(eos, int):
        raise BadInputError("no-eos", place, expected="an end-of-text token in the tokenizer or config")
    if not 0 <= eos < vocab_size:
        raise BadInputError("vocabulary-mismatch", place, expected=f"eos id below {vocab_size}", found=eos)
    positions = ("max_position_embeddings", "n_positions", "max_seq_len")
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
        max_positions=next((n for key in positions if (n := getattr(text, key, None))), None),
    )
    return teacher_info, TokenizerInfo(sha256=tokenizer_sha256(tokenizer), eos_token_id=eos)


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """The output head cut to the real vocabulary; logits always come out in float32."""

    weight_VD: torch.Tensor
    """float32, or the teacher's half precision where the device multiplies into float32."""
    bias_V: torch.Tensor | None

    def logits(self, hidden_ND: torch.Tensor, out_NV: torch.Tensor) -> torch.Tensor:
        """float32 logits [N, V] of hidden states [N, D], written to ``out_NV`` (float32, contiguous)."""
        if self.weight_VD.dtype == torch.float32:
            torch.mm(hidden_ND.float(), self.weight_VD.T, out=out_NV)
        else:
            out_NV.copy_(_half_matmul(hidden_ND, self.weight_VD.T))
        return out_NV if self.bias_V is None else out_NV.add_(self.bias_V)


def _half_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.mm(left, right, out_dtype=torch.float32)
    return product


def _output_head(model: Any, vocab_size: int) -> OutputHead:
    """Logits rounded to bfloat16 lie on a grid of 1/8 near 20, so half precision is only multiplied into float32."""
    head = model.get_output_embeddings()
    weight_VD = head.weight.detach()[:vocab_size]
    bias = getattr(head, "bias", None)
    if weight_VD.dtype != torch.float32:
        try:
            _half_matmul(weight_VD[:1], weight_VD[:1].T)
        except (TypeError, RuntimeError):  # not on this device or by this torch: pay for a float32 copy once
            weight_VD = weight_VD.float()
    return OutputHead(weight_VD=weight_VD, bias_V=None if bias is None else bias.detach()[:vocab_size].float())


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A loaded, checked causal language model in eval mode."""

    files: TeacherFiles
    info: TeacherInfo
    tokenizer_info: TokenizerInfo
    tokenizer: Any
    model: Any
    head: OutputHead
    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype without its module, as the manifest says it: ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def hidden(self, input_ids_BT: np.ndarray[Any, Any]) -> torch.Tensor:
        """Last hidden state after the final norm, [B, T, D] in the teacher's dtype on its device."""
        ids_BT = torch.from_numpy(input_ids_BT.astype(np.int64)).to(self.device)
        hidden_BTD: torch.Tensor = self.model.base_model(input_ids=ids_BT).last_hidden_state
        return hidden_BTD


def load_teacher(
    files: TeacherFiles, *, device: str = "auto", dtype: str = "auto", attention: str | None = None
) -> Teacher:
    """Load a teacher's weights and prove on a short input that its logits are its last hidden state times its head.

    ``device``: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps. ``dtype``: auto (bfloat16 on CUDA that has
    it, else float32), float32, bfloat16 or float16. ``attention``: a transformers attention implementation, None for
    its default. Raises what ``describe_teacher`` raises, and BadInputError ``no-such-device``, ``no-such-dtype``,
    ``broken-weights``, ``incomplete-weights``, ``unsupported-head``.
    """
    place = f"teacher {files.name}"
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    _load_config(files)
    tokenizer = load_tokenizer(files)
    options = _source(files) | ({} if attention is None else {"attn_implementation": attention})
    options |= {} if files.gguf_file is not None else {"use_safetensors": True}
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.folder, dtype=torch_dtype, trust_remote_code=False, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise BadInputError("broken-weights", place, found=_first_line(error)) from None
    # A checkpoint without a language model's head would be given a random one.
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise BadInputError("incomplete-weights", place, expected=f"{missing[0]} and {len(missing) - 1} more weights")
    model.requires_grad_(False).eval().to(torch_device)
    model.config.use_cache = model.config.get_text_config().use_cache = False
    info, tokenizer_info = _describe(files, model, tokenizer)
    teacher = Teacher(
        files=files,
        info=info,
        tokenizer_info=tokenizer_info,
        tokenizer=tokenizer,
        model=model,
        head=_output_head(model, info.vocab_size),
        device=torch_device,
        dtype=torch_dtype,
    )
    _check_reads_left_to_right(teacher)
    _check_head(teacher)
    return teacher


def pick_device(name: str) -> torch.device:
    """The device of that name, checked to be there: BadInputError ``no-such-device``."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if not counts.get(kind) or (index and not (index.isdecimal() and int(index) < counts[kind])):
        there = ["cpu", *(f"cuda:{i}" for i in range(counts["cuda"])), *(["mps"] * counts["mps"])]
        raise BadInputError("no-such-device", f"device {name}", expected="auto or one of " + ", ".join(there))
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; auto is bfloat16 on CUDA that has it, else float32."""
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if half else torch.float32
    if name not in _DTYPES:
        raise BadInputError("no-such-dtype", f"dtype {name}", expected="one of auto, " + ", ".join(_DTYPES))
    return _DTYPES[name]


def _check_ids(info: TeacherInfo) -> np.ndarray[Any, Any]:
    """Two rows of ids that differ in their last token only."""
    ids_BT = np.tile(np.arange(min(16, info.max_positions or 16)) * 7919 % info.vocab_size, (2, 1))
    ids_BT[1, -1] = (ids_BT[1, -1] + 1) % info.vocab_size
    return ids_BT


def _check_reads_left_to_right(teacher: Teacher) -> None:
    hidden_BTD = teacher.hidden(_check_ids(teacher.info)).float()
    bound = _TOLERANCES[teacher.dtype] * hidden_BTD.abs().max()
    if (hidden_BTD[0, :-1] - hidden_BTD[1, :-1]).abs().gt(bound).any():
        place = f"teacher {teacher.info.name}"
        raise BadInputError("not-a-causal-lm", place, found="hidden states that depend on tokens to their right")


@torch.inference_mode()
def _check_head(teacher: Teacher) -> None:
    """Compare the model's own logits with ours, on hidden states scaled up so that a soft cap or factor shows."""
    ids_BT = _check_ids(teacher.info)
    seen: list[torch.Tensor] = []

    def ours(hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden_ND = hidden_BTD.flatten(0, 1)
        return teacher.head.logits(
            hidden_ND, torch.empty(len(hidden_ND), teacher.info.vocab_size, device=teacher.device)
        )

    hidden_BTD = teacher.hidden(ids_BT)
    scale = _HEAD_CHECK_LOGIT / ours(hidden_BTD).abs().max().clamp_min(1e-6)

    def scale_up(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = (output.last_hidden_state.float() * scale).to(teacher.dtype)
        seen.append(output.last_hidden_state)
        return output

    hook = teacher.model.base_model.register_forward_hook(scale_up)
    try:
        ids = torch.from_numpy(ids_BT).to(teacher.device)
        theirs_NV = teacher.model(input_ids=ids).logits.flatten(0, 1)[:, : teacher.info.vocab_size].float()
    finally:
        hook.remove()
    ours_NV = ours(seen[0])
    # A teacher of NaNs passes: the first block that it reads says so.
    error = (ours_NV - theirs_NV).abs().max()
    if error > _TOLERANCES[teacher.dtype] * ours_NV.abs().max():
        raise BadInputError(
            "unsupported-head",
            f"teacher {teacher.info.name}",
            expected="logits equal to the last hidden state times the output head",
            found=f"a difference of {error:.3g} ({teacher.info.model_type} scales or caps its logits)",
        )


def save_teacher_description(files: TeacherFiles, folder: Path) -> None:
    """Write ``teacher/config.json`` (and generation_config.json) and ``tokenizer/`` below ``folder``, no weights.

    The same teacher gives the same bytes, wherever its files lie.
    """
    target = folder / "teacher"
    target.mkdir(parents=True, exist_ok=True)
    _write_json(target / "config.json", _without(_load_config(files).to_diff_dict(), _NOT_CONFIG))
    generation = files.folder / "generation_config.json"
    if files.gguf_file is None and generation.is_file():
        _write_json(target / generation.name, _without(json.loads(generation.read_bytes()), _NOT_CONFIG))
    with _quiet():
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


def _source(files: TeacherFiles) -> dict[str, Any]:
    return {"local_files_only": True} | ({"gguf_file": files.gguf_file} if files.gguf_file else {})


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
