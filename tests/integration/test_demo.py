"""The demo's own path, on less text: every command runs, and the table says what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import demo, settings


def test_the_demo_runs_resumes_and_tells_who_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = settings.read_recipe

    def less(name: str) -> dict[str, dict[str, Any]]:
        sections = real(name)
        sections["cache-teacher"] |= {"limit_tokens": 4096, "shard_blocks": 16}
        return sections

    monkeypatch.setattr(settings, "read_recipe", less)
    monkeypatch.setattr(demo, "HELD_OUT_TOKENS", 1024)
    facts, lines = demo.run_demo(tmp_path, quiet=True)
    models = {model["name"]: model for model in facts["models"]}
    assert list(models) == ["teacher", *demo.STUDENTS]
    assert models["teacher"]["cache"]["kl_to_teacher"] == pytest.approx(0, abs=1e-3)
    assert models["narrow"]["parameters"] < models["3-layers"]["parameters"] < models["teacher"]["parameters"]
    better = models["3-layers"]["cache"]["loss_nats"] < models["3-layers-ce"]["cache"]["loss_nats"]
    assert any(("beats" if better else "does NOT beat") in line for line in lines)
    again, _ = demo.run_demo(tmp_path, quiet=True)
    assert [model["training"] for model in again["models"]] == [model["training"] for model in facts["models"]]
