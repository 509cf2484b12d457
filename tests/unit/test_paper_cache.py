"""A recipe's file against a cache: what only a cache can answer is answered from it, and a wrong cache is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cache_spec.errors import BadInputError
from cache_spec.manifest import MANIFEST_NAME
from tests.papers import write_paper
from tests.synthetic import make_manifest
from train.paper import read_paper
from train.paper_cache import cache_settings


def write_manifest(folder: Path, **changes: Any) -> Path:
    """A cache's manifest alone: nothing else is looked at."""
    settings: dict[str, Any] = {"teacher_name": "gpt2", "window": 1, "temperatures": (1.0, 2.0), "block_tokens": 8}
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_NAME).write_bytes(make_manifest(**settings | changes).to_json())
    return folder


def test_the_cache_beside_the_run_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    paper = read_paper(write_paper(tmp_path, dump_path=str(tmp_path / "run") + "/"))
    beside, other = write_manifest(tmp_path / "run-cache"), write_manifest(tmp_path / "other")
    assert cache_settings(paper, {}) == {"data_file": {"cache": str(beside)}}
    assert cache_settings(paper, {"cache": str(other)}) == {"data_file": {"cache": str(other)}}


def test_without_a_cache_the_command_that_makes_it_is_said_in_full(tmp_path: Path) -> None:
    paper = read_paper(write_paper(tmp_path, dump_path=str(tmp_path / "run")))
    with pytest.raises(BadInputError) as error:
        cache_settings(paper, {})
    assert error.value.kind == "no-cache"
    assert "kdpipe import-pickle data/binarized.pickle" in str(error.value)
    assert "kdpipe cache-teacher --teacher gpt2 --text data/binarized.ids" in str(error.value)
    assert "--temperatures 1,2 --block-tokens 1024 --last-block each --encoding prototype --hidden-window 1" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("keys", "flags", "cache", "kind", "key"),
    [
        ({"temperature": 3.0}, {}, {}, "undeclared-temperature", "temperature"),
        ({"teacher_name": "gpt2-xl"}, {}, {}, "other-teacher", "teacher_name"),
        ({}, {"teacher": "models/mine"}, {}, "other-teacher", "teacher_name"),
        ({}, {}, {"model_type": "llama"}, "other-teacher", "teacher_type"),
        ({}, {}, {"window": 4}, "pooled-hidden-states", "alpha_cos"),
        ({}, {}, {"window": None}, "pooled-hidden-states", "alpha_cos"),
    ],
)
def test_a_cache_that_fails_a_key_is_refused(
    tmp_path: Path, keys: dict[str, Any], flags: dict[str, Any], cache: dict[str, Any], kind: str, key: str
) -> None:
    folder = write_manifest(tmp_path / "cache", **cache)
    with pytest.raises(BadInputError) as error:
        cache_settings(read_paper(write_paper(tmp_path, **keys)), {**flags, "cache": folder})
    assert (error.value.kind, error.value.place.rpartition(" ")[2]) == (kind, key)


@pytest.mark.parametrize(
    ("keys", "flags", "cache"),
    [
        ({"alpha_cos": 0}, {}, {"window": None}),
        ({}, {"cosine_weight": "1"}, {"window": 4}),
        ({"temperature": 3.0}, {"temperature": "2"}, {}),
        ({"teacher_name": "/models/gpt2"}, {}, {}),
    ],
)
def test_what_is_not_used_or_is_overruled_is_not_compared(
    tmp_path: Path, keys: dict[str, Any], flags: dict[str, Any], cache: dict[str, Any]
) -> None:
    folder = write_manifest(tmp_path / "cache", **cache)
    assert cache_settings(read_paper(write_paper(tmp_path, **keys)), {**flags, "cache": folder})


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (8, 1), (20, 2), (800, 100)])
def test_tokens_per_batch_count_by_the_caches_mean_block(tmp_path: Path, tokens: int, blocks: int) -> None:
    folder = write_manifest(tmp_path / "cache")
    paper = read_paper(write_paper(tmp_path, tokens_per_batch=tokens))
    mapped = cache_settings(paper, {"cache": folder})
    assert mapped["tokens_per_batch"] == {"batch_blocks": blocks}
    assert mapped["batch_size"] == {}
