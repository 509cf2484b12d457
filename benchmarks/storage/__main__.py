"""``python -m benchmarks.storage``: speed, size and memory of the store, beside what a user would pick instead.

In: nothing (a made-up set), or ``--cache`` with a finished cache. Out: JSON on standard output and a table on standard
error. Every engine holds the same content (equal values are checked first), works in a process of its own on one and
the same core, and takes turns with the others; figures are medians of the turns. Warm reads are counted in time of the
processor, cold ones and writes by the clock. Cold: every file's pages are dropped from the system's cache before the
turn; what lies below (a disk's or a hypervisor's cache) is not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.storage.content import Sizes, Source, copy_cache, make_up
from benchmarks.storage.engines import ENGINES
from benchmarks.workers import Process
from train.order import EpochOrder, keyed_permutation

BATCH_BLOCKS = 8
# An engine that takes longer to open a set is not asked to open a larger one.
_TOO_SLOW_MS = 2_000
MANY_SHARDS = (10, 1_000, 10_000)
ORDERS = ("sequential", "random", "shuffled")
# Libraries read these when they are loaded.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLOSC_NTHREADS", "RAYON_NUM_THREADS")
_ONE_CORE = dict.fromkeys(_THREADS, "1")
_MOSAIC = "mosaicml-streaming"


def start(engine: str, python: str) -> Process:
    """An engine's worker."""
    return Process("benchmarks.storage.worker", engine, python=python, environment=_ONE_CORE)


def measure(source: Source, work: Path, pythons: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one set, by engine; an engine that fails has its error instead."""
    sizes, results = source.sizes, {name: dict[str, Any]() for name in pythons}
    order = EpochOrder(
        num_blocks=sizes.num_blocks,
        shard_blocks=sizes.shard_blocks,
        window_shards=max(1, min(16, sizes.num_shards // 4)),
        seed=0,
        epoch=0,
        fingerprint="benchmark",
    )
    orders = {
        "sequential": list(range(sizes.num_blocks)),
        "random": keyed_permutation(sizes.num_blocks, "benchmark").tolist(),
        "shuffled": order.indices(0, sizes.num_blocks).tolist(),
    }
    turns: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in pythons}
    tiny = make_up(work / "tiny-source", replace(sizes, num_blocks=2, block_tokens=8, shard_blocks=1))

    with ExitStack() as stack:
        running: dict[str, Process] = {}

        @contextmanager
        def engine(name: str) -> Iterator[Process]:
            """Work with an engine's process; where it fails, note why and go on without it."""
            try:
                yield running[name]
            except RuntimeError as error:
                results[name]["error"] = str(error)
                running.pop(name).close()

        def take_turn(name: str, what: str, answer: dict[str, Any]) -> None:
            turns[name].setdefault(what, []).append(answer)

        for name, python in pythons.items():
            running[name] = start(name, python)
        stack.callback(lambda: _close_all(running))
        folders = {name: work / (ENGINES[name].files_of or name) for name in pythons}
        for name in list(running):  # libraries are loaded by first use, which is nobody's speed or memory
            with engine(name) as process:
                process.ask("write", source=str(tiny.folder), folder=str(work / "tiny"))
            shutil.rmtree(work / "tiny", ignore_errors=True)
        for number in range(options.write_turns):
            _note(f"write {number + 1} of {options.write_turns}")
            for name in list(running):
                own = work / name
                shutil.rmtree(own, ignore_errors=True)
                with engine(name) as process:
                    take_turn(name, "write", process.ask("write", source=str(source.folder), folder=str(own)))
                    if number + 1 == options.write_turns:
                        results[name]["files"], num_bytes = _count(own)
                        results[name]["bytes_per_token"] = round(num_bytes / sizes.num_tokens, 2)
        some = sorted({0, 1, sizes.num_blocks - 1, *orders["random"][:5]})
        for name in list(running):
            with engine(name) as process:
                process.ask("open", source=str(source.folder), folder=str(folders[name]))
                for blocks in (some, [0, 1]):
                    different = process.ask("check", source=str(source.folder), blocks=blocks)["different"]
                    if different:
                        raise RuntimeError(f"check: other values in {', '.join(different)}")
        for what, blocks in orders.items():
            _note(f"read, {what}")
            for name in list(running):  # touches every page and file once
                with engine(name) as process:
                    process.ask("turn", blocks=blocks, batch_blocks=BATCH_BLOCKS, limit_s=options.turn_s / 4)
            for number in range(options.turns):
                shift = number * len(blocks) // options.turns // BATCH_BLOCKS * BATCH_BLOCKS
                turned = blocks[shift:] + blocks[:shift]
                for name in list(running):
                    with engine(name) as process:
                        arguments = {"blocks": turned, "batch_blocks": BATCH_BLOCKS, "limit_s": options.turn_s}
                        take_turn(name, what, process.ask("turn", **arguments))
        for number in range(options.cold_turns):
            _note(f"cold {number + 1} of {options.cold_turns}")
            for what in ("sequential", "shuffled"):
                for name in list(running):
                    with engine(name) as process:
                        drop_pages(folders[name])
                        process.ask("open", source=str(source.folder), folder=str(folders[name]))
                        arguments = {
                            "blocks": orders[what],
                            "batch_blocks": BATCH_BLOCKS,
                            "limit_s": 4 * options.turn_s,
                        }
                        take_turn(name, f"cold {what}", process.ask("turn", **arguments))
        for name in list(running):
            if options.quick and name != "kdpipe":
                continue
            # A process that has worked keeps memory that the system counts already.
            running[name].close()
            running[name] = start(name, pythons[name])
            with engine(name) as process:
                ask = {"folder": str(folders[name]), "batch_blocks": BATCH_BLOCKS}
                process.ask("memory", source=str(source.folder), blocks=orders["sequential"][:8], **ask)
                found = process.ask("memory", source=str(source.folder), blocks=orders["shuffled"], **ask)
                results[name]["reader_peak_bytes"] = found["peak_bytes"]
                results[name]["batch_bytes"] = found["batch_bytes"]
    for name, kinds in turns.items():
        for what, taken in kinds.items():
            if what == "write":
                for clock in ("wall", "cpu"):
                    seconds = median(turn[f"{clock}_s"] for turn in taken)
                    results[name][f"write_tokens_per_{clock}_s"] = round(sizes.num_tokens / seconds)
                results[name]["writer_peak_bytes"] = max(turn["peak_bytes"] for turn in taken)
            else:
                clock = "wall_s" if what.startswith("cold") else "cpu_s"
                speeds = [turn["blocks"] * sizes.block_tokens / turn[clock] for turn in taken]
                results[name][f"{what} tokens_per_s".replace(" ", "_")] = round(median(speeds))
    return {
        "set": asdict(sizes) | {"num_tokens": sizes.num_tokens, "raw_bytes_per_token": sizes.raw_bytes_per_token},
        "raw_shard_bytes": sizes.shard_blocks * sizes.block_tokens * sizes.raw_bytes_per_token,
        "engines": results,
    }


def open_many(work: Path, pythons: dict[str, str], counts: tuple[int, ...]) -> dict[str, Any]:
    """Time to open sets of many shards, small and equal ones: opening should not depend on them."""
    sizes = Sizes(num_blocks=2, block_tokens=32, k=4, shard_blocks=2, levels=128, temperatures=(1.0, 2.0))
    source = make_up(work / "source", sizes)
    results: dict[str, dict[Any, Any]] = {name: {} for name in pythons}
    for owner in (name for name in pythons if not ENGINES[name].files_of):
        multiply = ENGINES[owner].multiply
        readers = [name for name in pythons if (ENGINES[name].files_of or name) == owner]
        if multiply is None:
            results |= {name: {"skipped": "keeps one file"} for name in readers}
            continue
        with ExitStack() as stack:
            running = {name: start(name, pythons[name]) for name in readers}
            for process in running.values():
                stack.callback(process.close)
            for count in counts:
                folder, many = work / f"{owner}-{count}", replace(sizes, num_blocks=sizes.num_blocks * count)
                running[owner].ask("write", source=str(source.folder), folder=str(folder))
                multiply(folder, sizes, count)
                for name, process in running.items():
                    if "error" in results[name] or any(
                        found["milliseconds"] > _TOO_SLOW_MS for found in results[name].values()
                    ):
                        continue
                    try:
                        found = process.ask("openings", sizes=asdict(many), folder=str(folder), times=7)
                    except RuntimeError as error:
                        results[name] = {"error": str(error)}
                        continue
                    results[name][count] = {"milliseconds": round(1000 * found.pop("seconds"), 2), **found}
                shutil.rmtree(folder)
    return results


def drop_pages(folder: Path) -> None:
    """Drop a folder's files from the system's page cache; they must be on disk for that."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def _note(text: str) -> None:
    """Say what goes on, since a full run takes long."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _close_all(running: dict[str, Process]) -> None:
    for process in running.values():
        process.close()


def _count(folder: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def choose(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """The interpreter of each engine that can run, and why the others cannot."""
    pythons, skipped = {}, {}
    wanted = set(options.engines or ENGINES)
    wanted |= {owner for name in wanted if (owner := ENGINES[name].files_of)}
    for name, engine in ENGINES.items():
        missing = [module for module in engine.modules if importlib.util.find_spec(module) is None]
        if name not in wanted:
            skipped[name] = "not asked for"
        elif name == "mds":
            if not options.all:
                skipped[name] = "needs an environment of its own, which --all makes"
            elif isinstance(made := mosaic_python(options.environment), Path):
                pythons[name] = str(made)
            else:
                skipped[name] = made
        elif missing:
            skipped[name] = f"not installed: {', '.join(missing)} (pip install '.[bench]')"
        else:
            pythons[name] = sys.executable
    return pythons, skipped


def mosaic_python(folder: Path) -> Path | str:
    """An interpreter that has MosaicML Streaming, whose pins clash with ours; made once, or why it cannot be."""
    python = folder / "bin" / "python"
    if not python.exists():
        _note(f"making {folder} for {_MOSAIC}; this takes minutes")
        venv.create(folder, with_pip=True)
    check = [str(python), "-c", f"import importlib.metadata as m; m.version('{_MOSAIC}')"]
    if subprocess.run(check, stderr=subprocess.DEVNULL, check=False).returncode:
        torch = f"torch=={importlib.metadata.version('torch')}"
        command = [str(python), "-m", "pip", "install", "--quiet", _MOSAIC, torch]
        made = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        if made.returncode:
            lines = made.stderr.strip().splitlines() or ["pip failed"]
            return f"cannot be installed: {lines[-1][:200]}"
    return python


# Name, engines compared, figure, goal, what the ratio must be at least.
GOALS: tuple[tuple[str, str, str, float], ...] = (
    ("sequential vs zarr-python on the same files", "zarr-python", "sequential_tokens_per_s", 3.0),
    ("random vs zarr-python on the same files", "zarr-python", "random_tokens_per_s", 25.0),
    ("sequential vs tensorstore", "tensorstore", "sequential_tokens_per_s", 1.2),
    ("random vs tensorstore", "tensorstore", "random_tokens_per_s", 2.0),
    ("training order vs Parquet, a list per token", "parquet-tokens", "shuffled_tokens_per_s", 12.0),
    ("training order vs Parquet, tuned", "parquet-tuned", "shuffled_tokens_per_s", 2.5),
    ("training order vs HF numpy format", "hf-numpy", "shuffled_tokens_per_s", 1.2),
    ("training order vs MDS raw", "mds", "shuffled_tokens_per_s", 1.2),
    ("cold scan vs tensorstore", "tensorstore", "cold_sequential_tokens_per_s", 1.2),
    ("writing, synced, vs zarr-python, not synced", "zarr-python", "write_tokens_per_wall_s", 1.5),
)


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at in one set, and what came of it; figures that were not taken are left out."""
    engines, rows = result["engines"], []
    ours = engines.get("kdpipe", {})
    least = {32: 3_000_000, 16: 5_000_000}.get(result["set"]["k"])

    def row(what: str, goal: float, found: float, more_is_better: bool = True) -> None:
        met = found >= goal if more_is_better else found <= goal
        rows.append({"what": what, "goal": goal, "found": found, "met": met})

    if least and "shuffled_tokens_per_s" in ours:
        row("training order, tokens/s", least, ours["shuffled_tokens_per_s"])
    for what, rival, figure, goal in GOALS:
        if figure in ours and figure in engines.get(rival, {}):
            row(what, goal, round(ours[figure] / engines[rival][figure], 2))
    for rival in ("hf-numpy", "mds"):
        if "bytes_per_token" in ours and "bytes_per_token" in engines.get(rival, {}):
            found = round(ours["bytes_per_token"] / engines[rival]["bytes_per_token"], 3)
            row(f"bytes, of those of {rival}", 0.6, found, more_is_better=False)
    if "reader_peak_bytes" in ours:
        beyond = ours["reader_peak_bytes"] - ours["batch_bytes"]
        row("reader's memory beyond a batch, MB", 20, round(beyond / 1e6, 1), more_is_better=False)
    if "writer_peak_bytes" in ours:
        shards = ours["writer_peak_bytes"] / result["raw_shard_bytes"]
        row("writer's memory, raw shards", 2, round(shards, 2), more_is_better=False)
    return rows


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines: list[str] = []
    for result in report["sets"]:
        about = result["set"]
        lines.append(
            f"\n{result['name']}: {about['num_tokens']:,} tokens, K = {about['k']}, {about['num_blocks']} blocks of"
            f" {about['block_tokens']} in {-(-about['num_blocks'] // about['shard_blocks'])} shards;"
            f" raw {about['raw_bytes_per_token']} bytes/token; million tokens/s"
        )
        lines.append(
            f"{'engine':16}{'seq':>8}{'random':>8}{'shuffled':>9}{'cold seq':>9}{'cold shuf':>10}{'write':>8}"
            f"{'B/token':>9}{'files':>7}{'read MB':>9}{'write MB':>9}"
        )
        for name, found in result["engines"].items():
            if "error" in found:
                lines.append(f"{name:16}{found['error']}")
                continue
            kinds = [
                *(f"{o}_tokens_per_s" for o in ORDERS),
                "cold_sequential_tokens_per_s",
                "cold_shuffled_tokens_per_s",
            ]
            widths = (8, 8, 9, 9, 10, 8)
            speeds = [found.get(kind, 0) / 1e6 for kind in (*kinds, "write_tokens_per_wall_s")]
            lines.append(
                f"{name:16}"
                + "".join(f"{speed:>{width}.2f}" for speed, width in zip(speeds, widths, strict=True))
                + f"{found['bytes_per_token']:>9.1f}{found['files']:>7}"
                + f"{found.get('reader_peak_bytes', 0) / 1e6:>9.1f}{found['writer_peak_bytes'] / 1e6:>9.1f}"
            )
        lines += [
            f"  {'met   ' if row['met'] else 'MISSED'} {row['what']}: {row['found']:,} (goal {row['goal']:,})"
            for row in result["goals"]
        ]
    if report["opening"]:
        counts = report["opening_shards"]
        lines.append(f"\n{'opening, ms':16}" + "".join(f"{count:>10,}" for count in counts) + "   files, folders read")
        for name, found in report["opening"].items():
            if "skipped" in found or "error" in found:
                lines.append(f"{name:16}{found.get('skipped', found.get('error'))}")
                continue
            last = found[max(found)]
            cells = "".join(
                f"{found[count]['milliseconds']:>10.2f}" if count in found else f"{'-':>10}" for count in counts
            )
            lines.append(f"{name:16}{cells}   {last['files_opened']}, {last['listings']}")
    lines += [f"{name}: skipped, {why}" for name, why in report["skipped"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sets and few turns: under three minutes")
    parser.add_argument("--all", action="store_true", help="also MosaicML Streaming, in an environment made for it")
    parser.add_argument("--cache", type=Path, help="a finished cache to measure with, beside the made-up sets")
    parser.add_argument("--tokens", type=int, help="tokens of a made-up set")
    parser.add_argument("--block-tokens", type=int, default=1024)
    parser.add_argument("--k", type=int, nargs="*", default=[32, 16], help="a made-up set for each")
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), help="only these")
    parser.add_argument("--shards", type=int, nargs="*", help="counts of shards to time opening of")
    parser.add_argument("--work", type=Path, help="folder for files, on the disk to measure; default: a temporary one")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser.add_argument("--environment", type=Path, default=cache_home / "kdpipe" / _MOSAIC, help="made by --all")
    options = parser.parse_args()
    options.turns, options.cold_turns, options.write_turns, options.turn_s = (
        (3, 2, 2, 0.4) if options.quick else (7, 5, 3, 2.0)
    )
    num_tokens = options.tokens or (1 << 18 if options.quick else 1 << 21)
    num_blocks = -(-num_tokens // options.block_tokens)
    shard_blocks = min(256, max(1, num_blocks // 8))
    counts = tuple(options.shards if options.shards is not None else MANY_SHARDS)
    pythons, skipped = choose(options)
    started = time.time()
    report: dict[str, Any] = {
        "sets": [],
        "opening": {},
        "opening_shards": counts,
        "skipped": skipped,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, one used",
        "python": platform.python_version(),
        "versions": _versions(),
        "quick": options.quick,
    }
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)

        def measured(title: str, source: Source) -> None:
            result = {"name": title, **measure(source, work / title, pythons, options)}
            report["sets"].append({**result, "goals": goals(result)})
            shutil.rmtree(work / title)
            shutil.rmtree(source.folder)

        if options.cache:
            measured("cache", copy_cache(options.cache, work / "source"))
        for k in options.k:
            sizes = Sizes(
                num_blocks=num_blocks,
                block_tokens=options.block_tokens,
                k=k,
                shard_blocks=shard_blocks,
                levels=128,
                temperatures=(1.0, 2.0),
            )
            _note(f"make up {sizes.num_tokens:,} tokens, K = {k}")
            measured(f"made-up-k{k}", make_up(work / "source", sizes, seed=0))
        if counts:
            _note("open many shards")
            report["opening"] = open_many(work / "opening", pythons, counts)
    report["seconds"] = round(time.time() - started)
    print(table(report), file=sys.stderr)
    print(json.dumps(report, indent=2))


def _versions() -> dict[str, str]:
    names = ("numpy", "zarr", "numcodecs", "tensorstore", "pyarrow", "datasets", "h5py")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
