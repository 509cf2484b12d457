"""Masked language models to cache on real (tiny) teachers: right values, whatever made them; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cache_spec.commit import publish_shard
from cache_spec.errors import WouldLoseDataError
from cache_spec.layout import array_specs
from cache_spec.reader import CacheReader
from cache_spec.targets import Array, HiddenTargets, dense
from cache_spec.validate import verify_cache
from pipeline.capture import capture
from pipeline.config import CaptureConfig, TranscodeConfig
from pipeline.estimate import estimate
from pipeline.inspect import describe, inspect_cache
from pipeline.recompute import compare_with_teacher
from pipeline.teacher import load_teacher
from pipeline.teacher_files import resolve_teacher
from pipeline.transcode import transcode
from tests.models import ENCODINGS, MASKED_FAMILIES, make_folder, make_tokenizer, write_words
from tests.refusals import refusal, refused

CLS, SEP, MASK, SPECIAL = 2, 3, 4, 5
VOCABULARY = 100
SETTINGS: dict[str, Any] = {
    "encoding": "topk",
    "k": VOCABULARY,
    "block_tokens": 16,
    "hidden_window": 1,
    "hidden_dtype": "float16",
    "batch_blocks": 2,
    "shard_blocks": 5,
    "device": "cpu",
}


def settings(tmp_path: Path, family: str = "bert", **changes: Any) -> CaptureConfig:
    teacher, text = tmp_path / "teacher", tmp_path / "text.jsonl"
    if not teacher.exists():
        make_folder(teacher, family, spread=4.0)
        write_words(text, words=37)
    given = {"teacher": str(teacher), "text": (str(text),), "out": tmp_path / "cache"} | SETTINGS | changes
    if given["encoding"] not in ("topk", "prototype", "sparsified"):
        given.pop("k")
    return CaptureConfig(**given)


def teacher_says(folder: Path, read_ids_BT: Array, lengths_B: Array) -> tuple[Array, Array]:
    """Logits [B, T, V] and last hidden states [B, T, D] of each block alone, without its padding."""
    model: Any = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    logits_BTV = np.zeros((*read_ids_BT.shape, VOCABULARY))
    hidden_BTD = np.zeros((*read_ids_BT.shape, model.config.hidden_size))
    for block, length in enumerate(lengths_B.tolist()):
        ids = torch.from_numpy(read_ids_BT[block : block + 1, :length].astype(np.int64))
        with torch.no_grad():
            logits_BTV[block, :length] = model(ids).logits[0, :, :VOCABULARY].double().numpy()
            hidden_BTD[block, :length] = model.base_model(ids).last_hidden_state[0].double().numpy()
    return logits_BTV, hidden_BTD


def softmax(logits: Array) -> Array:
    powers: Array = np.exp(logits - logits.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares


@pytest.mark.parametrize("last_block", ["keep", "each"])
@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("family", MASKED_FAMILIES)
def test_a_cache_holds_what_the_teacher_says_of_the_masked_text(
    tmp_path: Path, family: str, positions: str, last_block: str
) -> None:
    config = settings(tmp_path, family, mask_positions=positions, last_block=last_block)
    result = capture(config)
    assert verify_cache(config.out) == []
    reader = CacheReader.open(config.out)
    manifest = reader.manifest
    blocks = list(range(manifest.blocks.num_blocks))
    masked, lengths_B = reader.masked(blocks), reader.lengths(blocks)
    assert masked is not None
    logits_BTV, hidden_BTD = teacher_says(tmp_path / "teacher", masked.read_ids_BT, lengths_B)
    for temperature in manifest.temperatures:
        batch = reader.batch(blocks, temperature)
        found_BTV = dense(batch.targets, temperature=temperature, vocab_size=VOCABULARY)
        wanted_BTV = softmax(logits_BTV / temperature)
        # Square roots of probabilities are within half a level of 128.
        np.testing.assert_allclose(
            np.sqrt(found_BTV[masked.kept_BT]),
            np.sqrt(wanted_BTV[masked.kept_BT]),
            atol=0.02 if temperature == 1 else 0.1,
        )
        assert batch.hidden_BWD is not None
        np.testing.assert_allclose(batch.hidden_BWD, hidden_BTD, atol=5e-3)
    ids_BT1 = reader.read("input_ids", blocks)[..., None].astype(np.int64)
    logprobs_BT = np.log(np.take_along_axis(softmax(logits_BTV), ids_BT1, 2))[..., 0]
    losses_B = -(logprobs_BT * masked.selected_BT).sum(1) / masked.selected_BT.sum(1)
    np.testing.assert_allclose(reader.read("block_loss", blocks), losses_B, rtol=1e-4)
    facts = inspect_cache(config.out)
    num_selected_B = masked.selected_BT.sum(1)
    assert facts["teacher_loss_nats"] == pytest.approx((losses_B @ num_selected_B) / num_selected_B.sum(), rel=1e-4)
    assert any("masking" in line for line in describe(facts))
    assert facts["targets_done"] == masked.kept_BT.sum()
    assert result["tokens"] == lengths_B.sum() == manifest.corpus.num_tokens


def test_blocks_are_framed_and_every_document_begins_one_where_asked(tmp_path: Path) -> None:
    config = settings(tmp_path, last_block="each")
    capture(config)
    reader = CacheReader.open(config.out)
    blocks = list(range(reader.manifest.blocks.num_blocks))
    ids_BT, lengths_B = reader.read("input_ids", blocks), reader.lengths(blocks)
    # 37 words: blocks of 14, 14 and 9 words, each framed, and nothing else behind a document.
    assert lengths_B.tolist() == [16, 16, 11] * 12
    assert (ids_BT[:, 0] == CLS).all()
    assert [ids_BT[n, length - 1] for n, length in enumerate(lengths_B)] == [SEP] * len(blocks)
    words = [f"w{i}" for n, length in enumerate(lengths_B) for i in ids_BT[n, 1 : length - 1]]
    text = [
        word for line in (tmp_path / "text.jsonl").read_text().splitlines() for word in json.loads(line)["text"].split()
    ]
    known = [word if int(word[1:]) >= SPECIAL else "w1" for word in text]
    assert words == known


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_stores_kept_positions_first_and_then_the_last_of_them(tmp_path: Path, encoding: str) -> None:
    config = settings(tmp_path, encoding=encoding, **ENCODINGS[encoding])
    capture(config)
    assert verify_cache(config.out) == []
    assert compare_with_teacher(config.out, config.teacher, gguf_file=None, num_batches=100) == []
    reader = CacheReader.open(config.out)
    blocks = list(range(reader.manifest.blocks.num_blocks))
    masked = reader.masked(blocks)
    assert masked is not None
    assert 0 < masked.kept_BT.sum() < 0.3 * masked.kept_BT.size
    for part in reader.manifest.encoding.arrays(reader.manifest.geometry):
        values_T = np.moveaxis(reader.read(part.name, blocks), 1 + part.dims.index("token"), 1)
        for block in blocks:
            number = int(masked.kept_BT[block].sum())
            assert number > 0
            np.testing.assert_array_equal(values_T[block, number:], values_T[block, [number - 1] * (16 - number)])


@pytest.mark.parametrize("changes", [pytest.param({"workers": 2}, marks=pytest.mark.slow), {"shard_blocks": 2}])
def test_what_is_masked_and_kept_does_not_depend_on_how_it_ran(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(tmp_path)
    capture(config)
    capture(config.model_copy(update={"out": tmp_path / "other"} | changes))
    one, other = (CacheReader.open(tmp_path / name) for name in ("cache", "other"))
    blocks = list(range(one.manifest.blocks.num_blocks))
    for name in array_specs(one.manifest):
        left, right = one.read(name, blocks), other.read(name, blocks)
        if changes.get("workers") or name in ("input_ids", "selected", "replacement_ids"):
            np.testing.assert_array_equal(left, right)


def test_a_run_that_was_cut_short_ends_with_the_same_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path)
    capture(config)
    done: list[int] = []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args, **kwargs)

    original = publish_shard
    monkeypatch.setattr("pipeline.place.publish_shard", interrupt)
    again = config.model_copy(update={"out": tmp_path / "again"})
    with pytest.raises(KeyboardInterrupt):
        capture(again)
    monkeypatch.undo()
    assert 0 < capture(again)["shards_captured_now"] < 7
    for path in config.out.rglob("c.*"):
        assert path.read_bytes() == (again.out / path.relative_to(config.out)).read_bytes()
    with pytest.raises(WouldLoseDataError, match=r"masking\.seed: 0, now 1"):
        capture(again.model_copy(update={"mask_seed": 1}))


def test_the_teacher_never_reads_padding(tmp_path: Path) -> None:
    teacher = load_teacher(resolve_teacher(str(make_folder(tmp_path / "teacher", "bert", spread=4.0))), device="cpu")
    ids_BT = np.random.default_rng(0).integers(5, 100, size=(2, 12))
    ids_BT[1] = ids_BT[0]
    ids_BT[1, 7:] = 50
    states = teacher.states(ids_BT, np.array([7, 7]))
    for states_BTD in states:
        torch.testing.assert_close(states_BTD[0, :7], states_BTD[1, :7], rtol=0, atol=0)
    whole = teacher.states(ids_BT, np.array([12, 12])).last_BTD
    assert not torch.allclose(whole[0, :7], whole[1, :7], atol=1e-3), "it reads both ways"


def test_a_teacher_that_does_more_to_its_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "teacher", "bert", spread=4.0)
    original: Any = transformers.AutoModelForMaskedLM.from_pretrained

    def capped(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        loaded[0].cls.register_forward_hook(lambda _module, _inputs, logits: 30 * torch.tanh(logits / 30))
        return loaded

    monkeypatch.setattr(transformers.AutoModelForMaskedLM, "from_pretrained", capped)
    refused("unsupported-head", load_teacher, resolve_teacher(str(folder)), device="cpu")


@pytest.mark.parametrize("encoding", ["topk", "sampled"])
def test_a_cache_of_hidden_states_becomes_what_a_capture_would_have_made(tmp_path: Path, encoding: str) -> None:
    states = settings(tmp_path, encoding="hidden", out=tmp_path / "states")
    capture(states)
    changes = {"k": 8} if encoding == "topk" else {"draws": 20}
    transcode(TranscodeConfig(cache=states.out, out=tmp_path / "made", encoding=encoding, device="cpu", **changes))
    assert verify_cache(tmp_path / "made") == []
    assert compare_with_teacher(tmp_path / "made", states.teacher, gguf_file=None, num_batches=3) == []
    made = CacheReader.open(tmp_path / "made")
    assert made.manifest.masking == CacheReader.open(states.out).manifest.masking
    without = states.model_copy(update={"out": tmp_path / "no-pooled", "hidden_window": 0})
    capture(without)
    pooled = TranscodeConfig(cache=without.out, out=tmp_path / "no", hidden_window=4)
    assert refusal(transcode, pooled).kind == "cannot-transcode", "its head does not read the last hidden state"


def test_states_in_8_bits_stay_in_their_order(tmp_path: Path) -> None:
    states = settings(tmp_path, encoding="hidden", out=tmp_path / "states")
    capture(states)
    transcode(TranscodeConfig(cache=states.out, out=tmp_path / "int8", last_hidden_dtype="int8", device="cpu"))
    assert verify_cache(tmp_path / "int8") == []
    old, new = (CacheReader.open(folder).batch([0, 3], 1.0).targets for folder in (states.out, tmp_path / "int8"))
    assert isinstance(old, HiddenTargets)
    assert isinstance(new, HiddenTargets)
    np.testing.assert_allclose(new.hidden_BTD, old.hidden_BTD, atol=np.abs(old.hidden_BTD).max() / 200)


def test_positions_of_the_padding_are_no_room_for_a_block(tmp_path: Path) -> None:
    config = settings(tmp_path, "roberta", block_tokens=64)
    assert capture(config)["blocks"] > 0
    longer = settings(tmp_path, "roberta", block_tokens=65, out=tmp_path / "longer")
    assert "at most 64" in refused("block-too-long", capture, longer)


def test_only_masked_positions_cost_bytes(tmp_path: Path) -> None:
    masked, every = (
        settings(tmp_path, out=tmp_path / p, mask_positions=p, k=16, block_tokens=64) for p in ("masked", "all")
    )
    sizes = [inspect_cache(Path(capture(config)["cache"]))["target_bytes_per_token"] for config in (masked, every)]
    assert sizes[0] < 0.35 * sizes[1]
    facts = estimate(masked)
    assert facts["tokens"] == CacheReader.open(masked.out).manifest.corpus.num_tokens
    assert facts["target_bytes_per_token"] == pytest.approx(sizes[0], rel=0.5)


@pytest.mark.parametrize("setting", [{"mask_probability": 0.2}, {"mask_positions": "masked"}, {"mask_seed": 3}])
def test_a_causal_teacher_has_nothing_to_mask(tmp_path: Path, setting: dict[str, Any]) -> None:
    config = settings(tmp_path, "gpt2", **setting)
    assert "mask_" in refused("unused-setting", capture, config)
    assert not config.out.exists()


def test_shares_of_more_than_all_and_a_block_without_room_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than all"):
        settings(tmp_path, mask_keep=0.6, mask_random=0.5)
    assert refusal(capture, settings(tmp_path, block_tokens=2)).kind == "block-too-short"


def test_a_teacher_whose_tokenizer_has_no_mask_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path)
    make_tokenizer(VOCABULARY).save_pretrained(tmp_path / "teacher")
    assert refusal(capture, config).kind == "no-mask-token"
