"""From a trained student to a folder that ``from_pretrained`` of its kind (causal or masked language model) opens.

In: the student (without its projection), the cache's tokenizer and manifest, facts of the run. Out: a published folder
with config, safetensors weights, generation config, tokenizer and model card, reloaded and compared beforehand.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel

from cache_spec.durable import make_folder, sync_folder, writing
from cache_spec.errors import KdpipeError, WouldLoseDataError
from cache_spec.manifest import Manifest
from train.lm_kind import model_class
from train.student import public_name, quiet_transformers

logger = logging.getLogger("kdpipe")

_CARD_TAG = "kdpipe"
_SAMPLE = "In 1984 it isn't  quite\n\tdéjà vu: 12345 <tokens>"
# For some architectures AutoTokenizer takes the architecture's own tokenizer class, whatever the files say.
_TOKENIZER_HINT = "load it with PreTrainedTokenizerFast.from_pretrained, as AutoTokenizer reads it differently here"


def export_student(
    model: PreTrainedModel,
    out: Path,
    *,
    tokenizer_folder: Path,
    manifest: Manifest,
    card: Mapping[str, object],
) -> None:
    """Publish a float32 student as the folder ``out``, in place of an earlier export there.

    ``card`` holds training settings, losses and evaluation numbers for ``README.md``; values that are mappings become
    sections. Raises ``export-mismatch`` if what was written does not reload as the same model, ``not-an-export`` if
    ``out`` holds something else, ``cannot-write`` if the disk refuses; ``out`` is then as it was.
    """
    temporary, old = out.with_name(f".{out.name}.exporting"), out.with_name(f".{out.name}.replaced")
    make_folder(out.parent)
    with writing(out):
        if old.exists() and not out.exists():
            os.rename(old, out)  # a kill between the two renames of an earlier export
        _refuse_foreign(out)
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        try:
            _write(model, temporary, tokenizer_folder, manifest, card)
            _compare(model, temporary)
            sync_files(temporary)
            if out.exists():
                os.rename(out, old)
            os.rename(temporary, out)
            sync_folder(out.parent)
        except BaseException:
            if old.exists() and not out.exists():
                os.rename(old, out)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if old.exists():
            shutil.rmtree(old)


def _refuse_foreign(out: Path) -> None:
    """Only an earlier export, or an empty folder, may be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise WouldLoseDataError("not-an-export", out, expected="a folder", hint="choose another folder")
    if out.is_dir() and any(out.iterdir()):
        readme = out / "README.md"
        if not readme.is_file() or f"- {_CARD_TAG}\n" not in readme.read_text(encoding="utf-8", errors="replace"):
            raise WouldLoseDataError(
                "not-an-export", out, expected="an earlier export or nothing", hint="choose another folder"
            )


def _write(
    model: PreTrainedModel, folder: Path, tokenizer_folder: Path, manifest: Manifest, card: Mapping[str, object]
) -> None:
    student: Any = model
    student.config.architectures = [type(model).__name__]
    student.config._name_or_path = student.name_or_path = ""
    student.config.dtype = torch.float32
    try:
        with quiet_transformers():
            student.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error  # how it reports a full disk
    for source in sorted(tokenizer_folder.iterdir()):
        if source.is_file() and not (folder / source.name).exists():
            shutil.copyfile(source, folder / source.name)
    if not _same_tokenizer(folder, tokenizer_folder):
        card = {**card, "tokenizer": _TOKENIZER_HINT}
        logger.warning("the student's tokenizer: %s", _TOKENIZER_HINT)
    text = model_card(manifest, card, type(model).__name__, sum(p.numel() for p in model.parameters()))
    (folder / "README.md").write_text(text, encoding="utf-8")


def _same_tokenizer(folder: Path, tokenizer_folder: Path) -> bool:
    """Whether ``AutoTokenizer`` reads the copied files, now beside a config, as it reads the cache's."""
    if not any(tokenizer_folder.iterdir()):
        return True
    readings = []
    for place in (folder, tokenizer_folder):
        try:
            with quiet_transformers():
                tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)
            readings.append((tokenizer.get_vocab(), tokenizer(_SAMPLE)["input_ids"]))
        except Exception:  # whatever a tokenizer's class raises on files that it cannot read
            return False
    return bool(readings[0] == readings[1])


def _compare(model: PreTrainedModel, folder: Path) -> None:
    """Reload as a user would, and refuse any tensor that differs in a bit, and any other logits."""

    def mismatch(place: str, expected: object, found: object) -> KdpipeError:
        return KdpipeError(
            "export-mismatch", place, expected=expected, found=found, hint="the export was not published"
        )

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("dtype") != "float32" or config.get("architectures") != [type(model).__name__]:
        raise mismatch("config.json", f"float32 {type(model).__name__}", f"{config.get('dtype')}")
    try:
        with quiet_transformers():
            loaded: Any = model_class(model.config).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:
        raise mismatch(folder.name, "a model that loads", error) from error
    reloaded, info = loaded
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise mismatch("tensor names", "the student's", f"{info}")
    ours, theirs = model.state_dict(), reloaded.state_dict()
    if ours.keys() != theirs.keys():
        raise mismatch("tensor names", len(ours), f"{len(theirs)}, {sorted(ours.keys() ^ theirs.keys())[:3]} differ")
    for name, tensor in ours.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise mismatch(f"tensor {name}", "finite numbers", "NaN or infinity")
        if not _same_bits(tensor.cpu(), theirs[name]):
            raise mismatch(f"tensor {name}", f"{tensor.dtype} {list(tensor.shape)}, bit by bit", "other values")
    expected_BTV, found_BTV = _short_logits(model), _short_logits(reloaded.to(model.device))
    # The same weights, but memory laid out elsewhere: kernels may sum in another order.
    if not torch.allclose(expected_BTV, found_BTV, rtol=1e-5, atol=1e-5 * float(expected_BTV.abs().max())):
        raise mismatch("logits", "the student's", f"off by {(expected_BTV - found_BTV).abs().max():.3g}")


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )


def _short_logits(model: Any) -> torch.Tensor:
    positions = getattr(model.config, "max_position_embeddings", None) or 8
    ids_BT = torch.arange(min(8, positions), device=model.device)[None] % model.get_output_embeddings().weight.shape[0]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), quiet_transformers():
            logits_BTV: torch.Tensor = model(input_ids=ids_BT).logits
    finally:
        model.train(training)
    return logits_BTV


def sync_files(folder: Path) -> None:
    """Make the files of a folder, and their names, durable."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def model_card(manifest: Manifest, card: Mapping[str, object], architecture: str, num_parameters: int) -> str:
    """``README.md`` of a student: YAML front matter, where it comes from, how it was trained; holds no local path."""
    pipeline = "text-generation" if manifest.masking is None else "fill-mask"
    tags = {"library_name": "transformers", "pipeline_tag": pipeline}
    front = yaml.safe_dump({**tags, "tags": [_CARD_TAG, "knowledge-distillation"]}, sort_keys=False)
    teacher, encoding, hidden = manifest.teacher, manifest.encoding, manifest.hidden
    revision = f" at {teacher.revision}" if teacher.revision else ""
    rows: dict[str, object] = {
        "teacher": f"{public_name(teacher.name)}{revision}",
        "teacher parameters": teacher.num_parameters or "not known",
        "student": architecture,
        "student parameters": num_parameters,
        "cache fingerprint": manifest.fingerprint,
        "encoding": [encoding.name, encoding.model_dump(mode="json", exclude={"name"})],
        "temperatures in the cache": list(manifest.temperatures),
        **({} if manifest.imported is None else {"imported log-probabilities": manifest.imported.logprobs}),
        **({} if manifest.masking is None else {"masking": manifest.masking.model_dump(mode="json")}),
        "pooled hidden states": f"means of {hidden.window} tokens" if hidden else "none",
        "tokens in the cache": manifest.corpus.num_tokens,
        "tokens in a block": manifest.blocks.block_tokens,
    }
    single = {key: value for key, value in card.items() if not isinstance(value, Mapping)}
    sections = {"From": rows, "Run": single} | {k: v for k, v in card.items() if isinstance(v, Mapping)}
    body = "".join(f"\n## {_cell(name)}\n\n{_table(section)}" for name, section in sections.items() if section)
    intro = "A student distilled with kdpipe from a teacher's cached targets.\n"
    return f"---\n{front}---\n\n# {architecture} student of {public_name(teacher.name)}\n\n{intro}{body}"


def _table(values: Mapping[str, object]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {_cell(key)} | {_cell(value)} |\n" for key, value in values.items())


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_cell(key)}: {_cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    text = str(value)
    # The folders of a path inside a sentence, and those of a value that is one whole path.
    text = re.sub(r"(?<![\w:./])/(?:[^\s/]+/)+", "", text)
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute():
            text = kind(text).name
    return " ".join(text.split()).replace("|", "\\|")
