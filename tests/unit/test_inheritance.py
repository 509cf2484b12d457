"""What a teacher's card declares of its terms reaches the student's card, by way of the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache_spec.reader import CacheReader
from pipeline.capture import capture
from pipeline.config import CaptureConfig
from pipeline.teacher_card import declared
from tests.models import make_folder, write_words
from train.inheritance import inheritance


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\ndatasets: [a/b, 3]\ntags: [x]\n---\n# A model\n", {"license": "mit", "datasets": ["a/b"]}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("license: mit\n---\n", {}),
        (f"---\nlicense: {'x' * 400}\n---\n", {}),
        ("# No front matter\n", {}),
        ('---\nlicense: "a\\u202eb"\n---\n', {}),
    ],
)
def test_only_plain_entries_of_a_card_count(tmp_path: Path, card: str, expected: dict[str, object]) -> None:
    (tmp_path / "README.md").write_text(card)
    assert declared(tmp_path) == expected


def test_a_folder_without_a_card_declares_nothing(tmp_path: Path) -> None:
    assert declared(tmp_path) == {}


def test_a_cache_keeps_what_the_teacher_declares_and_a_student_s_card_says_it(tmp_path: Path) -> None:
    teacher = make_folder(tmp_path / "teacher")
    text = write_words(tmp_path / "text.jsonl")
    settings = {"block_tokens": 16, "hidden_window": 0, "encoding": "topk", "k": 4, "device": "cpu"}
    rows = []
    for name in ("plain", "declared"):
        if name == "declared":
            (teacher / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: other/model\n---\n")
        cache = tmp_path / name
        capture(CaptureConfig(teacher=str(teacher), text=(str(text),), out=cache, **settings), quiet=True)
        reader = CacheReader.open(cache)
        rows.append(inheritance(reader.manifest, reader.path))
    plain, with_terms = rows
    assert plain["teacher's licence"] == "not declared in the teacher's card"
    assert (with_terms["teacher's licence"], with_terms["teacher made from"]) == ("apache-2.0", "other/model")
    told = json.dumps(with_terms)
    assert "text.jsonl" in told
    assert str(tmp_path) not in told
    assert with_terms["teacher's weights"] == plain["teacher's weights"]
