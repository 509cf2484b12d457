"""``python -m benchmarks.memory``: peak memory of ``cache-teacher`` on a corpus and on one ten times its size.

In: sizes and an encoding. Out: JSON with the peak resident memory of each run, as the operating system counted it for
the finished process, and their ratio. Offline, on the embedded teacher and text; the larger corpus repeats the smaller
one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from cache_spec.encodings import ENCODINGS
from pipeline.demo import TEACHER
from pipeline.demo_text import python_docs
from pipeline.encoding_config import DEFAULT_ENCODING, used_settings


def write_corpus(path: Path, num_chars: int, times: int) -> None:
    """The first ``num_chars`` characters of the embedded text, ``times`` over, as JSON lines."""
    documents, taken = [], 0
    for _, text in python_docs("train"):
        documents.append(json.dumps({"text": text[: num_chars - taken]}) + "\n")
        taken += len(text)
        if taken >= num_chars:
            break
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(times):
            file.writelines(documents)


def peak_bytes(text: Path, out: Path, encoding: str) -> int:
    """Peak resident memory of one capture, in bytes."""
    flags = ["--block-tokens", "128", "--batch-blocks", "8", "--shard-blocks", "32", "--json"]
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "cache-teacher", *flags]
    command += ["--encoding", encoding, *(["--k", "16"] if "k" in used_settings(encoding) else [])]
    command += ["--teacher", str(TEACHER), "--text", str(text), "--out", str(out)]
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=[
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
    ])  # fmt: skip
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"cache-teacher failed with status {status}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chars", type=int, default=60_000, help="size of the smaller corpus")
    parser.add_argument("--times", type=int, default=10, help="how many times larger the other one is")
    parser.add_argument("--encoding", choices=ENCODINGS, default=DEFAULT_ENCODING)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        peaks = {}
        for times in (1, options.times):
            text = Path(name) / f"corpus-{times}.jsonl"
            write_corpus(text, options.chars, times)
            peaks[times] = peak_bytes(text, Path(name) / f"cache-{times}", options.encoding)
    ratio = peaks[options.times] / peaks[1]
    print(
        json.dumps(
            {
                "encoding": options.encoding,
                "peak_bytes": peaks,
                "corpus_ratio": options.times,
                "peak_ratio": round(ratio, 4),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
