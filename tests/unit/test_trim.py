"""Batches cut to their longest block: smaller, and with the same losses and gradients in every encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_spec.reader import CacheReader
from tests.models import make_model
from tests.synthetic import ENCODINGS, make_manifest, make_rows, write_cache
from train.batches import StepPlan, micro_batches
from train.distil_batch import count_terms, to_tensors
from train.distiller import Distiller, LossWeights
from train.teacher_targets import TeacherTargets, pick_tail
from train.trim import trimmed

BLOCKS, TOKENS, WINDOW = 6, 16, 4
LENGTHS = np.array([3, 9, 1, 16, 5, 8], np.uint32)


def open_cache(folder: Path, name: str = "topk", *, window: int | None = WINDOW) -> CacheReader:
    """A finished cache with a short document in most of its blocks."""
    encoding = ENCODINGS[name]
    manifest = make_manifest(num_blocks=BLOCKS, block_tokens=TOKENS, window=window, encoding=encoding)
    corpus = manifest.corpus.model_copy(update={"num_tokens": int(LENGTHS.sum())})
    blocks = manifest.blocks.model_copy(update={"last_block": "each"})
    manifest = manifest.model_copy(update={"corpus": corpus, "blocks": blocks})
    write_cache(folder, manifest, make_rows(manifest) | {"block_lengths": LENGTHS})
    return CacheReader.open(folder)


@pytest.mark.parametrize(
    ("blocks", "window", "num_tokens"),
    [([0, 2], 4, 4), ([0, 2], None, 3), ([1], 4, 12), ([2], 1, 1), ([0, 3], 4, 16), ([5], 4, 8), ([1], 16, 16)],
)
def test_a_batch_is_as_long_as_its_longest_block(
    tmp_path: Path, blocks: list[int], window: int | None, num_tokens: int
) -> None:
    batch = trimmed(open_cache(tmp_path, window=window).batch(blocks, 1.0), window)
    assert batch.input_ids_BT.shape == (len(blocks), num_tokens)
    assert all(array.shape[1] == num_tokens for array in (batch.targets.ids_BTK, batch.targets.logprobs_BTK))  # type: ignore[union-attr]
    if window:
        assert batch.hidden_BWD is not None
        assert batch.hidden_BWD.shape[1] == num_tokens // window


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ENCODINGS)
def test_losses_and_gradients_do_not_change(tmp_path: Path, name: str, temperature: float) -> None:
    reader = open_cache(tmp_path, name)
    student = make_model("gpt2", vocab_size=50, hidden_size=6, std=0.5, pad_token_id=None).double().eval()
    distiller = Distiller(
        student,
        targets=TeacherTargets.of_cache(reader, temperature=temperature, tail=pick_tail(None, reader.manifest)),
        teacher_width=6,
        weights=LossWeights(kl=0.6, ce=0.4, cosine=0.3, mse=0.2),
        window=WINDOW,
    ).double()
    results: list[tuple[Any, list[torch.Tensor]]] = []
    whole = reader.batch([0, 1, 5], temperature)
    for batch in (whole, trimmed(whole, WINDOW)):
        tensors = to_tensors(batch)
        student.zero_grad()
        output = distiller(tensors, count_terms(tensors.lengths_B, WINDOW))
        output.loss.backward()
        results.append((output, [p.grad.clone() for p in student.parameters() if p.grad is not None]))
    (before, before_grads), (after, after_grads) = results
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert before.loss.item() != 0
    for one, other in zip(before_grads, after_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_grouped_epochs_read_less_padding_and_every_block(tmp_path: Path) -> None:
    reader = open_cache(tmp_path)

    def epoch(*, group: bool) -> tuple[list[int], int]:
        plan = StepPlan(num_blocks=BLOCKS, batch_blocks=2, accumulate=1, epochs=1, group_by_length=group)
        items = list(micro_batches(reader, plan, first_step=0, temperature=1.0, seed=3, window_shards=2))
        return [int(b) for item in items for b in item.blocks], sum(item.batch.input_ids_BT.numel() for item in items)

    blocks, num_read = epoch(group=True)
    others, num_read_ungrouped = epoch(group=False)
    assert sorted(blocks) == sorted(others) == list(range(BLOCKS))
    # In pairs of like length, rounded up to windows: (1, 3), (5, 8), (9, 16).
    assert num_read == 2 * (4 + 8 + 16)
    assert num_read < num_read_ungrouped <= BLOCKS * TOKENS
