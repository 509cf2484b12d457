"""A corpus is read in the form that the public has it in, from files and from the hub; another form is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.evaluation import COMMON_GEN, ENWIK8, LAMBADA, PTB, WIKITEXT, write_corpora
from tests.refusals import refused
from train.evaluation.config import CORPORA
from train.evaluation.corpora import ENWIK8_BYTES, ENWIK8_TEST_BYTES, read_corpus
from train.evaluation.detokenise import detokenise_ptb, detokenise_wikitext


def test_every_corpus_by_name_is_read_from_its_file(tmp_path: Path) -> None:
    corpora = [read_corpus(given) for given in write_corpora(tmp_path)]
    assert tuple(corpus.name for corpus in corpora) == CORPORA
    for corpus in corpora:
        assert bool(corpus.passages) != bool(corpus.examples)
        assert corpus.source == str(tmp_path / corpus.name)


def test_wikitext_is_cut_at_titles_and_counted_before_it_is_detokenised(tmp_path: Path) -> None:
    corpus = read_corpus(write_corpora(tmp_path)[0])
    first, second = corpus.passages
    assert "= The Cat =\n" in first.text
    assert 'sat on the "mat", the end-of (the) tale.\n' in first.text
    assert "== Later ==" in first.text
    assert second.text.startswith("= Naïve =\n")
    assert second.text.endswith("the naïve 猫's tale, the end.\nthe mat\n")
    assert sum(passage.words.sum() for passage in corpus.passages) == len(WIKITEXT.split())
    assert sum(passage.num_bytes.sum() for passage in corpus.passages) == len(WIKITEXT.encode())
    with_ends = read_corpus(write_corpora(tmp_path)[0], count_line_ends=True)
    total = sum(passage.words.sum() for passage in with_ends.passages)
    assert total == len(WIKITEXT.split()) + WIKITEXT.count("\n")
    assert "not counted" in corpus.protocol
    assert "counted as a word" in with_ends.protocol


def test_a_line_that_looks_like_a_title_inside_an_article_begins_none(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(" = One = \n \n a \n = x = \n b \n \n = Two = \n \n = = = \n \n c \n")
    titles = [passage.text.splitlines()[0] for passage in read_corpus(f"wikitext103={path}").passages]
    assert titles == ["= One =", "= Two ="]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (" a 3 @,@ 000 @.@ 5 x , y ; z ! \n", "a 3,000.5 x, y; z!\n"),
        (' said : " I do n\'t [ know ] " . \n', 'said: "I don\'t [know]".\n'),
        (" = = = Deep = = = \n", "=== Deep ===\n"),
        (" the ships ' guns and 12 ° heat for $ 5 \n", "the ships' guns and 12°heat for $5\n"),
        (" <unk> N . . . \n", "<unk> N...\n"),
        (" \n", "\n"),
    ],
)
def test_lines_of_wikitext_are_written_as_people_do(line: str, expected: str) -> None:
    assert detokenise_wikitext(line) == expected


def test_lines_of_ptb_keep_unknown_words_and_numbers() -> None:
    assert detokenise_ptb(" the <unk> is n't worth $ N or N N % \n") == "the <unk> isn't worth $N or N N%\n"


def test_enwik8_whole_is_cut_to_its_test_split(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    test_split = (ENWIK8.encode() * (ENWIK8_TEST_BYTES // len(ENWIK8.encode()) + 1))[:ENWIK8_TEST_BYTES]
    with path.open("wb") as file:
        file.truncate(ENWIK8_BYTES - ENWIK8_TEST_BYTES)
        file.seek(0, 2)
        file.write(test_split)
    corpus = read_corpus(f"enwik8={path}")
    path.unlink()
    assert corpus.passages[0].text == test_split.decode(errors="ignore")
    assert "last 5,000,000" in corpus.protocol


def test_a_slice_of_enwik8_may_begin_and_end_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    path.write_bytes("猫[[x]]猫".encode()[1:-1])
    assert read_corpus(f"enwik8={path}").passages[0].text == "[[x]]"


def test_examples_have_the_last_word_or_the_sentence_as_their_target(tmp_path: Path) -> None:
    given = write_corpora(tmp_path)
    lambada, common_gen = read_corpus(given[3]), read_corpus(given[4])
    assert [example.context + example.target for example in lambada.examples] == LAMBADA
    assert lambada.examples[0].target == " tale"
    assert len({example.group for example in lambada.examples}) == len(LAMBADA)
    assert common_gen.examples[0].context == "Words: cat, mat\nSentence:"
    assert common_gen.examples[0].target == " the cat sat on the mat ."
    assert [example.group for example in common_gen.examples] == ["0", "0", "1"]
    assert "Words: A, B, C" in common_gen.protocol


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("wikitext103", "plain text of no article\n", "bad-corpus"),
        ("wikitext103", '{"text": "x"}\n', "bad-corpus"),
        ("wikitext103", " \n", "bad-corpus"),
        ("ptb", "Plain text, as people write it.\n", "bad-corpus"),
        ("enwik8", "plain text\n", "bad-corpus"),
        ("lambada", "", "bad-corpus"),
        ("lambada", "plain text\n", "broken-json"),
        ("lambada", '{"text": "word"}\n', "bad-record"),
        ("lambada", '{"text": "ends in a space "}\n', "bad-record"),
        ("lambada", '{"sentence": "a b"}\n', "bad-record"),
        ("lambada", '{"text": "a \\ud800 word"}\n', "bad-record"),
        ("common_gen", '{"concepts": ["a", "\\ud800"], "target": "x"}\n', "bad-record"),
        ("common_gen", '{"concepts": ["a"], "target": "\\udc00"}\n', "bad-record"),
        ("common_gen", '["a", "b"]\n', "bad-record"),
        ("common_gen", '{"concepts": "a b", "target": "x"}\n', "bad-record"),
        ("common_gen", '{"concepts": ["a"], "target": " "}\n', "bad-record"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, name: str, text: str, kind: str) -> None:
    (tmp_path / "file").write_text(text)
    assert str(tmp_path / "file") in refused(kind, read_corpus, f"{name}={tmp_path / 'file'}")


def test_missing_files_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    refused("unknown-text", read_corpus, f"ptb={tmp_path / 'gone'}")
    refused("cannot-read", read_corpus, f"ptb={tmp_path}")
    (tmp_path / "file").write_bytes(b" N caf\xe9 \n")
    refused("invalid-utf8", read_corpus, f"ptb={tmp_path / 'file'}")


HUB_ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "wikitext103": lambda: [{"text": line + "\n" if line.strip() else ""} for line in WIKITEXT.split("\n")[:-1]],
    "ptb": lambda: [{"sentence": line.strip()} for line in PTB.splitlines()],
    "enwik8": lambda: [{"text": ENWIK8}],
    "lambada": lambda: [{"text": text} for text in LAMBADA],
    "common_gen": lambda: [
        {"concept_set_idx": row["concept_set_id"], "concepts": row["concepts"], "target": row["target"]}
        for row in COMMON_GEN
    ],
}


@pytest.mark.parametrize("name", CORPORA)
def test_the_hub_gives_what_the_file_gives(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def from_hub(path: str, *args: object, **kwargs: object) -> list[dict[str, Any]]:
        asked.append(path)
        return HUB_ROWS[name]()

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    corpus = read_corpus(name)
    local = read_corpus(write_corpora(tmp_path)[CORPORA.index(name)])
    assert corpus.source.startswith(f"hub {asked[0]}")
    assert [passage.text for passage in corpus.passages] == [passage.text for passage in local.passages]
    assert [(e.context, e.target, e.group if name == "common_gen" else "") for e in corpus.examples] == [
        (e.context, e.target, e.group if name == "common_gen" else "") for e in local.examples
    ]


def test_a_hub_that_does_not_answer_is_one_line_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "--corpus ptb=PATH" in refused("unknown-corpus", read_corpus, "ptb")


def test_sentences_without_a_number_are_grouped_by_their_concepts(tmp_path: Path) -> None:
    path = tmp_path / "common_gen"
    rows = [{"concept_set_id": None, "concepts": [word], "target": "x"} for word in ("a", "b", "a")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = (example.group for example in read_corpus(f"common_gen={path}").examples)
    assert first == third != second
