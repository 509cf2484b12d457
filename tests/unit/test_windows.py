"""Windows score each token once, with the context that was promised, and words and bytes add up to the corpus's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation import COMMON_GEN, LAMBADA, TEXT, save_tokenizer, write_corpora
from tests.refusals import refused
from train.evaluation.corpora import Corpus, Passage, read_corpus
from train.evaluation.windows import plan_windows, start_token


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def text_corpus(*texts: str, unit: str = "document") -> Corpus:
    passages = tuple(
        Passage(
            lines=tuple(text.splitlines(keepends=True)),
            words=np.array([len(line.split()) for line in text.splitlines()]),
            num_bytes=np.array([len(line.encode()) for line in text.splitlines(keepends=True)]),
        )
        for text in texts
    )
    return Corpus(name="ptb", source="x", protocol="x", unit=unit, passages=passages, counts_words=True)


@settings(max_examples=60, deadline=None)
@given(window=st.integers(2, 60), data=st.data())
def test_strided_windows_score_each_token_once_with_the_context_promised(
    tokenizer: Any, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    texts = data.draw(st.lists(st.integers(1, 3).map(lambda n: TEXT[: 40 * n + n] + "\n"), min_size=1, max_size=3))
    start_id = start_token(tokenizer)
    assert start_id == tokenizer.eos_token_id
    plan = plan_windows(text_corpus(*texts), tokenizer, mode="strided", window=window, stride=stride, start_id=start_id)
    for number, text in enumerate(texts):
        windows = [cut for cut in plan.windows if cut.unit == number]
        ids = tokenizer(text)["input_ids"]
        assert [token for cut in windows for token in cut.ids[-cut.num_scored :]] == ids
        scored = 0
        for cut in windows:
            read = len(cut.ids) - 1
            assert read <= window
            context = read - cut.num_scored + 1
            assert context >= min(window - stride, scored) + 1
            before = [start_id, *ids][: scored + cut.num_scored + 1]
            assert cut.ids.tolist() == before[-read - 1 :]
            scored += cut.num_scored
        assert sum(cut.words for cut in windows) == pytest.approx(len(text.split()))
        assert sum(cut.num_bytes for cut in windows) == pytest.approx(len(text.encode()))


def test_the_windows_of_a_text_without_documents_are_units_of_their_own(tokenizer: Any) -> None:
    corpus = text_corpus(TEXT, unit="window")
    plan = plan_windows(corpus, tokenizer, mode="strided", window=16, stride=8, start_id=0)
    assert [cut.unit for cut in plan.windows] == list(range(len(plan.windows)))
    assert plan.unit == "window"
    assert "16 tokens every 8" in plan.protocol


def test_blocks_do_not_overlap_and_do_not_predict_their_first_token(tokenizer: Any) -> None:
    plan = plan_windows(text_corpus(TEXT, TEXT), tokenizer, mode="blocks", window=16, stride=16)
    ids = tokenizer(TEXT + TEXT)["input_ids"]
    assert len(ids) % 16 > 1
    assert [token for cut in plan.windows for token in cut.ids] == ids
    assert all(cut.num_scored == len(cut.ids) - 1 for cut in plan.windows)
    assert (plan.unit, plan.stride) == ("block", None)
    assert sum(cut.words for cut in plan.windows) < 2 * len(TEXT.split())


def test_words_of_a_cut_line_are_counted_in_proportion(tokenizer: Any) -> None:
    plan = plan_windows(text_corpus("ab ab\nab ab ab ab\n"), tokenizer, mode="strided", window=6, stride=6, start_id=0)
    assert [cut.words for cut in plan.windows] == pytest.approx([2.0, 2.0, 2.0])


def test_a_sample_is_spread_evenly_and_says_so(tokenizer: Any) -> None:
    def plan(limit: int | None) -> Any:
        corpus = text_corpus(TEXT, unit="window")
        return plan_windows(corpus, tokenizer, mode="strided", window=8, stride=4, start_id=0, limit_tokens=limit)

    every, some = plan(None), plan(20)
    assert not every.is_sampled
    assert some.is_sampled
    kept = [cut.unit for cut in some.windows]
    assert len(kept) == 5
    assert len({b - a for a, b in pairwise(kept)}) <= 2
    assert 0 < kept[0] < len(every.windows) / 5
    assert f"a sample: 5 of {len(every.windows)} windows" in some.protocol
    assert plan(10**9).windows[-1].ids.tolist() == every.windows[-1].ids.tolist()


def test_examples_score_the_target_and_lose_the_beginning_of_a_long_context(tmp_path: Path, tokenizer: Any) -> None:
    lambada, common_gen = (read_corpus(given) for given in write_corpora(tmp_path)[3:])
    plan = plan_windows(lambada, tokenizer, mode="strided", window=12, stride=6)
    for window, text in zip(plan.windows, LAMBADA, strict=True):
        assert window.ids.tolist() == tokenizer(text)["input_ids"][-13:]
        assert window.num_scored == len(tokenizer(" " + text.split()[-1])["input_ids"])
    assert (plan.mode, plan.stride) == ("examples", None)
    plan = plan_windows(common_gen, tokenizer, mode="strided", window=64, stride=6, limit_examples=2)
    assert plan.is_sampled
    assert [example.target for example in plan.examples] == [f" {COMMON_GEN[n]['target']}" for n in (0, 2)]
    assert [window.num_bytes for window in plan.windows] == [len(e.target.encode()) for e in plan.examples]
    whole = plan_windows(common_gen, tokenizer, mode="strided", window=64, stride=6)
    assert [window.unit for window in whole.windows] == [0, 0, 1]


def test_what_cannot_be_cut_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    given = write_corpora(tmp_path)
    common: dict[str, Any] = {"mode": "strided", "window": 3, "stride": 2}
    refused("target-too-long", plan_windows, read_corpus(given[4]), tokenizer, **common)
    refused("no-start-token", plan_windows, read_corpus(given[0]), tokenizer, **common)
    assert plan_windows(read_corpus(given[0]), tokenizer, **common | {"mode": "blocks"}).corpus.counts_words
