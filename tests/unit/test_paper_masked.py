"""A published recipe's file of a masked language model: its keys are honoured with their meaning, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cache_spec.errors import BadInputError
from cache_spec.manifest import MANIFEST_NAME
from cache_spec.masking import MaskingInfo
from pipeline.config import CaptureConfig
from tests.papers import write_paper
from tests.synthetic import make_manifest
from train.config import TrainConfig
from train.paper import Paper, capture_command, capture_settings, merged, read_paper, train_settings
from train.paper_cache import cache_settings

STUDENT = {"n_layers": 6, "dim": 768, "n_heads": 12, "max_position_embeddings": 512, "vocab_size": 30522}
MASKED: dict[str, Any] = {
    "mlm": True,
    "alpha_mlm": 2.0,
    "alpha_clm": 0.0,
    "student_type": "distilbert",
    "teacher_type": "bert",
    "teacher_name": "bert-base-uncased",
    "freeze_pos_embs": False,
    "data_file": "text.jsonl",
}


def paper_of(folder: Path, *, student: dict[str, Any] | None = None, **changes: Any) -> Paper:
    return read_paper(write_paper(folder, student=STUDENT if student is None else student, **MASKED | changes))


# Key, value, what cache-teacher makes of it, and what train-student does.
HONOURED: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    ("mlm", True, {}, {}),
    ("alpha_mlm", 0.5, {}, {"ce_weight": 0.5}),
    ("alpha_clm", 0, {}, {}),
    ("mlm_mask_prop", 0.2, {"mask_probability": 0.2}, {}),
    ("word_mask", 0.8, {}, {}),
    ("word_keep", 0.1, {"mask_keep": 0.1}, {}),
    ("word_rand", 0.1, {"mask_random": 0.1}, {}),
    ("mlm_smoothing", 0.0, {"mask_smoothing": 0.0}, {}),
    ("token_counts", "counts.pickle", {}, {}),
    ("restrict_ce_to_mask", True, {"mask_positions": "masked"}, {"kl_positions": "masked"}),
    ("restrict_ce_to_mask", False, {"mask_positions": "all"}, {"kl_positions": "kept"}),
    ("freeze_token_type_embds", False, {}, {"freeze_token_type_embeddings": False}),
    ("seed", 7, {"mask_seed": 7}, {"seed": 7}),
]


@pytest.mark.parametrize(("key", "value", "captured", "trained"), HONOURED)
def test_a_key_of_masking_is_honoured(
    tmp_path: Path, key: str, value: Any, captured: dict[str, Any], trained: dict[str, Any]
) -> None:
    paper = paper_of(tmp_path, **{key: value})
    capture, train = capture_settings(paper, {}), train_settings(paper, {})
    assert capture.get(key, {}) == captured
    assert train.get(key, {}) == trained
    config = CaptureConfig.model_validate(merged(capture))
    assert config.mask_probability == paper["mlm_mask_prop"]
    TrainConfig.model_validate({"cache": tmp_path, **merged(train, always=True)})
    rows = {row["key"]: row for row in paper.table(train, ())}
    assert rows[key]["note"]


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"teacher_type": "gpt2", "student_type": "gpt2"}, "teacher_type", "mlm is true"),
        ({"mlm": False, "alpha_mlm": 0.0, "alpha_clm": 2.0}, "teacher_type", "mlm is false"),
        ({"teacher_type": "roberta"}, "student_type", "roberta, the teacher_type"),
        ({"student_type": "roberta"}, "student_type", "or distilbert"),
        ({"alpha_clm": 1.0}, "alpha_clm", "mlm is true"),
        ({"alpha_clm": ...}, "alpha_clm", "mlm is true"),
        ({"mlm_mask_prop": 0.0}, "mlm_mask_prop", "above 0"),
        ({"word_rand": 0.3}, "word_mask", "add up to 1"),
        ({"freeze_token_type_embds": True}, "freeze_token_type_embds", "no token types"),
        ({"alpha_mlm": 0.0, "alpha_ce": 0.0, "alpha_cos": 0.0}, "alpha_ce", "above 0"),
    ],
)
def test_keys_that_cannot_all_be_meant_are_refused(
    tmp_path: Path, changes: dict[str, Any], key: str, words: str
) -> None:
    with pytest.raises(BadInputError) as error:
        paper_of(tmp_path, **changes)
    assert (error.value.kind, error.value.place.rpartition(" ")[2]) == ("conflicting-keys", key)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_token_types_are_frozen_in_a_student_that_has_them(tmp_path: Path) -> None:
    paper = paper_of(tmp_path, student_type="bert", freeze_token_type_embds=True)
    assert merged(train_settings(paper, {}))["freeze_token_type_embeddings"] is True


def test_the_masked_loss_takes_the_place_of_the_next_tokens_one(tmp_path: Path) -> None:
    settings = merged(train_settings(paper_of(tmp_path), {}))
    assert (settings["kl_weight"], settings["ce_weight"], settings["cosine_weight"]) == (5.0, 2.0, 1.0)
    assert settings["student_config"]["model_type"] == "distilbert"
    assert settings["student_config"]["n_layers"] == 6


def test_a_student_of_another_type_starts_from_no_layers_of_the_teacher(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="as its layers are copied"):
        train_settings(paper_of(tmp_path), {"student": "teacher-layers"})
    same = paper_of(tmp_path, student_type="bert", student={"num_hidden_layers": 6})
    assert merged(train_settings(same, {"student": "teacher-layers"}))["num_layers"] == 6


def test_positions_of_roberta_begin_behind_those_of_the_padding(tmp_path: Path) -> None:
    types = {"student_type": "roberta", "teacher_type": "roberta"}
    paper = paper_of(tmp_path, student={"max_position_embeddings": 514}, **types)
    assert merged(capture_settings(paper, {}))["block_tokens"] == 512


def test_the_command_that_makes_the_cache_says_how_it_is_masked(tmp_path: Path) -> None:
    command = capture_command(paper_of(tmp_path, restrict_ce_to_mask=True))
    assert command.endswith(
        "--mask-probability 0.15 --mask-keep 0.1 --mask-random 0.1 --mask-smoothing 0.7 --mask-positions masked"
        " --mask-seed 56"
    )


def masked_cache(folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "probability": 0.15,
        "mask_share": 1 - 0.1 - 0.1,
        "keep_share": 0.1,
        "random_share": 0.1,
        "smoothing": 0.7,
        "seed": 56,
        "positions": "all",
        "mask_token_id": 1,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "special_ids": (0, 1, 2, 3),
    }
    masking = MaskingInfo(**values | changes)
    manifest = make_manifest(teacher_name="bert-base-uncased", model_type="bert", window=1, masking=masking)
    folder.mkdir()
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return folder


@pytest.mark.parametrize(
    ("keys", "masking", "flags", "key"),
    [
        ({}, {}, {}, None),
        ({"restrict_ce_to_mask": True}, {}, {}, None),
        ({"restrict_ce_to_mask": True}, {"positions": "masked"}, {}, None),
        ({}, {"positions": "masked"}, {}, "restrict_ce_to_mask"),
        ({}, {"positions": "masked"}, {"kl_positions": "masked"}, None),
        ({"mlm_mask_prop": 0.3}, {}, {}, "mlm_mask_prop"),
        ({"mlm_smoothing": 0.5}, {}, {}, "mlm_smoothing"),
        ({"word_mask": 0.7, "word_keep": 0.2}, {}, {}, "word_mask"),
        ({"word_keep": 0.0, "word_rand": 0.2}, {}, {}, "word_keep"),
    ],
)
def test_a_cache_that_was_masked_in_another_way_is_refused(
    tmp_path: Path, keys: dict[str, Any], masking: dict[str, Any], flags: dict[str, Any], key: str | None
) -> None:
    paper, flags = paper_of(tmp_path, **keys), {"cache": masked_cache(tmp_path / "cache", **masking), **flags}
    if key is None:
        assert cache_settings(paper, flags)
        return
    with pytest.raises(BadInputError) as error:
        cache_settings(paper, flags)
    assert (error.value.kind, error.value.place.rpartition(" ")[2]) == ("other-masking", key)
