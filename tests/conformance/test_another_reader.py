"""A cache opened by another implementation, from ``SPEC.md`` alone, has the values that our reader gives.

In: every golden cache, TensorStore, and zarrita where ``KDPIPE_NODE_MODULES`` names a folder that has it. Out: equal
arrays, equal distributions at every declared temperature.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cache_spec.reader import CacheReader
from cache_spec.targets import HeadTargets, HiddenTargets, dense
from tests.conformance.generate import VALID

pytest.importorskip("tensorstore")
from tests.conformance import by_specification

CASES = pytest.mark.parametrize("path", sorted(VALID.iterdir()), ids=lambda path: path.name)


@CASES
def test_decoding_by_the_specification_gives_the_readers_distributions(path: Path) -> None:
    theirs, reader = by_specification.SpecifiedCache(path), CacheReader.open(path)
    num_blocks, vocab_size = reader.manifest.blocks.num_blocks, reader.manifest.teacher.vocab_size
    positions = theirs.kept_positions()
    for at, temperature in enumerate(theirs.temperatures):
        batch = reader.batch(range(num_blocks), temperature)
        head = reader.output_head() if isinstance(batch.targets, HiddenTargets) else None
        has_prototypes = "prototypes" in reader.manifest.tables
        expected_NTV = dense(
            batch.targets,
            temperature=temperature,
            vocab_size=vocab_size,
            tail="prototype" if has_prototypes else "uniform",
            prototypes_CV=reader.prototypes(temperature) if has_prototypes else None,
            head=head,
        )
        found_NTV, mass_NT = theirs.probabilities(at)
        for block, kept in enumerate(positions):
            # Entry j is about the j-th kept position: where all are kept, about position j.
            entries = np.arange(len(kept))
            expected_JV, found_JV = expected_NTV[block, kept], found_NTV[block, entries]
            if mass_NT is not None:
                outside_JV = found_JV == 0
                np.testing.assert_allclose(
                    np.where(outside_JV, expected_JV, 0).sum(1), mass_NT[block, entries], rtol=1e-5, atol=1e-7
                )
                expected_JV = np.where(outside_JV, 0, expected_JV)
            np.testing.assert_allclose(found_JV, expected_JV, rtol=2e-5, atol=1e-7)


@pytest.mark.skipif("KDPIPE_NODE_MODULES" not in os.environ, reason="zarrita is not named: KDPIPE_NODE_MODULES")
@CASES
def test_zarrita_reads_the_same_values(path: Path, tmp_path: Path) -> None:
    script = shutil.copy(Path(__file__).with_name("zarrita.mjs"), tmp_path)
    (tmp_path / "node_modules").symlink_to(Path(os.environ["KDPIPE_NODE_MODULES"]).resolve())
    run = subprocess.run(["node", script, str(path.resolve())], capture_output=True, text=True, check=True)
    found, reader = json.loads(run.stdout), CacheReader.open(path)
    expected = {name: reader.read(name, range(spec.num_blocks)) for name, spec in reader.specs.items()}
    expected |= {name: reader.table(name) for name in reader.manifest.tables}
    # Before version 24, Node has no 16-bit floats.
    assert {expected[name].dtype.name for name in expected.keys() - found.keys()} <= {"float16"}
    assert len(found) >= 4
    for name, array in found.items():
        values = expected[name]
        assert array["shape"] == list(values.shape), name
        assert array["sha256"] == hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest(), name


@CASES
def test_text_and_pooled_states_are_the_same(path: Path) -> None:
    theirs, reader = by_specification.SpecifiedCache(path), CacheReader.open(path)
    batch = reader.batch(range(reader.manifest.blocks.num_blocks), reader.manifest.temperatures[0])
    np.testing.assert_array_equal(theirs.array("input_ids"), batch.input_ids_BT)
    np.testing.assert_array_equal(theirs.array("block_lengths"), batch.lengths_B)
    hidden_NWD = theirs.hidden()
    assert (hidden_NWD is None) is (batch.hidden_BWD is None)
    if hidden_NWD is not None and batch.hidden_BWD is not None:
        np.testing.assert_allclose(batch.hidden_BWD, hidden_NWD, rtol=1e-6)
    if isinstance(batch.targets, HeadTargets):
        assert (theirs.manifest.get("imported") is None) is ("block_loss" in reader.specs)


def test_the_decoding_takes_nothing_from_our_own_packages() -> None:
    tree = ast.parse(Path(by_specification.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"__future__", "json", "pathlib", "typing", "numpy", "tensorstore"}
