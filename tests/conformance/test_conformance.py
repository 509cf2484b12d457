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
from cache_spec.errors import BadInputError
from cache_spec.layout import array_specs
from cache_spec.manifest import MANIFEST_NAME
from cache_spec.reader import CacheReader
from cache_spec.validate import verify_cache
from tests.conformance.changes import copy_changed
from tests.conformance.generate import CASES, VALID, provenance, write_case

SOURCES = Path(cache_spec.__file__).parent
SPEC = (SOURCES / "SPEC.md").read_text()
INVALID = VALID.with_name("invalid")
MAX_CORPUS_BYTES = 300_000
# Kinds that no cache on disk can cause, with the test that shows them.
NOT_ABOUT_READING = {"cannot-write": "tests/unit/test_durable.py"}

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
    except BadInputError as error:
        return error.kind
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
def test_a_golden_cache_can_be_made_again(path: Path, tmp_path: Path) -> None:
    """Equal arrays with any library versions; equal bytes with the ones that wrote it."""
    write_case(path.name, tmp_path / "again")
    golden, again = CacheReader.open(path), CacheReader.open(tmp_path / "again")
    assert golden.manifest.fingerprint == again.manifest.fingerprint
    for name, spec in golden.specs.items():
        blocks = range(spec.num_blocks)
        np.testing.assert_array_equal(golden.read(name, blocks), again.read(name, blocks), err_msg=name)
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
    assert np.isneginf(readers["whole-vocabulary"].read("log_tail_mass", [0, 1])).all()
    assert readers["wide-ids"].read("head_ids", [0, 1]).max() > 65_535
    kept = readers["kept-last-block"]
    assert kept.lengths([0, 1, 2]).tolist() == [8, 8, 3]
    assert kept.read("input_ids", [2])[0, 3:].tolist() == [kept.manifest.tokenizer.eos_token_id] * 5
    assert kept.read("hidden", [2])[0, 0].any()
    assert not kept.read("hidden", [2])[0, 1].any()


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


def test_the_table_of_arrays_matches_the_layout() -> None:
    """Name, number of axes, dtype, dimension names and shuffle of each row."""
    specs = array_specs(CacheReader.open(VALID / "plain").manifest)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in SPEC.split("## 4.")[1].splitlines()]
    table = {row[0].split()[0]: row for row in rows if len(row) == 7 and row[0].split()[0] in specs}
    assert set(table) == set(specs)
    for name, spec in specs.items():
        _, shape, dtype, dims, _, shuffle, _ = table[name]
        assert shape.count(",") + 1 == len(spec.shape), name
        assert dtype == ("id" if name.endswith("_ids") else spec.dtype.name)
        assert dims.split(", ") == list(spec.dims)
        assert shuffle == spec.shuffle


def test_the_worked_example_of_the_specification_holds() -> None:
    """What §8 shows is in the cache, by its own formulas, read with nothing but zarr-python."""
    example = json.loads(re.findall(r"```json\n(.*?)```", SPEC, re.DOTALL)[0])
    group = zarr.open_group(VALID / "plain", mode="r")
    names = ("input_ids", "head_ids", "head_gaps", "log_normaliser", "log_tail_mass")
    arrays = {name: np.asarray(group[name]) for name in names}
    step = json.loads((VALID / "plain" / MANIFEST_NAME).read_bytes())["encoding"]["step_nats"]
    assert arrays["input_ids"][0, :2].tolist() == example["input_ids"]
    assert arrays["head_ids"][0, 0].tolist() == example["head_ids"]
    assert arrays["head_gaps"][0, :, 0].tolist() == example["head_gaps"]
    logprobs = -step * np.cumsum(example["head_gaps"])
    np.testing.assert_array_equal(logprobs, example["logprobs"])
    for at, temperature in enumerate((1, 2)):
        shown = example[f"temperature_{temperature}"]
        normaliser, tail = (float(arrays[name][0, at, 0]) for name in ("log_normaliser", "log_tail_mass"))
        assert shown["log_normaliser"] == pytest.approx(normaliser, abs=5e-6)
        assert shown["log_tail_mass"] == pytest.approx(tail, abs=5e-6)
        head = np.exp(logprobs / temperature - normaliser)
        np.testing.assert_allclose(head, shown["head"], atol=5e-6)
        assert shown["tail"] == pytest.approx(np.exp(tail), abs=5e-6)
        assert shown["sum"] == pytest.approx(head.sum() + np.exp(tail), abs=5e-6)
