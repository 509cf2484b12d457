"""A cache written by kdpipe reads back equal, here and in zarr-python; what is damaged is refused by name."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache_spec.commit import commit_shard, create_cache
from cache_spec.errors import BadInputError, CacheError
from cache_spec.layout import array_specs
from cache_spec.manifest import Manifest, differences, sha256_hex
from cache_spec.reader import CacheReader
from cache_spec.receipts import read_receipt, receipt_path, write_seal
from cache_spec.shardfile import Array
from cache_spec.topk import decode_gaps
from cache_spec.validate import verify_cache
from tests.synthetic import make_manifest, make_rows, shard_rows, write_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    manifest = make_manifest()
    write_cache(tmp_path / "cache", manifest, make_rows(manifest))
    return tmp_path / "cache"


def test_every_array_reads_back_as_written_in_any_order(cache: Path) -> None:
    rows = make_rows(make_manifest())
    reader = CacheReader.open(cache)
    order = [6, 0, 3, 3, 5, 1]
    assert set(rows) == set(array_specs(reader.manifest))
    for name, values in rows.items():
        np.testing.assert_array_equal(reader.read(name, order), values[order], err_msg=name)
        assert reader.read(name, order).dtype == values.dtype


def test_zarr_python_reads_equal_values_and_descriptions(cache: Path) -> None:
    rows = make_rows(make_manifest())
    group = zarr.open_group(cache, mode="r")
    for name, values in rows.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(array[:], values, err_msg=name)
        assert array.attrs["description"]
        assert array.metadata.dimension_names[0] == "block"  # type: ignore[union-attr,index]


def test_what_zarr_python_writes_is_read_by_the_direct_path(cache: Path) -> None:
    """Same bytes on both sides: rewriting a shard with zarr-python leaves our digests valid."""
    reader = CacheReader.open(cache)
    group = zarr.open_group(cache, mode="r+")
    for name in ("head_ids", "head_gaps", "hidden", "block_loss"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        path = cache / reader.specs[name].shard_path(0)
        before = path.read_bytes()
        array[0:3] = np.asarray(array[0:3])
        assert path.stat().st_size == len(before)
        np.testing.assert_array_equal(CacheReader.open(cache).read(name, [0, 1, 2]), np.asarray(array[0:3]))


def test_batch_holds_logprobs_normalised_at_each_temperature(cache: Path) -> None:
    reader = CacheReader.open(cache)
    for temperature in reader.manifest.temperatures:
        batch = reader.batch([2, 5], temperature)
        head = np.exp(batch.head_logprobs_BTK / temperature - batch.log_normaliser_BT[..., None])
        total = head.sum(-1) + np.exp(batch.log_tail_mass_BT)
        np.testing.assert_allclose(total, 1.0, atol=reader.manifest.encoding.step_nats)
        assert (np.diff(batch.head_logprobs_BTK, axis=-1) <= 0).all()


def test_an_undeclared_temperature_is_refused_with_the_grid(cache: Path) -> None:
    with pytest.raises(BadInputError, match="undeclared-temperature: temperature 3, expected one of 1, 2"):
        CacheReader.open(cache).batch([0], 3.0)


def test_a_block_outside_the_cache_is_refused(cache: Path) -> None:
    with pytest.raises(BadInputError, match="no-such-block"):
        CacheReader.open(cache).read("input_ids", [7])


def test_a_missing_seal_or_receipt_means_unfinished(tmp_path: Path) -> None:
    manifest = make_manifest()
    rows = make_rows(manifest)
    manifest = create_cache(tmp_path, manifest)
    commit_shard(tmp_path, manifest, 1, shard_rows(manifest, rows, 1))
    with pytest.raises(CacheError, match=r"unfinished-cache.*expected 3 shards and a seal, found 1 shards"):
        CacheReader.open(tmp_path)
    with pytest.raises(CacheError, match="unfinished-cache"):
        write_seal(tmp_path, manifest)


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not-a-cache"):
        CacheReader.open(tmp_path)


def test_the_first_commit_wins_and_the_twin_leaves_no_trace(cache: Path) -> None:
    manifest = CacheReader.open(cache).manifest
    before = {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    other = make_rows(manifest, seed=9)
    receipt = commit_shard(cache, manifest, 0, shard_rows(manifest, other, 0))
    assert receipt == read_receipt(cache, manifest, 0)
    assert {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()} == before


def test_orphans_of_a_killed_commit_are_replaced(tmp_path: Path) -> None:
    manifest = make_manifest()
    rows = make_rows(manifest)
    manifest = create_cache(tmp_path, manifest)
    orphan = tmp_path / array_specs(manifest)["head_ids"].shard_path(0)
    orphan.write_bytes(b"half a shard of somebody else")
    for shard in range(3):
        commit_shard(tmp_path, manifest, shard, shard_rows(manifest, rows, shard))
    write_seal(tmp_path, manifest)
    np.testing.assert_array_equal(CacheReader.open(tmp_path).read("head_ids", [0]), rows["head_ids"][:1])


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda data: data[:-1], "truncated-shard"),
        (lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "shard-index-checksum"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "chunk-checksum"),
        (lambda data: b"", "truncated-shard"),
    ],
)
def test_a_damaged_shard_is_refused_by_kind(cache: Path, damage: object, kind: str) -> None:
    path = cache / array_specs(make_manifest())["head_ids"].shard_path(0)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CacheError) as caught:
        CacheReader.open(cache).batch([0], 1.0)
    assert caught.value.kind == kind
    assert "head_ids/c.0.0.0" in str(caught.value)


def test_a_missing_or_linked_shard_is_refused(cache: Path) -> None:
    path = cache / array_specs(make_manifest())["input_ids"].shard_path(0)
    moved = path.rename(path.with_name("elsewhere"))
    with pytest.raises(CacheError, match="missing-shard"):
        CacheReader.open(cache).read("input_ids", [0])
    path.symlink_to(moved)
    with pytest.raises(CacheError, match="missing-shard"):
        CacheReader.open(cache).read("input_ids", [0])


def test_a_receipt_of_another_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    other = make_manifest(k=4)
    write_cache(tmp_path / "other", other, make_rows(other))
    receipt_path(cache, 0).write_bytes(receipt_path(tmp_path / "other", 0).read_bytes())
    with pytest.raises(CacheError, match="foreign-receipt"):
        CacheReader.open(cache).read("input_ids", [0])


def test_an_unknown_version_is_refused_before_anything_else(cache: Path) -> None:
    from cache_spec.manifest import load_sealed, seal_json

    path = cache / "manifest.json"
    body = load_sealed(path.read_bytes(), path)
    path.write_bytes(seal_json({**body, "format_version": 2, "unheard_of": 1}))
    with pytest.raises(CacheError, match=r"unknown-version.*expected format_version 1, found 2"):
        CacheReader.open(cache)


def test_fingerprint_covers_what_changes_bytes_and_nothing_else() -> None:
    base = make_manifest()
    assert make_manifest(k=4).fingerprint != base.fingerprint
    assert make_manifest(temperatures=(1.0,)).fingerprint != base.fingerprint
    assert base.model_copy(update={"provenance": {"host": "other"}}).fingerprint == base.fingerprint
    assert differences(base, make_manifest(k=4)) == ["encoding.k: 5, now 4"]


def test_manifest_bytes_round_trip_and_any_changed_byte_is_refused() -> None:
    data = make_manifest().to_json()
    assert Manifest.from_json(data, "manifest").to_json() == data
    for position in range(len(data)):
        with pytest.raises(CacheError):
            Manifest.from_json(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :], "manifest")


def test_gaps_that_overflow_are_refused() -> None:
    gaps = np.full((1, 3, 2), 40_000, np.uint16)
    with pytest.raises(CacheError, match="gap-overflow"):
        decode_gaps(gaps, 1 / 256)


def test_verify_finds_nothing_in_a_whole_cache(cache: Path) -> None:
    assert verify_cache(cache) == []


def test_verify_reports_all_problems_at_once(cache: Path) -> None:
    specs = array_specs(make_manifest())
    flipped = cache / specs["head_gaps"].shard_path(0)
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    (cache / specs["hidden"].shard_path(2)).unlink()
    (cache / "head_ids" / "zarr.json").write_bytes(b"{}")
    receipt_path(cache, 1).write_bytes(b"not json")
    (cache / "notes.txt").write_text("mine")
    kinds = {problem.kind for problem in verify_cache(cache)}
    assert kinds >= {"shard-digest", "missing-shard", "file-mismatch", "broken-json", "unexpected-file"}


def test_verify_names_an_unfinished_cache(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_cache(tmp_path, manifest, make_rows(manifest), seal=False)
    assert [problem.kind for problem in verify_cache(tmp_path)] == ["unfinished-cache"]


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("input_ids", lambda a: np.full_like(a, 50), "id-out-of-range"),
        ("head_ids", lambda a: np.zeros_like(a), "repeated-id"),
        ("block_lengths", lambda a: np.zeros_like(a), "bad-length"),
        ("log_normaliser", lambda a: np.full_like(a, np.nan), "non-finite"),
        ("hidden", lambda a: np.full_like(a, np.inf), "non-finite"),
        ("log_tail_mass", lambda a: np.full_like(a, 1), "bad-tail-mass"),
        ("log_tail_mass", lambda a: np.full_like(a, 0), "mass-not-one"),
        ("head_gaps", lambda a: np.full_like(a, 60_000), "gap-overflow"),
    ],
)
def test_verify_finds_meaningless_values_under_valid_digests(
    tmp_path: Path, name: str, change: Callable[[Array], Array], kind: str
) -> None:
    manifest = make_manifest()
    rows = make_rows(manifest)
    write_cache(tmp_path, manifest, {**rows, name: change(rows[name])})
    assert kind in {problem.kind for problem in verify_cache(tmp_path)}


def test_verify_refuses_paths_that_leave_the_cache(tmp_path: Path) -> None:
    manifest = make_manifest().model_copy(update={"files": {"../outside.json": "0" * 64}})
    write_cache(tmp_path / "cache", manifest, make_rows(manifest))
    assert [problem.kind for problem in verify_cache(tmp_path / "cache")] == ["unsafe-path"]


def test_verify_finds_every_single_byte_change(tmp_path: Path) -> None:
    manifest = make_manifest(num_blocks=2, shard_blocks=2)
    write_cache(tmp_path, manifest, make_rows(manifest))
    rng = np.random.default_rng(5)
    files = [p for p in sorted(tmp_path.rglob("*")) if p.is_file() and p.stat().st_size]
    for _ in range(60):
        path = files[rng.integers(len(files))]
        data = path.read_bytes()
        position = int(rng.integers(len(data)))
        path.write_bytes(data[:position] + bytes([data[position] ^ int(rng.integers(1, 256))]) + data[position + 1 :])
        assert verify_cache(tmp_path), f"{path} byte {position}"
        path.write_bytes(data)
    assert verify_cache(tmp_path) == []


def test_a_file_system_without_hard_links_still_publishes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    manifest = make_manifest()
    rows = make_rows(manifest)
    manifest = write_cache(tmp_path, manifest, rows)
    commit_shard(tmp_path, manifest, 0, shard_rows(manifest, make_rows(manifest, seed=9), 0))
    assert verify_cache(tmp_path) == []
    np.testing.assert_array_equal(CacheReader.open(tmp_path).read("head_ids", [0]), rows["head_ids"][:1])


def test_metadata_with_empty_members_says_the_same(tmp_path: Path) -> None:
    """Some versions of zarr-python write members that others leave out; a cache opens with all of them."""
    manifest = make_manifest()
    metadata = tmp_path / "zarr.json"
    manifest = write_cache(tmp_path, manifest, make_rows(manifest))
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "consolidated_metadata": None}))
    files = {**manifest.files, "zarr.json": sha256_hex(metadata.read_bytes())}
    (tmp_path / "manifest.json").write_bytes(manifest.model_copy(update={"files": files}).to_json())
    assert verify_cache(tmp_path) == []
