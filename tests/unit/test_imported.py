"""Caches of log-probabilities from elsewhere: what is right with them is done, and what is not is refused in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from cache_spec.encodings.topk import TopK
from cache_spec.imported import ImportedInfo
from cache_spec.reader import CacheReader
from cache_spec.targets import Tail
from cache_spec.validate import verify_cache
from pipeline.card import dataset_card
from pipeline.config import TranscodeConfig
from pipeline.inspect import describe, inspect_cache
from pipeline.recompute import compare_with_teacher
from pipeline.transcode import transcode
from tests.refusals import refused
from tests.synthetic import make_manifest, make_rows, write_cache
from train.teacher_targets import TeacherTargets, pick_tail

Kind = Literal["full", "renormalised"]


def imported_cache(path: Path, logprobs: Kind, **sizes: Any) -> Path:
    info = ImportedInfo(logprobs=logprobs, mass_error=0.001)
    encoding = TopK(k=5, levels=4096, odds_step_nats=1 / 64)
    manifest = make_manifest(imported=info, encoding=encoding, temperatures=(1.0,), window=None, **sizes)
    write_cache(path, manifest, make_rows(manifest))
    return path


@pytest.mark.parametrize(
    ("logprobs", "tail", "others"),
    [("full", "bucket", ("prototype", "uniform", "gold")), ("renormalised", "renormalise", ("bucket", "uniform"))],
)
def test_tails_are_those_that_are_known(tmp_path: Path, logprobs: Kind, tail: Tail, others: tuple[Tail, ...]) -> None:
    reader = CacheReader.open(imported_cache(tmp_path / "cache", logprobs))
    assert pick_tail(None, reader.manifest) == pick_tail(tail, reader.manifest) == tail
    for other in others:
        line = refused("no-tail", pick_tail, other, reader.manifest)
        assert f"{logprobs} log-probabilities, imported without a normaliser" in line
    assert "temperature 2" in refused(
        "undeclared-temperature", TeacherTargets.of_cache, reader, temperature=2, tail=None
    )


@pytest.mark.parametrize("logprobs", ["full", "renormalised"])
def test_an_imported_cache_is_whole_and_says_what_it_is(tmp_path: Path, logprobs: Kind) -> None:
    cache = imported_cache(tmp_path / "cache", logprobs)
    assert verify_cache(cache) == []
    assert not {"block_loss", "block_entropy"} & set(CacheReader.open(cache).specs)
    facts = inspect_cache(cache)
    assert facts["imported"] == {"logprobs": logprobs, "mass_error": 0.001}
    assert facts["teacher_loss_nats"] is facts["teacher_entropy_nats"] is facts["compute"] is None
    lines = describe(facts)
    assert any(line.startswith("imported ") and "temperature 1 and tail" in line for line in lines)
    assert not any("None" in line for line in lines)
    card = dataset_card(CacheReader.open(cache).manifest, 1000, "hf://datasets/a/b")
    assert "| teacher's weights | not known |" in card


def test_no_teacher_is_run_for_an_imported_cache(tmp_path: Path) -> None:
    cache = imported_cache(tmp_path / "cache", "full")
    line = refused("imported-cache", compare_with_teacher, cache, "anything", gguf_file=None, num_batches=1)
    assert "a teacher was run for" in line


def test_a_smaller_head_is_made_where_the_tail_is_known(tmp_path: Path) -> None:
    full = imported_cache(tmp_path / "full", "full")
    result = transcode(TranscodeConfig(cache=full, out=tmp_path / "less", k=2, device="cpu"), quiet=True)
    assert verify_cache(tmp_path / "less") == []
    less, reader = CacheReader.open(result["cache"]), CacheReader.open(full)
    assert less.manifest.imported == reader.manifest.imported
    np.testing.assert_array_equal(less.read("head_ids", [0]), reader.read("head_ids", [0])[..., :2])
    renormalised = imported_cache(tmp_path / "renormalised", "renormalised")
    config = TranscodeConfig(cache=renormalised, out=tmp_path / "no", k=2, device="cpu")
    assert "log-probabilities of all tokens" in refused("imported-cache", transcode, config, quiet=True)
