"""A published recipe's file: every key is honoured with its meaning or refused with the reason, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache_spec.errors import BadInputError
from tests.papers import PUBLISHED, STUDENT, write_paper
from train.config import TrainConfig
from train.paper import capture_command, capture_settings, describe, merged, read_paper, train_settings
from train.paper_keys import BY_NAME, KEYS

# Key, value, and the settings of train-student that follow from it.
HONOURED: list[tuple[str, Any, dict[str, Any]]] = [
    ("force", True, {}),
    ("force", "False", {}),
    ("dump_path", "runs/a", {"out": "runs/a"}),
    ("data_file", "data.pickle", {}),
    ("student_type", "gpt2", {}),
    ("student_config", ..., {}),
    ("student_pretrained_weights", None, {}),
    ("student_pretrained_weights", "other/student", {"checkpoint": "other/student"}),
    ("teacher_type", "gpt2", {}),
    ("teacher_name", "gpt2-xl", {}),
    ("temperature", "3", {"temperature": 3.0}),
    ("alpha_ce", 5, {"kl_weight": 5.0}),
    ("alpha_mlm", 0, {}),
    ("alpha_clm", 2.0, {"ce_weight": 2.0}),
    ("alpha_mse", 0.0, {}),
    ("alpha_cos", 1.0, {"cosine_weight": 1.0}),
    ("mlm", False, {}),
    ("mlm_mask_prop", 0.3, {}),
    ("word_mask", 0.8, {}),
    ("word_keep", 0.1, {}),
    ("word_rand", 0.1, {}),
    ("mlm_smoothing", 0.7, {}),
    ("token_counts", "counts.pickle", {}),
    ("token_counts", None, {}),
    ("restrict_ce_to_mask", True, {}),
    ("freeze_pos_embs", "true", {"freeze_position_embeddings": True}),
    ("freeze_token_type_embds", True, {}),
    ("n_epoch", 4.0, {"epochs": 4}),
    ("batch_size", 3, {"batch_blocks": 3}),
    ("tokens_per_batch", -1, {}),
    ("tokens_per_batch", 4096, {}),
    ("shuffle", False, {"shuffle": False}),
    ("group_by_size", True, {"group_by_length": True}),
    ("gradient_accumulation_steps", "500", {"accumulate": 500}),
    ("warmup_prop", 0.1, {"warmup": 0.1}),
    ("weight_decay", 0.01, {"weight_decay": 0.01}),
    ("learning_rate", "2.5e-4", {"learning_rate": 0.00025}),
    ("adam_epsilon", 1e-8, {"adam_epsilon": 1e-8}),
    ("max_grad_norm", 1.0, {"max_grad_norm": 1.0}),
    ("initializer_range", 0.01, {"initializer_range": 0.01}),
    ("fp16", True, {"precision": "bf16"}),
    ("fp16", False, {"precision": "fp32"}),
    ("fp16_opt_level", "O1", {}),
    ("n_gpu", 0, {"device": "cpu"}),
    ("n_gpu", 1, {}),
    ("local_rank", 0, {}),
    ("seed", 7, {"seed": 7}),
    ("log_interval", 1500, {"log_every": 3}),
    ("log_interval", 10, {"log_every": 1}),
    ("checkpoint_interval", 4000, {"checkpoint_every": 8}),
    ("n_nodes", 1, {}),
    ("node_id", 0, {}),
    ("world_size", 1, {}),
    ("n_gpu_per_node", 1, {}),
    ("global_rank", 0, {}),
    ("master_port", -1, {}),
    ("is_master", True, {}),
    ("multi_gpu", False, {}),
    ("multi_node", False, {}),
]

# Key, value, kind of the refusal, and words that its reason has.
REFUSED: list[tuple[str, Any, str, str]] = [
    ("force", 1, "wrong-type", "true or false"),
    ("dump_path", ..., "missing-key", "text"),
    ("dump_path", 3, "wrong-type", "text"),
    ("data_file", "  ", "wrong-type", "text"),
    ("student_type", "distilbert", "conflicting-keys", "the teacher_type"),
    ("student_type", "opt", "conflicting-keys", "the teacher_type"),
    ("student_config", "nowhere.json", "bad-student-config", "No such file"),
    ("student_pretrained_weights", "tf_gpt2.pth", "unsupported-key", "--student teacher-layers"),
    ("teacher_type", "bert", "conflicting-keys", "mlm is false"),
    ("teacher_name", ["gpt2"], "wrong-type", "text"),
    ("temperature", 0.0, "out-of-range", "at least 0.05"),
    ("temperature", True, "wrong-type", "a number"),
    ("alpha_ce", -1.0, "out-of-range", "at least 0"),
    ("alpha_mlm", 0.5, "conflicting-keys", "mlm is false"),
    ("alpha_clm", "two", "wrong-type", "a number"),
    ("alpha_mse", 1.0, "unsupported-key", "raw logits"),
    ("alpha_cos", "nan", "wrong-type", "a number"),
    ("mlm", 1, "wrong-type", "true or false"),
    ("mlm_mask_prop", 2, "out-of-range", "at most 1"),
    ("word_mask", 0.7, "conflicting-keys", "add up to 1"),
    ("word_keep", -0.1, "out-of-range", "at least 0"),
    ("word_rand", "yes", "wrong-type", "a number"),
    ("mlm_smoothing", -1, "out-of-range", "at least 0"),
    ("token_counts", 4, "wrong-type", "text"),
    ("restrict_ce_to_mask", "maybe", "wrong-type", "true or false"),
    ("freeze_pos_embs", 0, "wrong-type", "true or false"),
    ("freeze_token_type_embds", "no", "wrong-type", "true or false"),
    ("n_epoch", 1.5, "wrong-type", "a whole number"),
    ("batch_size", 0, "out-of-range", "at least 1"),
    ("tokens_per_batch", 0, "unsupported-key", "0 tokens"),
    ("tokens_per_batch", -2, "out-of-range", "at least -1"),
    ("shuffle", 1, "wrong-type", "true or false"),
    ("group_by_size", "on", "wrong-type", "true or false"),
    ("gradient_accumulation_steps", 0, "out-of-range", "at least 1"),
    ("warmup_prop", 1.1, "out-of-range", "at most 1"),
    ("weight_decay", -1e-3, "out-of-range", "at least 0"),
    ("learning_rate", 0, "out-of-range", "above 0"),
    ("adam_epsilon", 0.0, "out-of-range", "above 0"),
    ("max_grad_norm", -5, "out-of-range", "above 0"),
    ("initializer_range", 0, "out-of-range", "above 0"),
    ("fp16", "half", "wrong-type", "true or false"),
    ("fp16_opt_level", "O9", "out-of-range", "one of O0, O1"),
    ("n_gpu", -1, "out-of-range", "at least 0"),
    ("local_rank", -2, "out-of-range", "at least -1"),
    ("seed", 2**63, "out-of-range", "below"),
    ("log_interval", 0, "out-of-range", "at least 1"),
    ("checkpoint_interval", 0, "out-of-range", "at least 1"),
    ("n_nodes", 0, "out-of-range", "at least 1"),
    ("node_id", "a", "wrong-type", "a whole number"),
    ("world_size", 0, "out-of-range", "at least 1"),
    ("n_gpu_per_node", -1, "out-of-range", "at least 0"),
    ("global_rank", -1, "out-of-range", "at least 0"),
    ("master_port", -2, "out-of-range", "at least -1"),
    ("is_master", "x", "wrong-type", "true or false"),
    ("multi_gpu", 2, "wrong-type", "true or false"),
    ("multi_node", [], "wrong-type", "true or false"),
]


def changed(key: str, value: Any) -> dict[str, Any]:
    return {} if value is ... else {key: value}


def test_every_key_is_tested_both_ways() -> None:
    assert {key for key, *_ in HONOURED} == set(BY_NAME) == {key for key, *_ in REFUSED}


def test_the_published_file_has_no_key_that_the_table_lacks() -> None:
    published = {"_".join(key.lower().replace("-", " ").split()) for key in PUBLISHED}
    assert len(published) == len(PUBLISHED) == 33
    assert published <= set(BY_NAME)


@pytest.mark.parametrize(("key", "value", "settings"), HONOURED)
def test_a_key_is_honoured(tmp_path: Path, key: str, value: Any, settings: dict[str, Any]) -> None:
    paper = read_paper(write_paper(tmp_path, **changed(key, value)))
    mapped = train_settings(paper, {})
    assert {name: mapped.get(key, {}).get(name) for name in settings} == settings
    all_settings = merged(mapped, always=True)
    assert set(all_settings) <= set(TrainConfig.model_fields)
    TrainConfig.model_validate({"cache": tmp_path, **all_settings})
    # Each key that the file has is accounted for, with what it means.
    row = next((row for row in paper.table(mapped, ()) if row["key"] == key), None)
    if value is not None:
        assert row is not None
        assert row["note"]
        assert row["in_file"]


@pytest.mark.parametrize(("key", "value", "kind", "words"), REFUSED)
def test_a_key_is_refused_in_one_line_that_names_it(
    tmp_path: Path, key: str, value: Any, kind: str, words: str
) -> None:
    with pytest.raises(BadInputError) as error:
        read_paper(write_paper(tmp_path, **{key: value}))
    assert error.value.kind == kind
    assert f"paper.json: {key}" in error.value.place
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_every_setting_of_the_table_takes_the_default_of_its_key() -> None:
    defaults = {key.setting: key.default for key in KEYS if key.setting and not key.required}
    TrainConfig.model_validate({"cache": "c", "out": "o", "student": "config", **defaults})


def test_the_published_values_arrive(tmp_path: Path) -> None:
    path = tmp_path / "paper.json"
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    path.write_text(json.dumps(PUBLISHED | {"student config": str(tmp_path / "student.json")}))
    paper = read_paper(path)
    settings = merged(train_settings(paper, {}), always=True)
    assert settings == {
        "schedule": "linear",
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "out": "run",
        "student": "config",
        "student_config": {"model_type": "gpt2", **STUDENT},
        "initializer_range": 0.02,
        "temperature": 2.0,
        "kl_weight": 5.0,
        "ce_weight": 2.0,
        "cosine_weight": 1.0,
        "freeze_position_embeddings": True,
        "epochs": 4,
        "batch_blocks": 1,
        "shuffle": True,
        "group_by_length": True,
        "accumulate": 500,
        "warmup": 0.05,
        "weight_decay": 0.0,
        "learning_rate": 0.00025,
        "adam_epsilon": 1e-06,
        "max_grad_norm": 5.0,
        "precision": "fp32",
        "seed": 56,
        "log_every": 1,
        "checkpoint_every": 8,
    }


@pytest.mark.parametrize("spelt", ["Batch Size", "batch-size", " BATCH  SIZE ", "batch_size"])
def test_keys_are_read_in_any_spelling(tmp_path: Path, spelt: str) -> None:
    changes: dict[str, Any] = {"batch_size": ..., spelt: 7}
    assert read_paper(write_paper(tmp_path, **changes))["batch_size"] == 7


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ('{"batch size": 1, "batch_size": 1}', "duplicate-key"),
        ('{"shuffle": true, "shuffle": true}', "duplicate-key"),
        ('{"batch sise": 1}', "unknown-key"),
        ("[]", "unreadable-paper-config"),
        ("{", "unreadable-paper-config"),
        ("[" * 100_000, "unreadable-paper-config"),
        ("\udcff", "unreadable-paper-config"),
        ('{"seed": 1e999}', "missing-key"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, body: str, kind: str) -> None:
    path = tmp_path / "paper.json"
    path.write_bytes(body.encode(errors="surrogateescape"))
    with pytest.raises(BadInputError) as error:
        read_paper(path)
    assert error.value.kind == kind


@pytest.mark.parametrize(
    ("changes", "student", "key"),
    [
        ({"alpha_ce": 0.0, "alpha_clm": 0.0, "alpha_cos": 0.0}, STUDENT, "alpha_ce"),
        ({"fp16": True, "fp16_opt_level": "O2"}, STUDENT, "fp16_opt_level"),
        ({}, STUDENT | {"initializer_range": 0.5}, "initializer_range"),
        ({}, STUDENT | {"model_type": "llama"}, "student_config"),
        ({}, STUDENT | {"n_ctx": 512}, "student_config"),
        ({}, STUDENT | {"n_positions": 0}, "student_config"),
    ],
)
def test_keys_that_cannot_all_be_meant_are_refused(
    tmp_path: Path, changes: dict[str, Any], student: dict[str, Any], key: str
) -> None:
    with pytest.raises(BadInputError) as error:
        read_paper(write_paper(tmp_path, student=student, **changes))
    assert error.value.kind == "conflicting-keys"
    assert error.value.place.endswith(f": {key}")


def test_as_many_processors_as_ranks_are_asked_for(tmp_path: Path) -> None:
    paper = read_paper(write_paper(tmp_path, n_gpu=4))
    assert train_settings(paper, {}, num_ranks=4)
    with pytest.raises(BadInputError, match="nproc-per-node 4"):
        train_settings(paper, {}, num_ranks=1)


def test_fresh_weights_follow_the_key_then_the_students_file_then_the_default(tmp_path: Path) -> None:
    def spread(own: dict[str, Any], **keys: Any) -> float:
        paper = read_paper(write_paper(tmp_path, student=STUDENT | own, **keys))
        return float(merged(train_settings(paper, {}))["initializer_range"])

    assert spread({}, initializer_range=0.01) == 0.01
    assert spread({"initializer_range": 0.3}, initializer_range=...) == 0.3
    assert spread({}, initializer_range=...) == 0.02


def test_teachers_layers_take_the_depth_of_the_students_file(tmp_path: Path) -> None:
    paper = read_paper(write_paper(tmp_path, student=STUDENT | {"n_ctx": 1024, "task_specific_params": {}}))
    settings = merged(train_settings(paper, {"student": "teacher-layers"}))
    assert settings["num_layers"] == 6
    assert "initializer_range" not in settings
    assert settings["student_config"] == {name: size for name, size in STUDENT.items() if name != "n_layer"}
    chosen = merged(train_settings(paper, {"student": "teacher-layers", "layer_indices": "0,2"}))
    assert "num_layers" not in chosen


def test_given_weights_must_be_of_the_students_shape(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    config = tmp_path / "given" / "config.json"
    config.write_text(json.dumps(STUDENT | {"architectures": ["GPT2LMHeadModel"]}))
    paper = read_paper(write_paper(tmp_path, student_pretrained_weights=str(tmp_path / "given")))
    assert merged(train_settings(paper, {}))["checkpoint"] == str(tmp_path / "given")
    config.write_text(json.dumps(STUDENT | {"n_layer": 12}))
    with pytest.raises(BadInputError, match="n_layer = 6"):
        train_settings(paper, {})


def test_the_table_says_what_a_flag_overrules_and_what_is_a_default(tmp_path: Path) -> None:
    paper = read_paper(write_paper(tmp_path))
    rows = {row["key"]: row for row in paper.table(train_settings(paper, {}), ["kl_weight"])}
    assert rows["alpha_ce"]["settings"] == {}
    assert rows["alpha_ce"]["overruled_by"] == ["--kl-weight"]
    assert rows["seed"]["in_file"] is False
    assert "token_counts" not in rows
    json.dumps(list(rows.values()))
    lines = "\n".join(describe(rows.values()))
    assert "set by --kl-weight" in lines
    assert "56 (default)" in lines


def test_a_file_drives_the_capture_too(tmp_path: Path) -> None:
    paper = read_paper(write_paper(tmp_path, data_file="text.jsonl"))
    assert merged(capture_settings(paper, {})) == {
        "out": "run-cache",
        "text": ["text.jsonl"],
        "last_block": "each",
        "teacher": "gpt2",
        "temperatures": [1.0, 2.0],
        "block_tokens": 1024,
        "hidden_window": 1,
    }
    without = read_paper(write_paper(tmp_path, data_file="text.jsonl", alpha_cos=0, temperature=1))
    settings = merged(capture_settings(without, {}))
    assert (settings["hidden_window"], settings["temperatures"]) == (0, [1.0])


def test_a_pickle_must_be_imported_first(tmp_path: Path) -> None:
    paper = read_paper(write_paper(tmp_path))
    with pytest.raises(BadInputError, match=r"kdpipe import-pickle data/binarized\.pickle --out data/binarized\.ids"):
        capture_settings(paper, {})
    assert capture_settings(paper, {"text": ("ids",)})
    assert capture_command(paper) == (
        "kdpipe import-pickle data/binarized.pickle --out data/binarized.ids --tokenizer gpt2 &&"
        " kdpipe cache-teacher --teacher gpt2 --text data/binarized.ids --out run-cache --temperatures 1,2"
        " --block-tokens 1024 --last-block each --encoding prototype --hidden-window 1"
    )
