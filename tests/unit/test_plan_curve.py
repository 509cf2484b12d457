"""The law of the loss: a published one that says where it holds, or one that is fitted to runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache_spec.errors import BadInputError
from pipeline.plan.curve import PUBLISHED, Point, curve, effective_tokens, fitted, laws, loss_by_hours
from pipeline.plan.totals import WAYS
from tests.unit.test_plan_totals import rates, student


def test_the_published_law_gives_its_authors_figure() -> None:
    # Chinchilla: 70e9 parameters, 1.4e12 tokens; the authors' fit puts it near 1.97 nats.
    found = PUBLISHED.loss(70 * 10**9, 14 * 10**11, 1)
    assert found is not None
    assert found == pytest.approx(1.8172 + 482.01 / (7e10**0.3478) + 2085.43 / (1.4e12**0.3658))
    assert found == pytest.approx(1.97, abs=0.03)


def test_the_law_is_silent_where_nothing_was_run() -> None:
    assert PUBLISHED.loss(10**8, 10**7, 1) is None
    assert PUBLISHED.loss(10**8, 10**7, 40) is not None


def test_repeated_text_is_worth_less_each_time() -> None:
    worth = [effective_tokens(1000, epochs) for epochs in (1, 2, 4, 100)]
    assert worth[0] == 1000
    assert 1900 < worth[1] < 2000
    assert worth == sorted(worth)
    assert worth[-1] < 1000 * (1 + 15.39)


def test_a_fit_finds_the_law_that_made_the_points() -> None:
    def loss(parameters: int, tokens: int) -> float:
        return 2.5 + 0.3 * PUBLISHED.term(parameters, tokens)

    sizes = [(10**7, 10**5), (3 * 10**7, 2 * 10**5), (10**7, 10**6)]
    points = [Point(parameters=n, tokens=d, loss=loss(n, d), is_control=False) for n, d in sizes]
    law = fitted(points, "here")
    assert [law.shift, law.scale] == pytest.approx([2.5, 0.3])
    assert law.rms_nats == pytest.approx(0, abs=1e-9)
    assert law.loss(2 * 10**7, 10**6, 1) == pytest.approx(loss(2 * 10**7, 10**6))
    assert law.loss(10**7, 10**8, 1) is None
    assert law.loss(10**7, 10**4, 1) is None


def test_one_kind_of_run_gives_a_level_and_more_text_never_hurts() -> None:
    one = Point(parameters=10**7, tokens=10**6, loss=4.0, is_control=False)
    assert fitted([one], "here").loss(10**8, 10**6, 1) == pytest.approx(4.0)
    worse = Point(parameters=10**7, tokens=10**7, loss=5.0, is_control=False)
    assert fitted([one, worse], "here").scale == 0


def family(
    folder: Path, *rows: tuple[int, int, float, bool], epochs: float = 1.0, cache: str = "c", of_text: bool = False
) -> Path:
    folder.mkdir()
    students: list[dict[str, Any]] = [
        {
            "status": "done",
            "parameters": parameters,
            "training_tokens": tokens,
            "training_epochs": epochs,
            "control_of": "a" if control else None,
            "evaluation": {
                "cache": None if of_text else {"loss_nats": loss},
                "texts": [{"text": "a.txt", "num_tokens": 9, "loss_nats": loss if of_text else 99.0}],
            },
            "evaluation_of": {
                "cache": cache,
                "texts": [[1, 2]],
                "settings": {"block_tokens": 8, "limit_tokens": None, "limit_bytes": None},
            },
        }
        for parameters, tokens, loss, control in rows
    ]
    students.append({"status": "failed", "evaluation": None})
    (folder / "family.json").write_text(json.dumps({"students": students}))
    return folder


def test_runs_give_each_way_its_own_law(tmp_path: Path) -> None:
    run = family(tmp_path / "a", (10**7, 10**6, 4.0, False), (10**7, 10**6, 4.5, True))
    found = laws([run])
    cached, alone = found["cached"], found["cross_entropy"]
    assert cached is not None
    assert alone is not None
    assert found["online"] == cached
    assert cached.loss(10**7, 10**6, 1) == pytest.approx(4.0)
    assert alone.loss(10**7, 10**6, 1) == pytest.approx(4.5)
    assert cached.source == "fitted to a"
    taught_alone = laws([family(tmp_path / "b", (10**7, 10**6, 4.0, False))])
    assert taught_alone["cross_entropy"] is None
    plan = rates(student(parameters=10**7))
    (row,) = curve(plan, 10**6, taught_alone)
    assert row["ways"]["cached"]["loss"] == pytest.approx(4.0)
    assert row["ways"]["cross_entropy"]["loss"] is None


def test_a_line_through_two_runs_does_not_say_how_far_off_it_is(tmp_path: Path) -> None:
    rows = [(10**7, 10**6, 4.0, False), (10**7, 10**7, 3.5, False), (10**7, 10**5, 5.0, False)]
    two = laws([family(tmp_path / "two", *rows[:2])])["cached"]
    three = laws([family(tmp_path / "three", *rows)])["cached"]
    assert two is not None
    assert three is not None
    assert two.rms_nats is None
    assert three.rms_nats is not None
    assert three.rms_nats > 0


def test_repeated_tokens_are_fitted_by_their_worth(tmp_path: Path) -> None:
    fresh = 10**6
    repeated = family(tmp_path / "a", (10**7, 4 * fresh, 4.0, False), epochs=4.0)
    law = laws([repeated, family(tmp_path / "b", (10**7, fresh // 2, 5.0, False), epochs=0.5)])["cached"]
    assert law is not None
    assert law.loss(10**7, fresh, 4) == pytest.approx(4.0)
    assert law.loss(10**7, fresh // 2, 1) == pytest.approx(5.0)


def test_runs_on_unlike_text_are_not_pooled(tmp_path: Path) -> None:
    row = (10**7, 10**6, 4.0, False)
    first = family(tmp_path / "a", row)
    laws([first, family(tmp_path / "b", row)])
    for other in (family(tmp_path / "c", row, cache="d"), family(tmp_path / "e", row, of_text=True)):
        with pytest.raises(BadInputError, match=r"^other-held-out: "):
            laws([first, other])


def test_an_older_report_is_refused(tmp_path: Path) -> None:
    folder = family(tmp_path / "a", (10**7, 10**6, 4.0, False))
    text = (folder / "family.json").read_text().replace("training_epochs", "epochs")
    (folder / "family.json").write_text(text)
    with pytest.raises(BadInputError, match=r"^not-a-family: "):
        laws([folder])


@pytest.mark.parametrize(
    ("content", "kind"), [(None, "not-a-family"), ("{", "not-a-family"), ('{"students": []}', "too-few-runs")]
)
def test_folders_without_runs_are_refused(tmp_path: Path, content: str | None, kind: str) -> None:
    if content is not None:
        (tmp_path / "family.json").write_text(content)
    with pytest.raises(BadInputError, match=f"^{kind}: "):
        laws([tmp_path])


def test_curves_have_each_count_of_students_and_more_hours_lower_the_loss() -> None:
    students = [student(1e-7, 3e-7, 1e-7, parameters=parameters) for parameters in (10**8, 10**7)]
    plan = rates(*students, capture_s=1e-7, text_token_s=1e-8)
    by_way = laws([])
    rows = curve(plan, 10**9, by_way)
    assert [row["students"] for row in rows] == [1, 2]
    assert rows[1]["ways"]["cached"]["hours"] > rows[0]["ways"]["cached"]["hours"]
    # The second student is smaller: the mean of both is worse.
    assert rows[1]["ways"]["online"]["loss"] > rows[0]["ways"]["online"]["loss"]
    grid = loss_by_hours(plan, 1.0, by_way, 64)
    assert {row["students"] for row in grid} == {1, 2}
    for way in WAYS:
        told = [row["ways"][way] for row in grid if row["students"] == 2]
        assert [row["tokens"] for row in told] == sorted(row["tokens"] for row in told)
        known = [row["loss"] for row in told if row["loss"] is not None]
        assert known
        assert known == sorted(known, reverse=True)
