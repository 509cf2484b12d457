"""Golden caches open and mean what they meant; each broken rule is refused by its kind.

In: the folders of ``valid/`` and the cases of ``invalid/``, one rule each, and ``cache_spec/SPEC.md``.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import cache_spec
from cache_spec.encodings import ENCODINGS
from cache_spec.encodings.topk import EMPTY_TAIL
from cache_spec.errors import BadInputError
from cache_spec.layout import array_specs, table_chunks
from cache_spec.manifest import MANIFEST_NAME
from cache_spec.reader import CacheReader
from cache_spec.validate import verify_cache
from tests.conformance.changes import copy_changed
from tests.conformance.examples import uniforms
from tests.conformance.generate import CASES, VALID, provenance, write_case

SOURCES = Path(cache_spec.__file__).parent
SPEC = (SOURCES / "SPEC.md").read_text()
INVALID = VALID.with_name("invalid")
MAX_CORPUS_BYTES = 400_000
# Kinds that no cache on disk can cause, with the test that shows them.
NOT_ABOUT_READING = {
    "cannot-write": "tests/unit/test_durable.py",
    "no-dense-meaning": "tests/unit/test_targets_dense.py",
    "bad-packs": "tests/unit/test_packs.py",
    "hub-offline": "tests/unit/test_push_hub.py",
    "bad-url": "tests/unit/test_store.py",
    "store-refused": "tests/unit/test_store.py",
    "store-failed": "tests/unit/test_store.py",
    "shard-taken": "tests/property/test_store_commit.py",
    "copy-too-small": "tests/unit/test_local_copy.py",
    "cache-changed": "tests/unit/test_local_copy.py",
    "no-conditions": "tests/integration/test_store_capture.py",
    "imported-cache": "tests/unit/test_imported.py",
}

valid_cases = pytest.mark.parametrize("path", sorted(VALID.iterdir()), ids=lambda path: path.name)
invalid_cases = pytest.mark.parametrize("path", sorted(INVALID.glob("*.json")), ids=lambda path: path.stem)


def load(path: Path) -> dict[str, Any]:
    case = json.loads(path.read_text())
    assert isinstance(case, dict)
    return case


def kind_from_reader(cache: Path, request: dict[str, Any]) -> str | None:
    """Kind of the error that a reader meets on its way through the whole cache, or through what is asked of it."""
    try:
        reader = CacheReader.open(cache)
        blocks = request.get("blocks", list(range(reader.manifest.blocks.num_blocks)))
        for temperature in [request["temperature"]] if "temperature" in request else reader.manifest.temperatures:
            reader.batch(blocks, temperature)
        for name in reader.specs:
            reader.read(name, blocks)
        for name in reader.manifest.tables:
            reader.table(name)
    except BadInputError as error:
        return error.kind if "\n" not in str(error) else "not of one line"
    return None


def test_the_corpora_are_there_and_small() -> None:
    assert {path.name for path in VALID.iterdir()} == set(CASES)
    assert len(list(INVALID.glob("*.json"))) > 40
    files = [path for folder in (VALID, INVALID) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.startswith(".")], "git and packagers treat hidden files apart"
    assert sum(path.stat().st_size for path in files) < MAX_CORPUS_BYTES


@valid_cases
def test_a_golden_cache_opens_and_has_no_problem(path: Path) -> None:
    assert verify_cache(path) == []
    assert kind_from_reader(path, {}) is None


@valid_cases
def test_a_stock_zarr_reader_gets_the_same_arrays(path: Path) -> None:
    reader = CacheReader.open(path)
    group = zarr.open_group(path, mode="r")
    for name, spec in reader.specs.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert (array.shape, array.dtype, array.chunks) == (
            spec.shape,
            spec.dtype,
            (spec.chunk_blocks, *spec.row_shape),
        )
        np.testing.assert_array_equal(array[:], reader.read(name, range(spec.num_blocks)), err_msg=name)


@valid_cases
def test_a_stock_zarr_reader_gets_the_same_tables(path: Path) -> None:
    reader = CacheReader.open(path)
    group = zarr.open_group(path, mode="r")
    for part in reader.manifest.encoding.tables(reader.manifest.geometry):
        array = group[part.name]
        assert isinstance(array, zarr.Array)
        assert (array.shape, array.dtype, array.chunks) == (part.shape, np.dtype(part.dtype), table_chunks(part))
        assert array.metadata.dimension_names == part.dims  # type: ignore[union-attr]
        np.testing.assert_array_equal(array[:], reader.table(part.name), err_msg=part.name)


@valid_cases
def test_tensorstore_gets_the_same_arrays_and_tables(path: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    reader = CacheReader.open(path)
    expected = {name: reader.read(name, range(spec.num_blocks)) for name, spec in reader.specs.items()}
    expected |= {name: reader.table(name) for name in reader.manifest.tables}
    for name, values in expected.items():
        kvstore = {"driver": "file", "path": str(path / name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        assert array.dtype.numpy_dtype == values.dtype
        np.testing.assert_array_equal(array.read().result(), values, err_msg=name)


@valid_cases
def test_a_golden_cache_can_be_made_again(path: Path, tmp_path: Path) -> None:
    """Equal arrays with any library versions; equal bytes with the ones that wrote it."""
    write_case(path.name, tmp_path / "again")
    golden, again = CacheReader.open(path), CacheReader.open(tmp_path / "again")
    assert golden.manifest.fingerprint == again.manifest.fingerprint
    for name, spec in golden.specs.items():
        blocks = range(spec.num_blocks)
        np.testing.assert_array_equal(golden.read(name, blocks), again.read(name, blocks), err_msg=name)
    assert golden.manifest.tables == again.manifest.tables
    if golden.manifest.provenance == provenance():
        assert contents(path) == contents(tmp_path / "again")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_golden_caches_show_what_they_claim() -> None:
    readers = {name: CacheReader.open(VALID / name) for name in CASES}
    assert readers["no-hidden"].manifest.hidden is None
    partial = readers["partial-last-shard"].manifest.blocks
    assert partial.shard_range(partial.num_shards - 1)[1] < partial.shard_blocks
    assert (readers["whole-vocabulary"].read("tail_log_odds", [0, 1]) == EMPTY_TAIL).all()
    assert readers["wide-ids"].read("head_ids", [0, 1]).max() > 65_535
    kept = readers["kept-last-block"]
    assert kept.lengths([0, 1, 2]).tolist() == [8, 8, 3]
    assert kept.read("input_ids", [2])[0, 3:].tolist() == [kept.manifest.tokenizer.eos_token_id] * 5
    assert kept.read("hidden", [2])[0, 0].any()
    assert not kept.read("hidden", [2])[0, 1].any()
    assert {reader.manifest.encoding.name for reader in readers.values()} == set(ENCODINGS)
    dtypes = {(name, spec.dtype.name) for reader in readers.values() for name, spec in reader.specs.items()}
    for name in ("draw_counts", "tail_prototype", "head_gaps", "kept_gaps"):
        assert (name, "uint16") in dtypes
    assert dtypes >= {(name, dtype) for name in ("hidden", "last_hidden") for dtype in ("float16", "int8")}
    assert readers["prototype-residual"].read("tail_prototype", [0, 1]).max() > 255
    counts = readers["sampled-many"].read("draw_counts", [0, 1])
    assert counts.max() > 9
    assert counts.sum(2).tolist() == [[[300] * 8] * 2] * 2
    gaps = readers["sparsified"].read("kept_gaps", range(4))
    assert (gaps[:, :, -1] == 0).all(), "the last ones are kept by chance, at one value"
    assert (gaps[:, :, 1] > 0).any(), "some first ones are exact"


@invalid_cases
def test_a_broken_rule_is_refused_by_its_kind(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """``verify`` lists the kinds of all problems; ``reader`` is what reading the cache meets first, null for none."""
    case = load(path)
    if "pending" in case:
        request.applymarker(pytest.mark.xfail(reason=case["pending"]))
    copy_changed(VALID / case["base"], tmp_path / "cache", case["changes"])
    assert sorted({problem.kind for problem in verify_cache(tmp_path / "cache")}) == case["verify"]
    assert kind_from_reader(tmp_path / "cache", case.get("request", {})) == case["reader"]
    assert case["verify"] or case["reader"]


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("F-4", [{"do": "write", "path": ".publish.lock", "text": ""}]),
        ("F-4", [{"do": "write", "path": "head_ids/.tmp-c.0.0.0-1", "text": "half"}]),
        ("F-4", [{"do": "write", "path": ".notes/mine.txt", "text": "mine"}]),
        ("M-4", [{"do": "set_field", "path": "manifest.json", "field": ["provenance", "host"], "value": "other"}]),
        ("M-4", [{"do": "set_field", "path": "manifest.json", "field": ["teacher", "name"], "value": "renamed"}]),
    ],
)
def test_what_the_specification_lets_pass_is_let_pass(tmp_path: Path, rule: str, changes: list[dict[str, Any]]) -> None:
    assert f"- **{rule}**" in SPEC
    copy_changed(VALID / "plain", tmp_path / "cache", changes)
    assert verify_cache(tmp_path / "cache") == []
    assert kind_from_reader(tmp_path / "cache", {}) is None


@invalid_cases
def test_a_case_names_a_rule_of_the_specification(path: Path) -> None:
    case = load(path)
    assert path.stem.startswith(case["rule"].lower() + "-")
    assert set(case) <= {"rule", "claim", "base", "changes", "request", "pending", "verify", "reader"}
    rule = re.search(rf"^- \*\*{case['rule']}\*\*(.*?)(?=^- \*\*|^#|\Z)", SPEC, re.MULTILINE | re.DOTALL)
    assert rule, f"no rule {case['rule']} in SPEC.md"
    assert any(f"`{kind}`" in rule[1] for kind in [*case["verify"], case["reader"]]), "the rule names none of the kinds"


def kinds_in_sources() -> set[str]:
    """Every literal kind that code of ``cache_spec`` gives to an error or a problem."""
    kinds = set()
    for source in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                first = node.args[0]
                if re.fullmatch(r"\w*Error|[Pp]roblem", node.func.id) and isinstance(first, ast.Constant):
                    kinds.add(first.value)
    return {kind for kind in kinds if isinstance(kind, str) and re.fullmatch(r"[a-z]+(-[a-z]+)+", kind)}


def test_every_kind_of_the_code_has_a_case_and_a_rule() -> None:
    covered: set[str | None] = set()
    for path in INVALID.glob("*.json"):
        covered |= {*load(path)["verify"], load(path)["reader"]}
    kinds = kinds_in_sources()
    assert len(kinds) > 30
    assert kinds - covered == set(NOT_ABOUT_READING)
    named = {
        kind
        for match in re.findall(r"[Kk]inds?((?:\s+and|,|\s+`[a-z-]+`)+)", SPEC)
        for kind in re.findall(r"`([a-z-]+)`", match)
    }
    assert named == kinds - set(NOT_ABOUT_READING)


def rows_of(section: str, num_cells: int) -> dict[str, list[str]]:
    """Rows of the tables in a section of the specification, by the first word."""
    text = re.split(r"^## ", SPEC, flags=re.MULTILINE)
    part = next(part for part in text if part.startswith(section))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    body = [row for row in rows if len(row) == num_cells and row[0] not in ("array", "table") and set(row[0]) != {"-"}]
    return {row[0].split()[0]: row for row in body}


def test_the_tables_of_arrays_match_the_layout() -> None:
    """Number of axes, dtype, dimension names, codec and shuffle of each row, in every golden cache."""
    table, seen = rows_of("4. Arrays", 7), set()
    for path in VALID.iterdir():
        for name, spec in array_specs(CacheReader.open(path).manifest).items():
            _, shape, dtype, dims, chunk, filters, _ = table[name]
            assert shape.count(",") + 1 == chunk.count(",") + 1 == len(spec.shape), name
            assert spec.dtype.name in (("uint16", "uint32") if dtype == "id" else dtype.split("/")), name
            assert dims.split(", ") == list(spec.dims)
            assert filters == f"{spec.compressor}, {spec.shuffle}", name
            seen.add(name)
    assert seen == set(table)


def test_the_table_of_tables_matches_the_encodings() -> None:
    table, seen = rows_of("5. Tables", 5), set()
    for path in VALID.iterdir():
        manifest = CacheReader.open(path).manifest
        for part in manifest.encoding.tables(manifest.geometry):
            _, shape, dtype, dims, _ = table[part.name]
            assert shape.count(",") + 1 == len(part.shape)
            assert np.dtype(part.dtype).name in dtype.split("/")
            assert dims.split(", ") == list(part.dims)
            seen.add(part.name)
    assert seen == set(table)


def test_the_table_of_encodings_names_their_fields() -> None:
    text = SPEC.split("An encoding has exactly these fields:")[1].split("- **M-1**")[0]
    fields: dict[str, set[str]] = {}
    name = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0] not in ("`name`", "---"):
            name = cells[0].strip("`") or name
            fields.setdefault(name, {"name"}).update(cells[1].split(", "))
    assert fields == {name: set(encoding.model_fields) for name, encoding in ENCODINGS.items()}


def test_the_worked_example_of_the_specification_holds() -> None:
    """What §9 shows is in the cache, by its own formulas, read with nothing but zarr-python."""
    example = json.loads(re.findall(r"```json\n(.*?)```", SPEC, re.DOTALL)[0])
    group = zarr.open_group(VALID / "prototype", mode="r")
    names = ("input_ids", "head_ranks", "head_gaps", "tail_log_odds", "tail_prototype", "prototypes")
    arrays = {name: np.asarray(group[name]) for name in names}
    encoding = json.loads((VALID / "prototype" / MANIFEST_NAME).read_bytes())["encoding"]
    assert arrays["input_ids"][0, :2].tolist() == example["input_ids"]
    row = example["tail_prototype"]
    assert arrays["tail_prototype"][0, 0] == row
    assert arrays["head_ranks"][0, 0].tolist() == example["head_ranks"]
    ids = np.argsort(arrays["prototypes"][0, row], kind="stable")[example["head_ranks"]]
    assert ids.tolist() == example["head_ids"]
    assert arrays["head_gaps"][0, :, 0].tolist() == example["head_gaps"]
    levels = encoding["levels"] - np.cumsum(example["head_gaps"])
    assert levels.tolist() == example["levels"]
    logprobs = 2 * np.log(levels / encoding["levels"])
    np.testing.assert_allclose(logprobs, example["logprobs"], atol=5e-7)
    for at, temperature in enumerate((1, 2)):
        shown = example[f"temperature_{temperature}"]
        assert arrays["tail_log_odds"][0, at, 0] == shown["tail_log_odds"]
        mass = 1 / (1 + np.exp(-encoding["odds_step_nats"] * shown["tail_log_odds"]))
        assert shown["m"] == pytest.approx(mass, abs=5e-7)
        powers = np.exp(logprobs / temperature)
        np.testing.assert_allclose((1 - mass) * powers / powers.sum(), shown["head"], atol=5e-7)
        tail = np.exp(arrays["prototypes"][at, row] / -64)
        tail[ids] = 0
        for token, probability in shown["other"].items():
            assert probability == pytest.approx(mass * tail[int(token)] / tail.sum(), abs=5e-7)
    numbers = re.search(r"for i = 0, 1, 2 is\s+([0-9., ]+)\.\n", SPEC)
    assert numbers
    assert [float(number) for number in numbers[1].split(",")] == uniforms(5, 0, 0, stream=0, num_draws=3).tolist()
