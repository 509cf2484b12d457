"""``python -m benchmarks.faults``: kill captures at random moments, change random bytes of a cache, count the losses.

In: numbers of kills and of changed bytes, and an encoding. Out: JSON. A kill is a SIGKILL to the ``kdpipe
cache-teacher`` process at a random moment, followed by the same command again; its arrays must equal an undisturbed
run's. A change is one byte of one file of the finished cache set to another value; ``kdpipe verify`` must find it.
Offline, on the embedded teacher.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cache_spec.encodings import ENCODINGS
from cache_spec.validate import verify_cache
from pipeline.demo import TEACHER
from pipeline.encoding_config import DEFAULT_ENCODING

# What each encoding keeps in this campaign, where its own defaults are too much for a small capture.
FLAGS = {"topk": "--k 16", "prototype": "--k 16 --prototypes 16 --calibration-tokens 4096", "sparsified": "--k 16"}


def capture_command(out: Path, tokens: int, workers: int, encoding: str) -> list[str]:
    settings = (
        f"--block-tokens 64 --limit-tokens {tokens} --batch-blocks 8 --shard-blocks 16 --workers {workers}"
        f" --encoding {encoding} {FLAGS.get(encoding, '')}"
    )
    source = ["--teacher", str(TEACHER), "--text", "python-docs:train", "--out", str(out)]
    return [sys.executable, "-c", "from pipeline.cli import main; main()", "cache-teacher", *source, *settings.split()]


def digests(cache: Path) -> dict[str, str]:
    """Digest of every file but the manifest, which records when it was made; hidden files are nobody's data."""
    names = [p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return {n: hashlib.sha256((cache / n).read_bytes()).hexdigest() for n in names if not n.startswith(".")}


def kill_campaign(
    folder: Path, kills: int, tokens: int, workers: int, encoding: str, rng: random.Random
) -> dict[str, Any]:
    """Kill and resume ``kills`` captures; count those that end unlike the undisturbed one."""
    began = time.perf_counter()
    subprocess.run(capture_command(folder / "clean", tokens, workers, encoding), check=True, capture_output=True)
    seconds = time.perf_counter() - began
    expected = digests(folder / "clean")
    counts = {"kills": 0, "finished_before_the_kill": 0, "different_after_resume": 0, "resume_failed": 0}
    shards_at_kill = []
    while counts["kills"] < kills:
        out = folder / "killed"
        process = subprocess.Popen(
            capture_command(out, tokens, workers, encoding), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=rng.uniform(0, seconds))
            counts["finished_before_the_kill"] += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            counts["kills"] += 1
            shards_at_kill.append(len(list(out.glob("receipts/0*.json"))))
            resumed = subprocess.run(capture_command(out, tokens, workers, encoding), check=False, capture_output=True)
            counts["resume_failed"] += resumed.returncode != 0
            counts["different_after_resume"] += digests(out) != expected
        shutil.rmtree(out, ignore_errors=True)
    return {**counts, "workers": workers, "shards": len(list((folder / "clean" / "receipts").iterdir())),
            "shards_committed_at_each_kill": shards_at_kill}  # fmt: skip


def change_campaign(cache: Path, changes: int, rng: random.Random) -> dict[str, Any]:
    """Change one random byte at a time, anywhere in the cache's files, each file's bytes being equally likely."""
    files = [p for p in sorted(cache.rglob("*")) if p.is_file() and not p.relative_to(cache).as_posix().startswith(".")]
    weights = [p.stat().st_size for p in files]
    # Half of the changes are spread over files, so that small ones, such as receipts, are met as often as shards.
    missed = []
    assert verify_cache(cache) == []
    for number in range(changes):
        path = rng.choice(files) if number % 2 else rng.choices(files, weights)[0]
        data = path.read_bytes()
        position = rng.randrange(len(data))
        changed = bytearray(data)
        changed[position] ^= rng.randrange(1, 256)
        path.write_bytes(changed)
        if not verify_cache(cache):
            missed.append(f"{path.relative_to(cache)} byte {position}")
        path.write_bytes(data)
    return {"changes": changes, "detected": changes - len(missed), "missed": missed}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--encoding", choices=ENCODINGS, default=DEFAULT_ENCODING)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report: dict[str, Any] = {"seed": options.seed, "encoding": options.encoding}
        report |= {"kill": kill_campaign(folder, options.kills, options.tokens, options.workers, options.encoding, rng)}
        report |= {"change": change_campaign(folder / "clean", options.changes, rng)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
