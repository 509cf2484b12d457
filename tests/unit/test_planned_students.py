"""Students that are only planned have the config that ``train-student`` would build, by every way to describe one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache_spec.errors import BadInputError
from tests.models import make_model
from train.planned_students import PlannedStudent, planned_students

TEACHER = make_model("gpt2", num_hidden_layers=6).config


def planned(*given: str, **settings: Any) -> list[PlannedStudent]:
    def load(name: str) -> Any:
        assert name.endswith("small")
        return make_model("llama").config

    return planned_students(given, TEACHER, settings=settings, file_of=Path, load=load)


def test_a_number_is_so_many_of_the_teachers_layers() -> None:
    (one,) = planned("3", epochs=4)
    assert one.name == "layers-3"
    assert (one.model.num_hidden_layers, one.model.hidden_size) == (3, 32)
    assert one.settings == {"num_layers": 3, "epochs": 4}
    assert (one.train.student, one.train.epochs) == ("teacher-layers", 4)


def test_json_is_a_config_in_words_or_in_a_file(tmp_path: Path) -> None:
    changes = {"n_embd": 16, "n_layer": 2}
    (tmp_path / "narrow.json").write_text(json.dumps(changes))
    in_words, in_file = planned(json.dumps(changes), str(tmp_path / "narrow.json"))
    assert [one.name for one in (in_words, in_file)] == ["config", "narrow"]
    assert in_words.model.to_dict() == in_file.model.to_dict()
    assert (in_words.model.num_hidden_layers, in_words.model.hidden_size) == (2, 16)
    (other,) = planned('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}')
    assert other.model.model_type == "llama"
    assert other.model.vocab_size == TEACHER.vocab_size


def test_a_folder_or_name_is_a_model_that_exists() -> None:
    (one,) = planned("models/small")
    assert (one.name, one.train.student, one.model.model_type) == ("small", "checkpoint", "llama")


def test_a_file_of_students_is_read_as_for_training(tmp_path: Path) -> None:
    file = tmp_path / "students.yaml"
    file.write_text(
        "common: {epochs: 2, batch_blocks: 3}\ncontrol: true\nstudents:\n  a: {num_layers: 2}\n"
        "  b: {student: sliced, student_config: {hidden_size: 16}, epochs: 5}\n"
    )
    a, b = planned(str(file), batch_blocks=7)
    assert (a.train.epochs, a.train.batch_blocks, b.train.epochs) == (2, 7, 5)
    assert (b.model.num_hidden_layers, b.model.hidden_size) == (6, 16)


def test_students_of_one_name_are_counted() -> None:
    assert [one.name for one in planned("2", '{"n_embd": 16}', '{"n_embd": 8}')] == ["layers-2", "config-1", "config-2"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("7", "bad-student-config: student layers-7: num_layers, expected 1 to 6, found 7"),
        ("0", "bad-student: student 0, expected a number of layers above 0, found 0"),
        ('{"a":' * 5000, "bad-student: student {.*, expected a JSON object"),
        ("{", "bad-student: student {, expected a JSON object"),
        ('{"n_embed": 3}', "unknown-key: student config: student config key n_embed of gpt2 .did you mean n_embd"),
        ('{"model_type": "abacus"}', "bad-student-config: student config: model_type abacus"),
    ],
)
def test_what_is_no_student_is_refused_by_its_name(given: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        planned(given)


def test_json_in_words_may_be_longer_than_a_files_name() -> None:
    (one,) = planned(json.dumps({"n_embd": 16, "n_layer": 2}) + " " * 5000)
    assert one.model.hidden_size == 16


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b'{"n_embd": \xe9}', b"[" * 50_000, b"[1]"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadInputError, match=r"^bad-student: .*expected a JSON object"):
        planned(str(tmp_path / "a.json"))
