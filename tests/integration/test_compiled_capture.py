"""Compiled teachers: the same targets but for last bits, said in the manifest; a compiler that fails is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_spec.errors import KdpipeError, WouldLoseDataError
from cache_spec.reader import CacheReader
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from pipeline.recompute import compare_with_teacher
from pipeline.teacher import load_teacher
from pipeline.teacher_files import resolve_teacher
from tests.models import make_folder, write_words

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own imports


def settings(tmp_path: Path, family: str, out: str, **changes: Any) -> CaptureConfig:
    teacher, text = tmp_path / "teacher", tmp_path / "text.jsonl"
    if not teacher.exists():
        make_folder(teacher, family, spread=4.0)
        write_words(text, words=37)
    given: dict[str, Any] = {"encoding": "topk", "k": 8, "block_tokens": 16, "hidden_window": 0, "batch_blocks": 2}
    given |= {"shard_blocks": 4, "limit_tokens": 256, "device": "cpu"}
    return CaptureConfig(teacher=str(teacher), text=(str(text),), out=tmp_path / out, **(given | changes))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_compiled_teacher_gives_the_same_targets(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    monkeypatch.setattr("pipeline.teacher.COMPILE_BACKEND", backend)
    plain, compiled = settings(tmp_path, family, "plain"), settings(tmp_path, family, "compiled", compile=True)
    capture(plain)
    assert graphs == 0
    capture(compiled)
    assert graphs > 0
    ours, theirs = CacheReader.open(compiled.out), CacheReader.open(plain.out)
    assert (ours.manifest.run.compiled, theirs.manifest.run.compiled) == (True, False)
    blocks = range(ours.manifest.blocks.num_blocks)
    for name in ("input_ids", "head_ids", "head_gaps"):
        np.testing.assert_array_equal(ours.read(name, blocks), theirs.read(name, blocks))
    assert compare_with_teacher(compiled.out, str(tmp_path / "teacher"), gguf_file=None, num_batches=2) == []


def test_a_cache_of_a_compiled_teacher_is_another(tmp_path: Path) -> None:
    capture(settings(tmp_path, "gpt2", "cache"))
    with pytest.raises(WouldLoseDataError, match=r"other-settings.*compute\.compiled: None, now True"):
        capture(settings(tmp_path, "gpt2", "cache", compile=True))


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: object) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("pipeline.teacher.COMPILE_BACKEND", backend)
    config = settings(tmp_path, "gpt2", "cache", compile=True)
    with pytest.raises(KdpipeError, match=r"cannot-compile.*no compiler here") as caught:
        capture(config)
    assert "\n" not in str(caught.value)
    assert load_teacher(resolve_teacher(config.teacher), device="cpu").compiled is False
