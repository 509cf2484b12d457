"""The storage benchmark compares like with like: every engine gives back the set's values, stock readers ours too."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from benchmarks.storage import __main__ as storage
from benchmarks.storage.content import MODEL_ARRAYS, Sizes, Source, copy_cache, make_up
from benchmarks.storage.engines import ENGINES, multiply_kdpipe, write_kdpipe
from cache_spec.reader import CacheReader
from cache_spec.validate import verify_cache

SIZES = Sizes(num_blocks=6, block_tokens=40, k=5, shard_blocks=4, levels=128, temperatures=(1.0, 2.0))
ORDERS = ([0, 1, 2, 3, 4, 5], [2, 3], [5, 0, 3], [4])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_up(tmp_path_factory.mktemp("sets") / "source", SIZES)


@pytest.fixture(scope="module")
def cache(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "cache"
    write_kdpipe(source, folder)
    return folder


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_gives_back_what_was_written(name: str, source: Source, tmp_path: Path) -> None:
    engine = ENGINES[name]
    if not all(map(installed, engine.modules)):
        pytest.skip(f"{name} is not installed")
    engine.write(source, tmp_path / "set")
    read = engine.open(tmp_path / "set", SIZES)
    for blocks in ORDERS:
        batch = read(blocks)
        for array in MODEL_ARRAYS:
            rows = source.rows(array, 0, SIZES.num_blocks)[blocks]
            expected = rows[:, 0] if array == "tail_log_odds" else rows
            np.testing.assert_array_equal(np.asarray(batch[array]).astype(expected.dtype), expected, err_msg=array)


def test_a_cache_opens_with_equal_values_in_zarr_python(cache: Path) -> None:
    reader = CacheReader.open(cache)
    for name in reader.specs:
        array: Any = zarr.open_array(cache / name, mode="r")
        np.testing.assert_array_equal(array[...], reader.read(name, range(SIZES.num_blocks)), err_msg=name)


def test_a_cache_opens_with_equal_values_in_tensorstore(cache: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    reader = CacheReader.open(cache)
    for name in reader.specs:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache / name)}}
        values = tensorstore.open(spec, open=True, read=True).result().read().result()
        np.testing.assert_array_equal(values, reader.read(name, range(SIZES.num_blocks)), err_msg=name)


def test_a_made_up_set_is_a_valid_cache(source: Source, cache: Path) -> None:
    ids = np.sort(source.rows("head_ids", 0, SIZES.num_blocks), axis=-1)
    assert (ids[..., 1:] != ids[..., :-1]).all()
    # Its digest of tokens is made up too, and so are the odds at other temperatures.
    assert {problem.kind for problem in verify_cache(cache)} <= {"corpus-mismatch", "bad-tail-mass"}


def test_the_set_of_a_cache_is_what_the_cache_holds(source: Source, cache: Path, tmp_path: Path) -> None:
    copy = copy_cache(cache, tmp_path / "copy")
    assert copy.sizes == SIZES
    for name in MODEL_ARRAYS:
        rows = copy.rows(name, 0, SIZES.num_blocks)
        np.testing.assert_array_equal(rows, source.rows(name, 0, SIZES.num_blocks), err_msg=name)


def test_a_multiplied_cache_reads_like_its_one_shard(tmp_path: Path) -> None:
    sizes = Sizes(num_blocks=2, block_tokens=8, k=3, shard_blocks=2, levels=128, temperatures=(1.0,))
    write_kdpipe(make_up(tmp_path / "source", sizes), tmp_path / "cache")
    first = CacheReader.open(tmp_path / "cache").read("head_ids", [0, 1])
    multiply_kdpipe(tmp_path / "cache", sizes, 3)
    reader = CacheReader.open(tmp_path / "cache")
    assert reader.manifest.blocks.num_shards == 3
    np.testing.assert_array_equal(reader.read("head_ids", [4, 5]), first)


@pytest.mark.slow
def test_the_storage_benchmark_reports_every_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engines = ["kdpipe", "zarr-python", "memmap"]
    flags = [
        "--quick",
        "--tokens",
        "1024",
        "--block-tokens",
        "64",
        "--k",
        "4",
        "--shards",
        "3",
        "--work",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["storage", *flags, "--engines", *engines])
    storage.main()
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    (result,) = report["sets"]
    assert list(result["engines"]) == engines
    for name, found in result["engines"].items():
        assert "error" not in found, (name, found)
        assert all(found[f"{order}_tokens_per_s"] > 0 for order in storage.ORDERS)
    assert {row["what"] for row in result["goals"]} >= {"random vs zarr-python on the same files"}
    assert report["opening"]["kdpipe"]["3"]["listings"] == 0
    assert "parquet-tuned" in report["skipped"]
    assert "kdpipe" in printed.err
    assert not list(tmp_path.iterdir())
