"""Train the demo's teacher: a small GPT-2 with its own byte-level BPE, from text that lies on this machine.

In: the train split of ``pipeline.demo_text`` and the docstrings of the packages that kdpipe depends on, with
everything they share with the held-out split removed. Out: ``pipeline/demo_teacher/`` (config, fp16 safetensors,
tokenizer, a README with the measured figures). Nothing is downloaded. Seeded; one core.

    nice -n 10 python -m tools.train_demo_teacher

Shapes: B batch, T time, V vocabulary, D width, N tokens of a stream.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.demo_text import (
    Paragraphs,
    docstring_documents,
    python_docs,
    shared_runs,
    split_paragraphs,
    without_repeats,
    without_runs,
)

EOS = "<|endoftext|>"
VOCABULARY = 4096
POSITIONS = 512
WIDTH, LAYERS, HEADS = 192, 6, 6
# fmt: off
PACKAGES = (
    "PIL", "absl", "accelerate", "anyio", "click", "dask", "datasets", "distributed", "filelock", "fsspec",
    "huggingface_hub", "jinja2", "markdown", "networkx", "numcodecs", "numpy", "packaging", "pandas", "pip",
    "psutil", "pyarrow", "pydantic", "pygments", "requests", "rich", "setuptools", "toolz", "torch", "tornado",
    "tqdm", "urllib3", "werkzeug", "zarr",
)
# fmt: on
# A few packages repeat one docstring template hundreds of times: no package gives more than this.
MAX_PACKAGE_CHARACTERS = 1_000_000
MAX_WEIGHTS_BYTES = 8_000_000
# The two phases: tokens a block, and the share of blocks that come from the demo's own text.
BLOCK_TOKENS = (256, 512)
HOME_SHARE = (0.4, 0.7)
DECAY_SHARE = 0.4
WARMUP_STEPS = 100
COMMAND = "    python -m tools.train_demo_teacher"
PART_TOKENS = 16_384

logger = logging.getLogger("kdpipe")
Tokens = npt.NDArray[np.uint16]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly ``VOCABULARY`` tokens with ``<|endoftext|>`` (id 0) as its BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    # Clean-up would take the blanks before commas away on decoding.
    settings = {"model_max_length": POSITIONS, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, **settings)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tokens:
    """Token ids [N] of all texts, each followed by EOS."""
    eos = np.array([tokenizer.eos_token_id], dtype=np.uint16)
    parts: list[Tokens] = []
    for text in texts:
        parts += [np.array(tokenizer.backend_tokenizer.encode(text).ids, dtype=np.uint16), eos]
    return np.concatenate(parts)


def package_docs(forbidden: frozenset[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the installed packages' docstrings, without runs of the held-out split."""

    def documents() -> Iterator[tuple[str, Paragraphs]]:
        for package in PACKAGES:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                logger.info("package %s is not installed: left out", package)
                continue
            root = Path(next(iter(spec.submodule_search_locations)))
            found = sorted(docstring_documents(root, package), key=lambda d: sha256(d[0].encode()).digest())
            size = 0
            for name, paragraphs in found:
                size += sum(map(len, paragraphs))
                if size > MAX_PACKAGE_CHARACTERS:
                    break
                yield name, without_runs(paragraphs, forbidden)

    yield from without_repeats(documents())


def block_stream(tokens_N: Tokens, block_tokens: int, random: np.random.Generator) -> Iterator[Tokens]:
    """Yield blocks [block_tokens + 1] for ever: each epoch shuffles, at another offset."""
    while True:
        offset = int(random.integers(block_tokens))
        starts = np.arange(offset, len(tokens_N) - block_tokens, block_tokens)
        for start in random.permutation(starts):
            yield tokens_N[start : start + block_tokens + 1]


def mean_loss(model: GPT2LMHeadModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats, in fp32, of ids [B, T + 1]."""
    hidden_BTD = model.transformer(input_ids=ids_BT[:, :-1]).last_hidden_state
    logits_BTV = model.lm_head(hidden_BTD).float()
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())


@torch.inference_mode()
def heldout_loss(model: GPT2LMHeadModel, tokens_N: Tokens, block_tokens: int) -> float:
    """Mean loss in nats over the whole blocks of a stream, each token predicted from its own block alone."""
    model.train(False)
    count = (len(tokens_N) - 1) // block_tokens
    blocks = [tokens_N[i * block_tokens : (i + 1) * block_tokens + 1] for i in range(count)]
    batches = [np.stack(blocks[i : i + 8]).astype(np.int64) for i in range(0, count, 8)]
    total = sum(mean_loss(model, torch.from_numpy(ids_BT)).item() * len(ids_BT) for ids_BT in batches)
    model.train(True)
    return total / count


def train(
    model: GPT2LMHeadModel, home_N: Tokens, away_N: Tokens, heldout_N: Tokens, options: argparse.Namespace
) -> tuple[int, int]:
    """Train ``model`` in place; returns the steps of the two phases, which with the seed say all that was done.

    The first phase keeps the learning rate and mixes blocks of 256 tokens from the demo's own text (``home``) and
    the packages' (``away``); the second lets the rate fall to 0 on longer blocks and more of the demo's own text.
    """
    random = np.random.default_rng(options.seed)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
    streams = {t: (block_stream(home_N, t, random), block_stream(away_N, t, random)) for t in BLOCK_TOKENS}
    stable_steps, decay_steps = options.stable_steps, options.decay_steps
    began, running, step = time.monotonic(), float("nan"), 0
    while True:
        if not stable_steps and time.monotonic() - began > 60 * options.minutes * (1 - DECAY_SHARE):
            stable_steps, decay_steps = step, round(step * DECAY_SHARE / (1 - DECAY_SHARE))
            logger.info("step %d: the rate falls from here for %d steps", step, decay_steps)
        falling = bool(stable_steps) and step >= stable_steps
        rate = 1 - (step - stable_steps) / decay_steps if falling else min(1.0, (step + 1) / WARMUP_STEPS)
        if rate <= 0:
            return stable_steps, decay_steps
        home, away = streams[BLOCK_TOKENS[falling]]
        num_rows = options.batch_tokens // BLOCK_TOKENS[falling]
        rows = [next(home if random.random() < HOME_SHARE[falling] else away) for _ in range(num_rows)]
        ids_BT = torch.from_numpy(np.stack(rows).astype(np.int64))
        for group in optimiser.param_groups:
            group["lr"] = options.lr * rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = mean_loss(model, ids_BT)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            speed = step * options.batch_tokens / (time.monotonic() - began)
            logger.info("step %d  loss %.3f  rate %.2f  %.0f tokens/s", step, running, rate, speed)
        if step % 500 == 0:
            logger.info("step %d  held-out loss %.4f (part)", step, heldout_loss(model, heldout_N[:PART_TOKENS], 256))


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> GPT2LMHeadModel:
    """Write the model in fp16 and the tokenizer to ``out``; returns the model read back in fp32."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float16
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    model.type(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    # How the tokenizer happened to be opened here says nothing of what it is.
    kept = {k: v for k, v in settings.items() if k not in ("is_local", "local_files_only", "name_or_path")}
    (out / "tokenizer_config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    assert (out / "model.safetensors").stat().st_size < MAX_WEIGHTS_BYTES
    return GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32, local_files_only=True)


def readme(options: argparse.Namespace, steps: tuple[int, int], figures: dict[str, str]) -> str:
    """The README beside the assets: what it is, how it was made, from what, and the measured figures."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    earlier = (options.start_from / "README.md").read_text(encoding="utf-8") if options.start_from else ""
    commands = "".join(line for line in earlier.splitlines(True) if line.startswith(COMMAND))
    commands += f"{COMMAND} --stable-steps {steps[0]} --decay-steps {steps[1]} --seed {options.seed} --lr {options.lr}"
    commands += " --start-from FIRST\n" if options.start_from else "\n"
    return f"""# The demo's teacher

A GPT-2 of {LAYERS} layers, width {WIDTH}, {HEADS} heads, {POSITIONS} positions, tied head, with its own byte-level
BPE of {VOCABULARY} tokens (`{EOS}` is id 0). It stands in for a real teacher where nothing can be downloaded; it
has read Python documentation and nothing else. Weights are stored in fp16, to be opened as fp32.

Made by

{commands}
(AdamW, {options.batch_tokens} tokens a step, bf16 matrix products, blocks of {BLOCK_TOKENS[0]} tokens, then of
{BLOCK_TOKENS[1]} while the rate falls to 0; no dropout).

Data: the train split of `pipeline.demo_text` (help topics and standard-library docstrings of CPython), and the
docstrings of kdpipe's own dependencies as installed. From both, every paragraph that shares a run of 100 characters
with the held-out split was removed. The tokenizer saw the train split alone.

| figure | value |
|---|---|
{rows}
"""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pipeline", "demo_teacher"))
    parser.add_argument("--start-from", type=Path, help="the --out of an earlier run, to train on from its weights")
    parser.add_argument("--minutes", type=float, default=25.0, help="time to train for, where no steps are given")
    parser.add_argument("--stable-steps", type=int, default=0, help="steps at the full rate, to repeat a run")
    parser.add_argument("--decay-steps", type=int, default=0, help="steps in which the rate falls to 0, likewise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    options = parser.parse_args()
    if bool(options.stable_steps) != bool(options.decay_steps):
        parser.error("--stable-steps and --decay-steps go together")
    return options


def main() -> None:
    """Train the tokenizer and the model, save them, measure what was saved."""
    options = _options()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    train_texts = [text for _, text in python_docs("train")]
    heldout_texts = [text for _, text in python_docs("heldout")]
    forbidden = shared_runs(split_paragraphs(text) for text in heldout_texts)
    tokenizer = train_tokenizer(train_texts)
    home_N, heldout_N = encode(tokenizer, train_texts), encode(tokenizer, heldout_texts)
    away_texts = [text for _, text in package_docs(forbidden)]
    away_N = encode(tokenizer, away_texts)
    logger.info("tokens: %d train split, %d packages, %d held out", len(home_N), len(away_N), len(heldout_N))
    eos = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=POSITIONS, bos_token_id=eos, eos_token_id=eos)
    config.n_embd, config.n_layer, config.n_head = WIDTH, LAYERS, HEADS
    config.activation_function = "gelu_pytorch_tanh"  # gelu_new in one fused kernel
    # Hardly any token is seen more than a few times: dropout would only slow it down.
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    if options.start_from:
        model = GPT2LMHeadModel.from_pretrained(options.start_from, dtype=torch.float32, local_files_only=True)
    began = time.monotonic()
    steps = train(model, home_N, away_N, heldout_N, options)
    seconds = time.monotonic() - began
    saved = save(model, tokenizer, options.out)
    loss_256, loss_512 = (heldout_loss(saved, heldout_N, t) for t in (256, 512))
    loss_train = heldout_loss(saved, home_N[:PART_TOKENS], 256)
    characters = sum(map(len, heldout_texts))
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "tokenizers"))
    figures = {
        "parameters": f"{sum(p.numel() for p in saved.parameters()):,}",
        "model.safetensors": f"{(options.out / 'model.safetensors').stat().st_size:,} bytes",
        "train split": f"{sum(map(len, train_texts)):,} characters, {len(home_N):,} tokens",
        "packages' docstrings": f"{sum(map(len, away_texts)):,} characters, {len(away_N):,} tokens",
        "held-out split": f"{characters:,} characters, {len(heldout_N):,} tokens",
        "tokens of the last run": f"{sum(steps) * options.batch_tokens:,} in {seconds:,.0f} s on one shared core",
        "held-out loss, blocks of 256": f"{loss_256:.4f} nats a token (perplexity {np.exp(loss_256):.2f})",
        "held-out loss, blocks of 512": f"{loss_512:.4f} nats a token (perplexity {np.exp(loss_512):.2f})",
        "train-split loss, blocks of 256": f"{loss_train:.4f} nats a token (first {PART_TOKENS:,} tokens)",
        "made with": f"CPython {platform.python_version()}, {versions}",
    }
    (options.out / "README.md").write_text(readme(options, steps, figures), encoding="utf-8")
    for name, value in figures.items():
        logger.info("%s: %s", name, value)


if __name__ == "__main__":
    main()
