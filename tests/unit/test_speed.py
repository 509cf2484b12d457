"""Timed generation is greedy generation: the cache of keys and values changes nothing, and models take turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import train.evaluation.speed
from tests.models import FAMILIES, make_model
from tests.refusals import refused
from train.evaluation.speed import SpeedConfig, generate, measure_speeds

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_are_those_of_whole_forward_passes(family: str) -> None:
    model = make_model(family, std=0.3).eval()
    prompt_BT = torch.arange(5, 12)[None]
    generated = generate(model, prompt_BT, 6)
    ids_BT = prompt_BT
    with torch.no_grad():
        for _ in range(6):
            ids_BT = torch.cat([ids_BT, model(input_ids=ids_BT).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated.ids_BT, ids_BT[:, 7:])
    assert generated.prefill_s > 0
    assert generated.decode_s > 0


def test_models_take_turns_and_the_median_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: tmp_path / name for name in ("a", "b")}
    for layers, folder in enumerate(folders.values(), 1):
        make_model("gpt2", num_hidden_layers=layers).save_pretrained(folder)
    timed: list[tuple[int, int]] = []
    seconds = iter([1.0, 9.0, 2.0, 9.0, 4.0, 9.0])

    def pretended(model: Any, prompt_BT: torch.Tensor, new_tokens: int) -> train.evaluation.speed.Generated:
        if new_tokens > 2:
            timed.append((model.config.n_layer, prompt_BT.shape[1]))
            second = next(seconds)
            return train.evaluation.speed.Generated(torch.zeros(1, new_tokens), second, second * 10)
        return train.evaluation.speed.Generated(torch.zeros(1, new_tokens), 100.0, 100.0)

    monkeypatch.setattr(train.evaluation.speed, "generate", pretended)
    speeds = measure_speeds(folders, SpeedConfig(prompt_tokens=100, new_tokens=5, rounds=3), device=CPU)
    # 64 positions leave 59 to the prompt.
    assert timed == [(1, 59), (2, 59)] * 3
    assert speeds["a"].first_token_s == 2.0
    assert speeds["a"].prefill_tokens_per_s == 29.5
    assert speeds["b"].token_s == 22.5
    assert speeds["a"].decode_tokens_per_s == 0.2


def test_models_without_room_for_a_prompt_and_broken_ones_are_refused(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path / "short")
    refused("block-too-long", measure_speeds, {"x": tmp_path / "short"}, SpeedConfig(new_tokens=64), device=CPU)
    refused("unknown-model", measure_speeds, {"x": tmp_path / "gone"}, SpeedConfig(), device=CPU)
    (tmp_path / "short" / "model.safetensors").unlink()
    refused("unreadable-weights", measure_speeds, {"x": tmp_path / "short"}, SpeedConfig(), device=CPU)


def test_peak_memory_is_that_of_a_process_that_only_generates(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path / "small")
    ballast = torch.ones(100_000_000)
    config = SpeedConfig(prompt_tokens=8, new_tokens=2, rounds=1, peak_memory=True)
    peak = measure_speeds({"small": tmp_path / "small"}, config, device=CPU)["small"].peak_bytes
    if not Path("/proc/self/status").exists():
        assert peak is None
    else:
        assert peak is not None
        rss = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        assert 50e6 < peak < int(rss.split()[1]) * 1024
    assert len(ballast) == 100_000_000
