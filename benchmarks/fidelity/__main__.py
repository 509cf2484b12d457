"""``python -m benchmarks.fidelity``: what each encoding keeps of the teacher: bytes, distances, gradients, students.

In: a capture, which is a folder with three caches of the teacher's last hidden states on disjoint documents
(``calibration``, ``train``, ``held-out``), and the teacher's folder, from which students take their first layers. Out:
JSON on stdout, tables on stderr, and plots where asked for. No teacher is run.

    python -m benchmarks.fidelity capture --teacher FOLDER --text DOCUMENTS.jsonl --out CAPTURE
    python -m benchmarks.fidelity --capture CAPTURE --teacher FOLDER [--quick | --students] [--plots FOLDER]

With ``--work FOLDER`` what is made on the way is kept and found again; several processes may share it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.captures import CALIBRATION, HELD_OUT, PARTS, TRAIN, Capture, make_capture, open_capture
from benchmarks.fidelity.configurations import ALL, QUICK, QUICK_STUDENTS, TEMPERATURES, chosen
from benchmarks.fidelity.report import plot, student_table, target_table
from benchmarks.fidelity.rivals import RIVALS
from benchmarks.fidelity.students import FULL, Run, Training, campaign, runs, summary, trained
from benchmarks.fidelity.targets import measure_targets
from cache_spec.errors import KdpipeError

logger = logging.getLogger("kdpipe")

_QUICK_TOKENS = {CALIBRATION: 8_192, TRAIN: 16_384, HELD_OUT: 4_096}
_CAPTURE_TOKENS = {CALIBRATION: 131_072, TRAIN: 131_072, HELD_OUT: 32_768}
_PROBE_SEED = 1_000
"""The student whose gradients are measured is none of those that are compared."""


def _run_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=(__doc__ or "").splitlines()[0].partition(": ")[2]
    )
    parser.add_argument("--capture", type=Path, required=True, help="folder with the three caches")
    parser.add_argument("--teacher", required=True, help="folder of the teacher, for the students' first layers")
    parser.add_argument("--work", type=Path, help="folder for what is made on the way, kept [default: a temporary one]")
    parser.add_argument("--quick", action="store_true", help="fewer positions and configurations, shorter training")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="configurations to measure; patterns are allowed")
    parser.add_argument("--positions", type=int, metavar="N", help="held-out positions to measure at most")
    parser.add_argument("--batch-positions", type=int, nargs=2, default=(2_048, 16_384), metavar=("N", "N"))
    parser.add_argument("--no-targets", action="store_true", help="leave out the first part")
    parser.add_argument("--no-rivals", action="store_true", help="leave out emulated rivals")
    parser.add_argument(
        "--students",
        action=argparse.BooleanOptionalAction,
        help="train and compare students, or not [default: with --quick only]",
    )
    parser.add_argument("--student-targets", nargs="+", metavar="NAME", help="configurations that students learn from")
    parser.add_argument("--seeds", type=int, help="seeds of each student [default: 3, or 1 with --quick]")
    parser.add_argument("--steps", type=int, help="steps of each student [default: 32, or 6 with --quick]")
    parser.add_argument(
        "--probe-steps",
        type=int,
        help="of the student whose gradients are measured [default: --steps, or 4 with --quick]",
    )
    parser.add_argument("--step-tokens", type=int, default=2_048)
    parser.add_argument("--layers", type=int, default=4, help="the teacher's layers that a student has")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of the batches of the first part")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write plots")
    parser.add_argument("--plot-format", choices=("svg", "png"), default="svg")
    return parser.parse_args(arguments)


def _capture_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity capture")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines, a document each")
    parser.add_argument("--out", type=Path, required=True)
    for part in PARTS:
        parser.add_argument(f"--{part}-tokens", type=int, default=_CAPTURE_TOKENS[part])
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="further flags of kdpipe cache-teacher, after --")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both parts, as far as they are asked for."""
    began = time.perf_counter()
    quick = options.quick
    steps = options.steps or (6 if quick else 32)
    capture = open_capture(options.capture, work, _QUICK_TOKENS if quick else {})
    configurations = chosen(options.only or (QUICK if quick else ["*"]))
    training = Training(
        teacher=options.teacher,
        num_layers=options.layers,
        steps=steps,
        step_tokens=options.step_tokens,
        precision=options.precision,
    )
    report: dict[str, Any] = {
        "capture": _describe(capture),
        "machine": f"{platform.system()} {platform.machine()}, {options.threads} threads, torch {torch.__version__}",
        "quick": quick,
        "seed": options.seed,
        "training": {"layers": options.layers, "steps": steps, "step_tokens": options.step_tokens},
    }
    if not options.no_targets:
        report["targets"] = measure_targets(
            capture,
            configurations,
            () if options.no_rivals else RIVALS,
            _probes(capture, training, options.probe_steps or (4 if quick else steps)),
            positions=tuple(options.batch_positions),
            most=options.positions,
            seed=options.seed,
            quiet=not sys.stderr.isatty(),
        )
        _show(target_table(report["targets"]))
    if quick if options.students is None else options.students:
        asked = options.student_targets or (QUICK_STUDENTS if quick else [one.name for one in ALL if one.trains])
        seeds = range(options.seeds or (1 if quick else 3))
        temperatures = (1.0,) if quick else TEMPERATURES
        wanted = runs(chosen(asked), temperatures, seeds)
        results = campaign(capture, wanted, training, temperatures)
        rows = summary(results, temperatures)
        report["students"] = {"runs_wanted": len(wanted), "runs_done": len(results), "summary": rows, "runs": results}
        _show(student_table(rows))
    report["seconds"] = round(time.perf_counter() - began, 1)
    return report


def _probes(capture: Capture, training: Training, steps: int) -> dict[float, Path]:
    """A student on its way for each temperature: where it is, gradients are small, and errors of targets count."""
    briefly = dataclasses.replace(training, steps=steps)
    made = {}
    for temperature in TEMPERATURES:
        run = Run(name=FULL, configuration=None, temperature=temperature, seed=_PROBE_SEED)
        made[temperature] = trained(capture, run, briefly)
    return made


def _describe(capture: Capture) -> dict[str, Any]:
    manifest = capture.held_out.manifest
    return {
        "teacher": manifest.teacher.model_dump(mode="json", include={"name", "weights_sha256", "vocab_size"}),
        "block_tokens": manifest.blocks.block_tokens,
        "tokens": {part: reader.manifest.corpus.num_tokens for part, reader in capture.parts.items()},
        "fingerprints": {part: reader.manifest.fingerprint for part, reader in capture.parts.items()},
    }


def _show(lines: list[str]) -> None:
    print("", *lines, sep="\n", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print JSON; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logger.setLevel(logging.INFO)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["capture"]:
            made = _capture_options(arguments[1:])
            tokens = {part: getattr(made, f"{part.replace('-', '_')}_tokens") for part in PARTS}
            report = make_capture(made.teacher, made.text, made.out, tokens, made.flags)
        else:
            options = _run_options(arguments)
            torch.set_num_threads(options.threads)
            with tempfile.TemporaryDirectory(prefix="kdpipe-fidelity-") as scratch:
                report = measure(options, options.work or Path(scratch))
            if options.plots is not None:
                report["plots"] = [str(path) for path in plot(report, options.plots, options.plot_format)]
    except KdpipeError as error:
        logger.error("error: %s", error)
        return error.exit_code
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
