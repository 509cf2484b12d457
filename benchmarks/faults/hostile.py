"""Caches that somebody made to do harm: each is refused by a typed error, in little memory and time.

In: how many, or all: the broken rules of ``tests/conformance/invalid`` and what is listed here. Out: counts. Each is
verified and read in a process of its own. A case is wrong if neither refuses it and it holds other values than the
cache that it was made from, if an error is not a typed one, if memory grows by 256 MB or if it takes a processor 2 s.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults.flips import same_values, values_read
from benchmarks.faults.forked import forked, outcome
from benchmarks.faults.small import SmallCaptures
from benchmarks.faults.tally import Tally
from cache_spec.errors import CacheError
from cache_spec.layout import array_specs
from cache_spec.receipts import read_manifest
from cache_spec.validate import verify_cache
from tests.conformance import changes
from tests.conformance.generate import VALID

MAX_BYTES, MAX_S = 256_000_000, 2.0
_GUARD_BYTES = 3 << 30
"""Address space of each process beyond what it begins with: a bomb takes no more of this machine."""
_PATIENCE_S = 20.0
_LARGE = 1 << 30
_MANIFEST, _SEAL, _RECEIPT = "manifest.json", "seal.json", "receipts/00000000.json"
_SHARD, _METADATA, _TABLE = "head_ids/c.0.0.0", "head_ids/zarr.json", "output_bias/c.0"

Harm = Callable[[Path], object]


def _grown(cache: Path, path: str) -> None:
    """1 GB that takes no space: zeros behind what is there."""
    os.truncate(cache / path, _LARGE)


def _text(cache: Path, path: str, begin: str, part: str, num_bytes: int) -> None:
    (cache / path).write_text(begin + part * (num_bytes // len(part)))


def _many_keys(cache: Path, count: int) -> None:
    keys = {f"{number}": number for number in range(count)}
    changes.write_sealed(cache / _MANIFEST, json.loads((cache / _MANIFEST).read_bytes()) | keys)


def _pipe(cache: Path, path: str) -> None:
    (cache / path).unlink()
    os.mkfifo(cache / path)


def _linked(cache: Path, path: str, target: str) -> None:
    (cache / path).unlink()
    (cache / path).symlink_to(target)


def _set(cache: Path, field: str, value: object) -> None:
    """Another value in the manifest, that everything else agrees with."""
    changes.set_field(cache, path=_MANIFEST, field=field.split("."), value=value, fingerprint=True)
    changes.reissue(cache)


def _listed(cache: Path, name: str) -> None:
    """A small file of that name in the manifest."""
    changes.set_field(cache, path=_MANIFEST, field=["files", name], value="0" * 64)


def _in_receipt(cache: Path, field: str, value: object) -> None:
    changes.set_field(cache, path=_RECEIPT, field=field.split("."), value=value)


def _metadata(cache: Path, **members: object) -> None:
    """Other members in an array's metadata, which the manifest lists as they are."""
    body = json.loads((cache / _METADATA).read_bytes())
    (cache / _METADATA).write_text(json.dumps(body | members))
    changes.list_file(cache, path=_METADATA)


def _again(cache: Path, path: str) -> None:
    """A key twice."""
    data = (cache / path).read_bytes()
    (cache / path).write_bytes(b'{"digest":"",' + data[1:])


def _replaced(cache: Path, path: str, old: str, new: str) -> None:
    text = (cache / path).read_text()
    assert old in text, (path, old)
    (cache / path).write_text(text.replace(old, new, 1))


def _framed(cache: Path, at: int, put: str) -> None:
    """Another byte in the header of a Blosc frame, with checksums, receipts and seal that agree."""
    manifest = read_manifest(cache)
    changes.frame(cache, path=_SHARD, num_chunks=array_specs(manifest)["head_ids"].chunks_in_shard, at=at, put=put)
    changes.reissue(cache)


def _hollow(cache: Path, *, chunk_bytes: int | None) -> None:
    """A shard of 1 GB whose index, receipt and seal agree with it; its first chunk may be nearly all of that."""
    num_chunks = array_specs(read_manifest(cache))["head_ids"].chunks_in_shard
    path = cache / _SHARD
    data = path.read_bytes()
    table = bytearray(data[-16 * num_chunks - 4 : -4])
    if chunk_bytes is not None:
        struct.pack_into("<QQ", table, 0, 0, chunk_bytes)
    with open(path, "r+b") as file:
        file.seek(_LARGE - len(table) - 4)
        file.write(bytes(table) + changes.crc32c(bytes(table)))
    changes.reissue(cache)


def _own_cases() -> dict[str, tuple[str, Harm]]:
    """Name to the golden cache that it starts from, and what is done to a copy."""
    cases: dict[str, tuple[str, Harm]] = {}

    def add(name: str, harm: Harm, base: str = "plain") -> None:
        assert name not in cases
        cases[name] = (base, harm)

    for path in (_MANIFEST, _SEAL, _RECEIPT, _SHARD, _METADATA, _TABLE):
        base = "hidden-int8" if path == _TABLE else "plain"
        add(f"1 GB of {path}", partial(_grown, path=path), base)
        add(f"a pipe at {path}", partial(_pipe, path=path), base)
        add(f"endless zeros at {path}", partial(_linked, path=path, target="/dev/zero"), base)
        add(f"a link to itself at {path}", partial(_linked, path=path, target=path.rpartition("/")[2]), base)
    for path in (_MANIFEST, _SEAL, _RECEIPT):
        add(f"a key twice in {path}", partial(_again, path=path))
        for what, begin, part in (
            ("lists", '{"digest":[', "[],"),
            ("open lists", "", "["),
            ("open objects", "", '{"a":'),
            ("digits", '{"digest":', "9"),
            ("words", '{"digest":"', "a"),
            ("keys", '{"digest":0,', '"a":{},'),
            ("broken characters", '{"digest":"', "\\ud800"),
        ):
            add(f"8 MB of {what} in {path}", partial(_text, path=path, begin=begin, part=part, num_bytes=8_000_000))
            add(f"200 kB of {what} in {path}", partial(_text, path=path, begin=begin, part=part, num_bytes=200_000))
    for field in (
        "blocks.num_blocks", "blocks.block_tokens", "blocks.shard_blocks", "teacher.vocab_size", "teacher.hidden_size",
        "encoding.k", "encoding.levels", "hidden.window", "corpus.num_tokens", "compute.batch_blocks",
    ):  # fmt: skip
        for value in (-1, 1 << 60, 10**400):
            if (field, value) not in {("teacher.hidden_size", 1 << 60), ("compute.batch_blocks", 1 << 60)}:
                add(f"{field} of {value:.3g}" if value < 1e9 else f"{field} of 2^60 or more, {len(str(value))} digits",
                    partial(_set, field=field, value=value))  # fmt: skip
    add("states of 2^60", partial(_set, field="teacher.hidden_size", value=1 << 60))
    add("prototypes of 2^60", partial(_set, field="encoding.prototypes", value=1 << 60), "prototype")
    for count in (2_000, 100_000, 1_000_000):
        temperatures = [1 + number / 1e6 for number in range(count)]
        add(f"{count} temperatures", partial(_set, field="temperatures", value=temperatures))
    for count in (10_000, 100_000, 450_000):
        add(f"{count} unknown keys", partial(_many_keys, count=count))
    add("a temperature that is no number", partial(_replaced, path=_MANIFEST, old="[1.0,", new="[NaN,"))
    for name in ("../outside", "/etc/passwd", "a/../../outside", "..", "", ".", "a\\..\\b", "a\x00b", "x" * 5000,
                 "receipts", "/dev/zero"):  # fmt: skip
        add(f"a file named {name[:20]!a}", partial(_listed, name=name))
    strange: tuple[Any, ...] = (-1, 0, 1 << 60, 10**400, 1.5, "1", None, True, [], {})
    for other in strange:
        add(f"num_bytes {other!s:.12}", partial(_in_receipt, field="files.head_ids.num_bytes", value=other))
    add("NaN in a receipt", partial(_replaced, path=_RECEIPT, old='"num_blocks":2', new='"num_blocks":NaN'))
    add("a receipt of shard 2^60", partial(_in_receipt, field="shard", value=1 << 60))
    shape: Any
    for shape in ([-1, 8, 5], [1 << 60, 8, 5], ["a"], [1e400], {}):
        add(f"metadata of shape {shape}", partial(_metadata, shape=shape))
    for dtype in ("object", "|O", "-int8", "python.pickle", {"name": "object"}):
        add(f"metadata of type {dtype}", partial(_metadata, data_type=dtype))
    for codec in ("pickle", "../codec", "numcodecs.pickle", ""):
        add(f"metadata of codec {codec!r}", partial(_metadata, codecs=[{"name": codec}]))
    add("metadata with an unknown extension", partial(_metadata, storage_transformers=[{"name": "run"}]))
    for at in range(16):
        for put in ("00", "ff"):
            add(f"byte {at} of a Blosc header is {put}", partial(_framed, at=at, put=put))
    add("a shard of 1 GB with a gap", partial(_hollow, chunk_bytes=None))
    add("a chunk of 1 GB in a shard of as much", partial(_hollow, chunk_bytes=_LARGE - 1000))
    return cases


def _cases() -> dict[str, tuple[str, Harm]]:
    cases = _own_cases()
    for path in sorted(VALID.with_name("invalid").glob("*.json")):
        case = json.loads(path.read_text())
        if case["verify"]:  # others are about what a reader is asked for

            def harm(cache: Path, steps: list[dict[str, Any]] = case["changes"]) -> None:
                for step in steps:
                    changes.OPERATIONS[step["do"]](cache, **changes.without(step, "do"))

            cases[path.stem] = (case["base"], harm)
    return cases


def _status(name: str) -> int:
    """A size of this process in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _examine(cache: Path, expected: dict[str, Any], told: Path) -> None:
    """Verify and read a cache, and write down what that was like."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _status("VmRSS")
    limit = _status("VmSize") + _GUARD_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found: dict[str, Any] = {"refused_by": [], "untyped": [], "seconds": 0.0, "same": True}
    look: Callable[[Path], Any]
    for name, look in (("verify", verify_cache), ("reader", values_read)):
        began = time.process_time()
        try:
            result: Any = look(cache)
            if name == "verify" and result:
                found["refused_by"].append(name)
            if name == "reader":
                found["same"] = same_values(result, expected)
        except CacheError:
            found["refused_by"].append(name)
        except BaseException as error:
            found["untyped"].append(f"{name}: {error!r:.200}")
        found["seconds"] = max(found["seconds"], time.process_time() - began)
    found["bytes"] = _status("VmHWM") - before
    told.write_text(json.dumps(found))


def hostile_campaign(small: SmallCaptures, num_cases: int, rng: random.Random) -> dict[str, Any]:
    """Examine ``num_cases`` caches, or all that there are."""
    home, told, log, tally = small.folder / "hostile", small.folder / "told.json", small.folder / "log", Tally()
    cases = _cases()
    expected: dict[str, dict[str, Any]] = {}
    largest_bytes, longest_s = 0, 0.0
    chosen = rng.sample(sorted(cases), min(num_cases, len(cases)))
    for name in chosen:
        base, harm = cases[name]
        if base not in expected:
            expected[base] = values_read(VALID / base)
        home.mkdir()
        harm(Path(shutil.copytree(VALID / base, home / "cache")))
        told.unlink(missing_ok=True)
        child = forked(partial(_examine, home / "cache", expected[base], told), log)
        child.join(timeout=_PATIENCE_S)
        if child.is_alive():
            child.kill()
            child.join()
        shutil.rmtree(home)
        tally.check(told.exists(), f"{name}: no end: {outcome(child, log)}")
        if not told.exists():
            continue
        found = json.loads(told.read_text())
        longest_s, largest_bytes = max(longest_s, found["seconds"]), max(largest_bytes, found["bytes"])
        refused = bool(found["refused_by"])
        tally.counts["refused" if refused else "harmless" if found["same"] else "accepted"] += 1
        tally.counts["refused_by_the_reader"] += "reader" in found["refused_by"]
        tally.check(refused or found["same"], f"{name}: accepted")
        tally.check(not found["untyped"], f"{name}: {found['untyped']}")
        tally.check(found["bytes"] < MAX_BYTES, f"{name}: {found['bytes']} bytes")
        tally.check(found["seconds"] < MAX_S, f"{name}: {found['seconds']:.1f} s")
    facts = {"largest_bytes": largest_bytes, "longest_s": round(longest_s, 2)}
    return tally.report(cases=len(chosen), **facts)
