"""Listings: what is missing, stray or cut is found by names and sizes, and noted sizes are those of the receipts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_spec.listing import SIZES_NAME, list_cache, note_sizes, sealed_sizes, sizes_on_disk, whole_shards
from cache_spec.manifest import Manifest
from cache_spec.receipts import Seal, read_seal, receipt_path
from cache_spec.validate import verify_cache, verify_names
from pipeline import folder
from tests.synthetic import make_manifest, make_rows, write_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def manifest(cache: Path) -> Manifest:
    manifest = make_manifest()
    return write_cache(cache, manifest, make_rows(manifest))


def seal_of(cache: Path, manifest: Manifest) -> Seal:
    seal = read_seal(cache, manifest)
    assert seal is not None
    return seal


def test_a_whole_cache_lists_as_it_should(cache: Path, manifest: Manifest) -> None:
    assert list_cache(cache, manifest) == ([], [])
    assert verify_names(cache) == []


@pytest.mark.parametrize(
    ("lost", "kind"),
    [
        ("head_ids/c.1.0.0", "missing-shard"),
        ("block_loss/c.0", "missing-shard"),
        ("receipts/00000001.json", "unfinished-cache"),
        ("head_gaps/zarr.json", "missing-file"),
        ("seal.json", "unfinished-cache"),
    ],
)
def test_what_is_missing_is_found_by_its_name(cache: Path, manifest: Manifest, lost: str, kind: str) -> None:
    (cache / lost).unlink()
    assert kind in {problem.kind for problem in verify_names(cache)}


@pytest.mark.parametrize("stray", ["notes.txt", "head_ids/c.9.0.0", "receipts/00000009.json", "more/deep/file"])
def test_strays_are_found_in_every_folder_and_hidden_files_are_nobodys(
    cache: Path, manifest: Manifest, stray: str
) -> None:
    for name in (stray, ".hidden/x", "head_ids/.tmp-x", ".lock"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"x")
    assert [problem.place for problem in verify_names(cache)] == [str(cache / stray)]
    assert [problem.place for problem in verify_cache(cache)] == [str(cache / stray)]


def test_noted_sizes_are_those_of_the_receipts_and_of_the_files(cache: Path, manifest: Manifest) -> None:
    seal = seal_of(cache, manifest)
    assert sealed_sizes(cache, manifest, seal) is None
    noted = note_sizes(cache, manifest, seal)
    found = sealed_sizes(cache, manifest, seal)
    assert found is not None
    np.testing.assert_array_equal(found, noted)
    np.testing.assert_array_equal(found, sizes_on_disk(cache, manifest, range(3)))
    assert verify_cache(cache) == []


def test_noted_sizes_that_were_changed_or_are_of_another_seal_count_for_nothing(
    cache: Path, manifest: Manifest
) -> None:
    seal = seal_of(cache, manifest)
    note_sizes(cache, manifest, seal)
    assert sealed_sizes(cache, manifest, seal.model_copy(update={"receipts_sha256": "0" * 64})) is None
    data = bytearray((cache / SIZES_NAME).read_bytes())
    for at in (0, 40, len(data) - 1):
        changed = data.copy()
        changed[at] ^= 1
        (cache / SIZES_NAME).write_bytes(changed)
        assert sealed_sizes(cache, manifest, seal) is None
    (cache / SIZES_NAME).write_bytes(data[:-8])
    assert sealed_sizes(cache, manifest, seal) is None


def test_a_cut_file_and_a_lost_one_cost_their_shards_alone(cache: Path, manifest: Manifest) -> None:
    assert folder.is_finished(cache, manifest)
    path = cache / "head_ids" / "c.1.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    assert not folder.is_finished(cache, manifest)
    assert whole_shards(cache, manifest) == {0, 2}
    (cache / "hidden" / "c.0.0.0").unlink()
    assert whole_shards(cache, manifest) == {2}
    receipt_path(cache, 2).write_bytes(b"broken")
    assert whole_shards(cache, manifest) == set()


def test_a_broken_seal_is_not_a_finished_cache(cache: Path, manifest: Manifest) -> None:
    (cache / "seal.json").write_bytes(b"{}")
    assert not folder.is_finished(cache, manifest)
