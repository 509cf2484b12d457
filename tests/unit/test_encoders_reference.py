"""The encoders make what the specification says: ids, gaps, draws and roundings.

In: the made-up text of every golden cache. Out: the arrays of ``pipeline.encoders``, from float32 logits on torch, are
those of ``tests.conformance.examples``, from float64 ones by the words of ``SPEC.md``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_spec.layout import target_arrays
from pipeline.encoders import make_encoder
from pipeline.encoders.draws import uniforms
from pipeline.masking import Masks
from pipeline.targets import encode_batch
from pipeline.teacher import OutputHead
from tests.conformance import examples
from tests.conformance.generate import CASES
from tests.synthetic import make_manifest

CAPTURED = {name: case for name, case in CASES.items() if "imported" not in case.sizes}


@pytest.mark.parametrize("case", CAPTURED.values(), ids=CAPTURED)
def test_an_encoder_makes_what_the_specification_says(case: object) -> None:
    assert isinstance(case, type(CASES["plain"]))
    manifest = make_manifest(encoding=case.encoding, **case.sizes)
    text = examples.make_text(manifest, seed=1)
    tables = examples.make_tables(manifest, text, seed=1)
    expected = examples.make_rows(manifest, text, tables)
    masked = None
    if manifest.masking is not None:
        masks = Masks(expected["selected"], expected["replacement_ids"])
        masked = masks.text(manifest.masking, text.input_ids_NT, text.lengths_N)
    stored = encode_batch(
        OutputHead(weight_VD=torch.from_numpy(text.weight_VD).float(), bias_V=torch.from_numpy(text.bias_V).float()),
        torch.from_numpy(text.hidden_NTD).float(),
        text.input_ids_NT,
        text.lengths_N,
        encoder=make_encoder(manifest.encoding, manifest.geometry, tables=tables),
        first_block=0,
        masked=masked,
    )
    for name in target_arrays(manifest):
        assert stored[name].dtype == expected[name].dtype, name
        # A number may lie so near to the edge of a step that float32 and float64 differ about it.
        assert np.count_nonzero(stored[name] != expected[name]) <= 1, name
    for name in ("block_loss", "block_entropy"):
        np.testing.assert_allclose(stored[name], expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("seed", "block", "position", "stream"), [(0, 0, 0, 0), (2**63 - 1, 2**40, 4095, 7)])
def test_uniform_numbers_are_those_of_the_specification(seed: int, block: int, position: int, stream: int) -> None:
    block_R, position_R = torch.tensor([block]), torch.tensor([position])
    found_RN = uniforms(seed, block_R, position_R, num_streams=stream + 1, num_draws=50)[:, stream]
    expected_N = examples.uniforms(seed, block, position, stream=stream, num_draws=50)
    assert found_RN[0].tolist() == expected_N.tolist()
