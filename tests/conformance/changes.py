"""Apply the changes that a conformance case describes to a copy of a valid cache.

In: a cache folder and the operations of a case, as read from JSON. Out: the folder, changed. The digests here are
computed from the words of ``SPEC.md`` on raw JSON, not by the models of ``cache_spec``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc

from cache_spec.layout import array_specs
from cache_spec.manifest import Manifest
from cache_spec.shardfile import decode_chunk, decode_index, encode_shard

EMPTY = (1 << 64) - 1


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in names}


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """Rule M-4."""
    content = without(manifest, "digest", "fingerprint", "files", "provenance")
    return sha256(canonical({**content, "teacher": without(content["teacher"], "name", "revision")}))


def write_sealed(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON file with a valid ``digest``."""
    body = without(body, "digest")
    path.write_bytes(canonical({**body, "digest": sha256(canonical(body))}))


def delete(cache: Path, *, path: str) -> None:
    (cache / path).unlink()


def flip(cache: Path, *, path: str, at: int) -> None:
    """Change one bit of the byte at an offset; negative ones count from the end."""
    data = bytearray((cache / path).read_bytes())
    data[at] ^= 1
    (cache / path).write_bytes(data)


def write(cache: Path, *, path: str, text: str, repeat: int = 1) -> None:
    (cache / path).parent.mkdir(exist_ok=True)
    (cache / path).write_text(text * repeat)


def folder(cache: Path, *, path: str) -> None:
    """Put a folder in a file's place."""
    (cache / path).unlink()
    (cache / path).mkdir()


def list_file(cache: Path, *, path: str) -> None:
    """Make the digest in ``files`` of the manifest agree with a small file."""
    set_field(cache, path="manifest.json", field=["files", path], value=sha256((cache / path).read_bytes()))


def replace(cache: Path, *, path: str, old: str, new: str) -> None:
    """Replace the one place where a text occurs in a file."""
    text = (cache / path).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path}"
    (cache / path).write_text(text.replace(old, new))


def truncate(cache: Path, *, path: str, keep: int) -> None:
    """Keep the first bytes of a file; with a negative count, drop so many from its end."""
    (cache / path).write_bytes((cache / path).read_bytes()[:keep])


def link(cache: Path, *, path: str) -> None:
    """Move a file out of the cache and leave a symbolic link to it."""
    outside = cache.with_name("outside")
    (cache / path).rename(outside)
    (cache / path).symlink_to(outside)


def exchange(cache: Path, *, path: str, other: str) -> None:
    """Let two files of one size change places."""
    data, others = (cache / path).read_bytes(), (cache / other).read_bytes()
    assert len(data) == len(others)
    assert data != others
    (cache / path).write_bytes(others)
    (cache / other).write_bytes(data)


def set_field(cache: Path, *, path: str, field: list[str], value: object, fingerprint: bool = False) -> None:
    """Set a field of a sealed file and seal it again; ``fingerprint`` renews that of a manifest too."""
    body = json.loads((cache / path).read_bytes())
    place = body
    for part in field[:-1]:
        place = place[part]
    place[field[-1]] = value
    if fingerprint:
        body["fingerprint"] = fingerprint_of(body)
    write_sealed(cache / path, body)


def remove_field(cache: Path, *, path: str, field: list[str]) -> None:
    """Remove a field of a sealed file and seal it again."""
    body = json.loads((cache / path).read_bytes())
    place = body
    for part in field[:-1]:
        place = place[part]
    del place[field[-1]]
    write_sealed(cache / path, body)


def values(cache: Path, *, array: str, at: list[int], value: Any) -> None:
    """Write a number, a list of them, or "nan", "inf", "-inf" at an index of an array, its first axis the block."""
    manifest = Manifest.from_json((cache / "manifest.json").read_bytes(), cache)
    spec = array_specs(manifest)[array]
    shard, row = divmod(at[0], spec.shard_blocks)
    num_rows = manifest.blocks.shard_range(shard)[1]
    path = cache / spec.shard_path(shard)
    data = path.read_bytes()
    ranges = decode_index(spec, data[-16 * spec.chunks_in_shard - 4 :], len(data), num_rows, path).tolist()
    rows = np.empty((len(ranges) * spec.chunk_blocks, *spec.row_shape), spec.dtype)
    for chunk, (offset, size) in enumerate(ranges):
        part = rows[chunk * spec.chunk_blocks : (chunk + 1) * spec.chunk_blocks]
        decode_chunk(spec, data[offset : offset + size], part, path)
    rows[(row, *at[1:])] = float(value) if isinstance(value, str) else value
    path.write_bytes(encode_shard(spec, rows[:num_rows]))


def table(cache: Path, *, name: str, at: list[int], value: float | str, listed: bool = False) -> None:
    """Change a value of a table, with zarr-python; ``listed`` makes the manifest agree."""
    array: Any = zarr.open_array(cache / name, mode="r+")
    array[tuple(at)] = float(value) if isinstance(value, str) else value
    if listed:
        digest = sha256(np.ascontiguousarray(array[:]).tobytes())
        set_field(cache, path="manifest.json", field=["tables", name], value=digest, fingerprint=True)


def pack(cache: Path, *, path: str, at: int, put: str) -> None:
    """Put hexadecimal bytes into the Blosc frame of a table's chunk; its checksum stays valid."""
    data, new = (cache / path).read_bytes()[:-4], bytes.fromhex(put)
    data = data[:at] + new + data[at + len(new) :]
    (cache / path).write_bytes(data + crc32c(data))


def bomb(cache: Path, *, path: str, num_bytes: int) -> None:
    """Write a valid chunk of so many zeros, a small file."""
    data = blosc.compress(bytes(num_bytes), b"zstd", 3, blosc.SHUFFLE, typesize=4)
    (cache / path).write_bytes(data + crc32c(data))


def index(cache: Path, *, path: str, num_chunks: int, chunk: int, entry: list[int] | None) -> None:
    """Rewrite an entry of a shard's index, offset and size, or empty it; the index stays valid."""
    data = (cache / path).read_bytes()
    table = bytearray(data[-16 * num_chunks - 4 : -4])
    struct.pack_into("<QQ", table, 16 * chunk, *(entry or [EMPTY, EMPTY]))
    (cache / path).write_bytes(data[: -16 * num_chunks - 4] + table + crc32c(bytes(table)))


def frame(cache: Path, *, path: str, num_chunks: int, keep: int | None = None, at: int = 0, put: str = "") -> None:
    """Cut the first chunk's Blosc frame, or put hexadecimal bytes into it; checksums and index stay valid."""
    data = (cache / path).read_bytes()
    index_at = len(data) - 16 * num_chunks - 4
    table = np.frombuffer(data[index_at:-4], "<u8").reshape(-1, 2).copy()
    parts = [data[offset : offset + size - 4] if offset != EMPTY else None for offset, size in table.tolist()]
    assert parts[0] is not None
    new = bytes.fromhex(put)
    parts[0] = (parts[0][:at] + new + parts[0][at + len(new) :])[:keep]
    out = b""
    for number, part in enumerate(parts):
        if part is not None:
            table[number] = len(out), len(part) + 4
            out += part + crc32c(part)
    (cache / path).write_bytes(out + table.tobytes() + crc32c(table.tobytes()))


def reissue(cache: Path, *, seal: bool = True) -> None:
    """Make receipts, and the seal, agree with the manifest and the files as they are now."""
    manifest = json.loads((cache / "manifest.json").read_bytes())
    receipts = sorted((cache / "receipts").iterdir())
    for path in receipts:
        body = json.loads(path.read_bytes())
        body["fingerprint"] = manifest["fingerprint"]
        for name, file in body["files"].items():
            data = next((cache / name).glob(f"c.{body['shard']}*")).read_bytes()
            metadata = json.loads((cache / name / "zarr.json").read_bytes())
            inner = metadata["codecs"][0]["configuration"]["chunk_shape"]
            num_chunks = metadata["chunk_grid"]["configuration"]["chunk_shape"][0] // inner[0]
            end = google_crc32c.value(data[-16 * num_chunks - 8 : -4])
            file.update(num_bytes=len(data), end_crc32c=end, sha256=sha256(data))
        write_sealed(path, body)
    if seal:
        digest = sha256(b"".join(path.read_bytes() for path in receipts))
        body = json.loads((cache / "seal.json").read_bytes())
        write_sealed(cache / "seal.json", {**body, "fingerprint": manifest["fingerprint"], "receipts_sha256": digest})


def crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


OPERATIONS: dict[str, Callable[..., None]] = {
    operation.__name__: operation
    for operation in (
        delete,
        flip,
        write,
        folder,
        list_file,
        replace,
        truncate,
        link,
        exchange,
        set_field,
        remove_field,
        values,
        table,
        pack,
        bomb,
        index,
        frame,
        reissue,
    )
}


def copy_changed(base: Path, cache: Path, changes: list[dict[str, Any]]) -> None:
    """Copy a valid cache to ``cache`` and apply ``changes`` in order."""
    shutil.copytree(base, cache)
    for change in changes:
        OPERATIONS[change["do"]](cache, **without(change, "do"))
