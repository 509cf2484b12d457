"""A cache written by kdpipe reads back equal, here and in zarr-python; what is damaged is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from cache_spec.commit import commit_shard, create_cache
from cache_spec.encodings.hidden import Hidden
from cache_spec.errors import BadInputError, CacheError
from cache_spec.layout import array_specs, zarr_metadata
from cache_spec.manifest import Manifest, differences, sha256_hex
from cache_spec.reader import CacheReader
from cache_spec.receipts import read_receipt, receipt_path, write_seal
from cache_spec.tables import read_table
from cache_spec.targets import Array, HeadTargets, HiddenTargets, PointTargets, Targets
from cache_spec.validate import verify_cache
from tests.conformance.generate import VALID
from tests.refusals import refused
from tests.synthetic import ENCODINGS, make_manifest, make_rows, make_tables, shard_rows, write_cache


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


def test_a_batch_holds_a_descending_head_and_the_tail_of_its_temperature(cache: Path) -> None:
    reader = CacheReader.open(cache)
    cold, hot = (head_targets(reader, [2, 5], temperature) for temperature in reader.manifest.temperatures)
    np.testing.assert_array_equal(cold.ids_BTK, hot.ids_BTK)
    np.testing.assert_array_equal(cold.logprobs_BTK, hot.logprobs_BTK)
    assert (np.diff(cold.logprobs_BTK, axis=-1) <= 0).all()
    assert (hot.tail_log_odds_BT > cold.tail_log_odds_BT).all(), "heat moves mass to the tail"


def head_targets(reader: CacheReader, blocks: list[int], temperature: float) -> HeadTargets:
    targets = reader.batch(blocks, temperature).targets
    assert isinstance(targets, HeadTargets)
    return targets


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("topk", HeadTargets),
        ("prototype", HeadTargets),
        ("sampled", PointTargets),
        ("sparsified", PointTargets),
        ("hidden", HiddenTargets),
    ],
)
def test_every_encoding_is_written_verified_and_decoded(tmp_path: Path, name: str, kind: type[Targets]) -> None:
    manifest = make_manifest(encoding=ENCODINGS[name], hidden_dtype="int8")
    rows, tables = make_rows(manifest), make_tables(manifest)
    write_cache(tmp_path, manifest, rows)
    assert verify_cache(tmp_path) == []
    reader = CacheReader.open(tmp_path)
    batch = reader.batch([3, 0], 2.0)
    assert isinstance(batch.targets, kind)
    assert batch.hidden_BWD is not None
    np.testing.assert_array_equal(batch.hidden_BWD, (rows["hidden"] * rows["hidden_scale"][:, None])[[3, 0]])
    assert set(tables) == set(reader.manifest.tables)
    for table, values in tables.items():
        np.testing.assert_array_equal(reader.table(table), values)


def test_a_cache_of_hidden_states_serves_any_positive_temperature(tmp_path: Path) -> None:
    manifest = make_manifest(encoding=ENCODINGS["hidden"], temperatures=(1.0,))
    write_cache(tmp_path, manifest, make_rows(manifest))
    reader = CacheReader.open(tmp_path)
    first, second = (reader.batch([1], temperature).targets for temperature in (1.0, 0.7))
    assert isinstance(first, HiddenTargets)
    assert isinstance(second, HiddenTargets)
    np.testing.assert_array_equal(first.hidden_BTD, second.hidden_BTD)
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        refused("undeclared-temperature", reader.batch, [1], temperature)


def test_large_tables_lie_in_chunks_and_read_back_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, the last of them padded; zeros are written too."""
    monkeypatch.setattr("cache_spec.layout.TABLE_CHUNK_BYTES", 1000)
    manifest = make_manifest(encoding=ENCODINGS["prototype"].model_copy(update={"prototypes": 23}))
    rows, tables = make_rows(manifest), make_tables(manifest)
    manifest = write_cache(tmp_path, manifest, rows)
    assert len(list((tmp_path / "prototypes").glob("c.*"))) == 2 * 3
    np.testing.assert_array_equal(read_table(tmp_path, manifest, "prototypes"), tables["prototypes"])
    group = zarr.open_group(tmp_path, mode="r")
    np.testing.assert_array_equal(np.asarray(group["prototypes"]), tables["prototypes"])
    assert verify_cache(tmp_path) == []


def test_a_table_of_zeros_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    manifest = make_manifest(encoding=ENCODINGS["prototype"])
    tables = make_tables(manifest)
    tables["prototypes"][1] = 0
    manifest = create_cache(tmp_path, manifest, tables)
    np.testing.assert_array_equal(read_table(tmp_path, manifest, "prototypes"), tables["prototypes"])
    (tmp_path / "prototypes" / "c.1.0.0").unlink()
    refused("missing-table", read_table, tmp_path, manifest, "prototypes")


def test_a_reader_refuses_every_changed_byte_of_a_table(tmp_path: Path) -> None:
    manifest = make_manifest(encoding=ENCODINGS["prototype"])
    manifest = create_cache(tmp_path, manifest, make_tables(manifest))
    path = tmp_path / "prototypes" / "c.1.0.0"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
        refused("table-mismatch", read_table, tmp_path, manifest, "prototypes")
    for size in range(len(data)):
        path.write_bytes(data[:size])
        refused("table-mismatch", read_table, tmp_path, manifest, "prototypes")


def test_a_table_beyond_any_memory_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    long = make_manifest(vocab_size=1 << 30, encoding=Hidden(bias=True))
    message = refused("bad-chunk", read_table, tmp_path, long, "output_bias")
    assert f"expected at most {1 << 30} bytes in a chunk, found {1 << 32}" in message
    large = make_manifest(vocab_size=1 << 19, hidden_size=1 << 17, window=None, encoding=Hidden())
    message = refused("bad-chunk", read_table, tmp_path, large, "output_head")
    assert f"expected at most {1 << 36} bytes in a table, found {1 << 38}" in message


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
    path.write_bytes(seal_json({**body, "format_version": 3, "unheard_of": 1}))
    with pytest.raises(CacheError, match=r"unknown-version.*expected format_version 2, found 3"):
        CacheReader.open(cache)


def test_fingerprint_covers_what_changes_bytes_and_nothing_else() -> None:
    base = make_manifest()
    assert make_manifest(k=4).fingerprint != base.fingerprint
    assert make_manifest(temperatures=(1.0,)).fingerprint != base.fingerprint
    assert base.model_copy(update={"provenance": {"host": "other"}}).fingerprint == base.fingerprint
    assert differences(base, make_manifest(k=4)) == ["encoding.k: 5, now 4"]


def test_manifest_bytes_round_trip_and_any_changed_byte_is_refused() -> None:
    data = make_manifest(encoding=ENCODINGS["prototype"]).to_json()
    assert Manifest.from_json(data, "manifest").to_json() == data
    for position in range(len(data)):
        with pytest.raises(CacheError):
            Manifest.from_json(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :], "manifest")


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
        ("hidden", lambda a: np.full_like(a, np.inf), "non-finite"),
        ("tail_log_odds", lambda a: np.full_like(a, 1000), "bad-tail-mass"),
        ("tail_log_odds", lambda a: np.full_like(a, -1000), "mass-not-one"),
        ("tail_log_odds", lambda a: np.ascontiguousarray(a[:, ::-1]), "bad-tail-mass"),
        ("head_gaps", lambda a: np.full_like(a, 100), "gap-overflow"),
        ("head_gaps", lambda a: np.full_like(a, 0), "mass-not-one"),
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


def test_verify_finds_every_single_byte_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 places of a golden cache with tables: half in files chosen at random, half by their sizes."""
    implied: dict[bytes, dict[str, bytes]] = {}

    def implied_metadata(manifest: Manifest) -> dict[str, bytes]:
        if manifest.to_json() not in implied:
            implied[manifest.to_json()] = zarr_metadata(manifest)
        return implied[manifest.to_json()]

    # It follows from the manifest alone, and to make it is most of the time that such a small cache takes.
    monkeypatch.setattr("cache_spec.validate.zarr_metadata", implied_metadata)
    cache = shutil.copytree(VALID / "prototype", tmp_path / "cache")
    rng = np.random.default_rng(5)
    files = [p for p in sorted(cache.rglob("*")) if p.is_file() and p.stat().st_size]
    changes = [files[at] for at in rng.integers(len(files), size=100)]
    sizes = np.array([path.stat().st_size for path in files])
    changes += [files[at] for at in rng.choice(len(files), size=100, p=sizes / sizes.sum())]
    for path in changes:
        data = path.read_bytes()
        position = int(rng.integers(len(data)))
        path.write_bytes(data[:position] + bytes([data[position] ^ int(rng.integers(1, 256))]) + data[position + 1 :])
        assert verify_cache(cache), f"{path} byte {position}"
        path.write_bytes(data)
    assert verify_cache(cache) == []


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
