"""From a teacher's safetensors files to a model of some of its layers, without building the teacher.

In: the folder or hub name of the teacher, the layers to take. Out: a model holding copies of their tensors, and of
the embeddings, the final norm and the head. Tensors of other layers are never read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from cache_spec.manifest import TeacherInfo
from train.student_config import load_config

WEIGHT_PATTERNS = ["model*.safetensors", "*.safetensors.index.json", "config.json"]
_IDENTITY_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_CONVERT_HINT = "layers are only copied from safetensors: load the teacher with transformers and save_pretrained it"


def spread_layers(num_layers: int, num_teacher_layers: int) -> tuple[int, ...]:
    """Evenly spaced layers, first and last included, half rounded up: 6 of 12 is 0, 2, 4, 7, 9, 11."""
    if num_layers == 1:
        return (0,)
    steps, span = num_layers - 1, num_teacher_layers - 1
    return tuple((2 * i * span + steps) // (2 * steps) for i in range(num_layers))


def chosen_layers(
    depth: int,
    num_layers: int | None,
    layer_indices: tuple[int, ...] | None,
    layers: Literal["spread", "first", "last"] = "spread",
) -> tuple[int, ...]:
    """The teacher's layers to copy, given or chosen by rule; raises ``bad-student-config`` if there are no such."""
    if layer_indices is None:
        if num_layers is None or not 1 <= num_layers <= depth:
            hint = "give --num-layers or --layer-indices" if num_layers is None else None
            raise BadInputError(
                "bad-student-config", "num_layers", expected=f"1 to {depth}", found=num_layers, hint=hint
            )
        if layers == "spread":
            return spread_layers(num_layers, depth)
        first = 0 if layers == "first" else depth - num_layers
        return tuple(range(first, first + num_layers))
    if (
        not layer_indices
        or len(set(layer_indices)) != len(layer_indices)
        or not all(0 <= i < depth for i in layer_indices)
    ):
        expected = f"distinct layers from 0 to {depth - 1}"
        raise BadInputError("bad-student-config", "layer_indices", expected=expected, found=list(layer_indices))
    if num_layers not in (None, len(layer_indices)):
        expected = f"{len(layer_indices)}, the length of layer_indices"
        raise BadInputError("bad-student-config", "num_layers", expected=expected, found=num_layers)
    return layer_indices


def weights_folder(teacher: str | None, info: TeacherInfo) -> Path:
    """The local folder of the teacher's safetensors, by default the cache's teacher; a hub name is fetched."""
    name = teacher or info.name
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path
    elif path.is_file() or name.endswith(".gguf"):
        raise _not_safetensors(name, path.suffix)
    elif teacher is None and info.revision is None:
        hint = "the cache was made from a local folder: say where it lies with --teacher"
        raise BadInputError("unknown-teacher", name, found="no such folder", hint=hint)
    else:
        revision = info.revision if name == info.name else None
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=WEIGHT_PATTERNS))
        except Exception as error:  # the hub client raises its own, its network library's and the system's errors
            hint = "give the teacher's folder or hub name with --teacher"
            raise BadInputError("unknown-teacher", name, found=first_line(error), hint=hint) from None
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.suffix for p in folder.iterdir() if p.suffix in (".gguf", ".bin", ".pt", ".pth"))
        if others:
            raise _not_safetensors(name, others[0])
        raise BadInputError("unknown-teacher", name, expected="*.safetensors files", hint=_CONVERT_HINT)
    return folder


def weights_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the SHA-256 hex digests of weight files, sorted by name: what a cache's manifest holds."""
    total = hashlib.sha256()
    for path in sorted(files):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").hexdigest().encode())
    return total.hexdigest()


def _not_safetensors(teacher: str, suffix: str) -> BadInputError:
    return BadInputError("teacher-not-safetensors", teacher, expected=".safetensors", found=suffix, hint=_CONVERT_HINT)


def check_same_teacher(config: PreTrainedConfig, folder: Path) -> None:
    """Raise ``other-teacher`` if a folder's model has other sizes than the teacher of the cache."""
    other = load_config(folder, "unknown-teacher")
    for field in _IDENTITY_FIELDS:
        expected, found = getattr(config, field, None), getattr(other, field, None)
        if expected != found:
            raise BadInputError(
                "other-teacher", f"{folder}: {field}", expected=f"{expected}, as in the cache", found=found
            )


def layer_list_name(skeleton: PreTrainedModel, num_layers: int) -> str:
    """Name of the one outermost list of ``num_layers`` modules, such as ``transformer.h``."""
    lists = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    ]
    outermost = min((name.count(".") for name in lists), default=0)
    lists = [name for name in lists if name.count(".") == outermost]
    if len(lists) != 1:
        place = type(skeleton).__name__
        raise BadInputError("cannot-copy-layers", place, expected="one list of layers", found=lists or "none")
    return str(lists[0])


def read_layers(folder: Path, list_name: str, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Read, as float32 copies, what belongs to no layer or to a chosen one; chosen layers are numbered anew."""
    # Checkpoints differ in what stands before the list's own name: transformer.h.0, h.0.
    own_name = list_name.rpartition(".")[2]
    numbered = re.compile(rf"((?:.*?\.)?{re.escape(own_name)}\.)(\d+)(\..+)")
    new_number = {layer: number for number, layer in enumerate(layers)}
    tensors: dict[str, torch.Tensor] = {}
    for path, listed in tensor_files(folder).items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in listed if listed is not None else file.keys():
                    match = numbered.fullmatch(name)
                    if match is None:
                        new_name = name
                    elif int(match[2]) in new_number:
                        new_name = f"{match[1]}{new_number[int(match[2])]}{match[3]}"
                    else:
                        continue
                    # A copy, so that nothing of the student lies in a file that may change below it.
                    tensors[new_name] = file.get_tensor(name).to(torch.float32, copy=True)
        except (OSError, SafetensorError) as error:
            raise BadInputError("unreadable-weights", path, found=first_line(error)) from None
    return tensors


def tensor_files(folder: Path) -> dict[Path, list[str] | None]:
    """Each weight file with the tensors that the index places there (None: all of them)."""
    # The order of precedence of from_pretrained.
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():
        try:
            weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInputError("unreadable-weights", index, found=first_line(error)) from None
        files: dict[Path, list[str] | None] = {}
        for name in sorted(set(weight_map.values())):
            if not isinstance(name, str) or Path(name).name != name:
                raise BadInputError("unreadable-weights", index, expected="plain file names", found=name)
            if not (folder / name).is_file():
                raise BadInputError("unreadable-weights", folder / name, expected="a file of the index", found="none")
            files[folder / name] = [tensor for tensor, file in weight_map.items() if file == name]
        return files
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        place = f"{folder}: {len(found)} files"
        raise BadInputError("unreadable-weights", place, expected="model.safetensors or its index")
    return {found[0]: None}


def model_of_tensors(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """A float32 model of exactly these tensors; raises ``cannot-copy-layers`` naming one that is missing or differs."""
    # transformers itself knows the prefixes, old names and fused weights of each architecture, and ties the head.
    try:
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise BadInputError("cannot-copy-layers", model_class.__name__, found=first_line(error)) from None
    model, info = loaded
    refuse_incomplete(info, "cannot-copy-layers")
    assert isinstance(model, PreTrainedModel)
    return model


def refuse_incomplete(info: Mapping[str, Any], kind: str) -> None:
    """Raise ``kind`` for the first tensor that transformers had to make up while loading."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise BadInputError(kind, f"tensor {name}", expected=list(expected), found=list(found))
    for name in sorted(info["missing_keys"]):
        raise BadInputError(kind, f"tensor {name}", expected="in the safetensors files", found="no such tensor")
