"""``kdpipe demo``: the whole pipeline, offline, on what is embedded, through the commands that users run.

In: an output folder. Out: a cache, three students trained from it, and a table that sets them beside their teacher.
Two students learn from the cache; the third is the first one's twin in everything but its loss, which is plain
cross-entropy.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import time
from pathlib import Path
from typing import Any

import click

from cache_spec.errors import EXIT_INTERRUPTED, KdpipeError, WouldLoseDataError
from pipeline.cli import run
from pipeline.settings import build

TEACHER = Path(__file__).parent / "demo_teacher"
HELD_OUT_TOKENS = 16_384
_NAMES = {"cache", "held-out", "students"}

# Name to flags: what differs between the students.
STUDENTS: dict[str, list[str]] = {
    "3-layers": ["--num-layers", "3"],
    "narrow": ["--student", "config", "--student-config", '{"n_layer": 4, "n_embd": 128, "n_head": 4}'],
    "3-layers-ce": ["--num-layers", "3", "--kl-weight", "0", "--ce-weight", "1", "--cosine-weight", "0"],
}


def run_demo(out: Path, *, quiet: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Run the demo, or finish one that was interrupted; returns its facts and the lines of its closing table."""
    began = time.perf_counter()
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names and not names & _NAMES:
        raise WouldLoseDataError("not-a-demo", out, expected="an empty folder or a demo's", found=min(names))
    cache, held_out = out / "cache", out / "held-out"
    _kdpipe(["cache-teacher", "--config", "demo", "--teacher", str(TEACHER), "--out", str(cache)], quiet)
    _kdpipe(
        ["cache-teacher", "--config", "demo", "--teacher", str(TEACHER), "--out", str(held_out)]
        # Hidden states give the teacher's whole distribution, so that students are measured against all of it.
        + ["--text", "python-docs:heldout", "--limit-tokens", str(HELD_OUT_TOKENS), "--encoding", "hidden"],
        quiet,
    )
    for name, flags in STUDENTS.items():
        _kdpipe(
            ["train-student", "--config", "demo", "--cache", str(cache), "--out", str(out / "students" / name)]
            + (["--teacher", str(TEACHER)] if "--num-layers" in flags else [])
            + flags,
            quiet,
        )
    facts = _collect(cache, held_out, out / "students", quiet)
    facts["seconds"] = round(time.perf_counter() - began, 1)
    return facts, _lines(facts)


def _kdpipe(arguments: list[str], quiet: bool) -> None:
    """Run one command as a user would, shown before it runs."""
    if not quiet:
        click.secho(f"\n$ kdpipe {_shown(arguments)}", bold=True)
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        code = run([*arguments, "--json"] if quiet else arguments)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        stopped = KdpipeError("demo-stopped", f"kdpipe {arguments[0]}", found=f"exit code {code}")
        stopped.exit_code, stopped.said_elsewhere = code, True
        raise stopped


def _shown(arguments: list[str]) -> str:
    return " ".join("<embedded teacher>" if part == str(TEACHER) else shlex.quote(part) for part in arguments)


def _collect(cache: Path, held_out: Path, students: Path, quiet: bool) -> dict[str, Any]:
    """Evaluate teacher and students on the held-out cache and join that with what training recorded."""
    from pipeline.inspect import inspect_cache
    from train.evaluation.config import EvaluateConfig
    from train.evaluation.evaluate import evaluate_models

    folders = {"teacher": TEACHER, **{name: students / name / "student" for name in STUDENTS}}
    flags = {"models": tuple(map(str, folders.values())), "cache": str(held_out)}
    rows = evaluate_models(build(EvaluateConfig, "evaluate", "demo", flags), quiet=quiet)
    inspected = inspect_cache(cache)
    models = []
    for (name, folder), row in zip(folders.items(), rows, strict=True):
        result = folder.parent / "result.json"
        training = json.loads(result.read_text()) if name != "teacher" else {}
        models.append({**row, "name": name, "folder": str(folder), "training": training})
    return {
        "cache": str(cache),
        "held_out_cache": str(held_out),
        "held_out_tokens": inspect_cache(held_out)["tokens_done"],
        "cached_tokens": inspected["tokens_done"],
        "bytes_per_token": inspected["bytes_per_token"],
        "models": models,
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    heads = ["", "parameters", "bytes/token", "train tok/s", "loss", "perplexity", "KL to teacher", "agreement"]
    table = [heads]
    for model in facts["models"]:
        training, measured = model["training"], model["cache"]
        table.append(
            [
                model["name"],
                f"{model['parameters']:,}",
                f"{facts['bytes_per_token']:.1f}" if training else "-",
                f"{training['tokens_per_s']:,.0f}" if training else "-",
                f"{measured['loss_nats']:.4f}",
                f"{measured['perplexity']:.2f}",
                f"{measured['kl_to_teacher']:.4f}",
                f"{measured['agreement']:.3f}",
            ]
        )
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    lines = ["", f"Held-out text, {facts['held_out_tokens']:,} tokens that neither teacher nor students have seen:", ""]
    lines += [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    by_name = {model["name"]: model["cache"]["loss_nats"] for model in facts["models"]}
    gain = by_name["3-layers-ce"] - by_name["3-layers"]
    verdict = "beats" if gain > 0 else "does NOT beat"
    return [
        *lines,
        "",
        f"At equal steps, 3-layers (from the cache) {verdict} 3-layers-ce (cross-entropy alone):"
        f" {abs(gain):.4f} nats {'lower' if gain > 0 else 'higher'} loss.",
        f"Cache: {facts['cache']} ({facts['cached_tokens']:,} tokens). Held-out cache: {facts['held_out_cache']}.",
        "Students: " + ", ".join(model["folder"] for model in facts["models"] if model["training"]),
        f"Done in {facts['seconds']:.0f} s.",
    ]
