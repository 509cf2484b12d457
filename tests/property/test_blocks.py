"""For any documents, block length, limit and way with the last block: each token is packed once, in order."""

from __future__ import annotations

import hashlib
import re
import tempfile
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cache_spec.errors import BadInputError
from pipeline.blocks import open_staged, stage_blocks
from pipeline.corpus import pieces
from tests.texts import corpus_of

EOS = 0
ALPHABET = "abcdefgh "


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of one id a character, so that the expected stream can be written down by hand."""
    tokenizer = Tokenizer(models.WordLevel({char: number for number, char in enumerate("\0" + ALPHABET)}, "\0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = characters()


@given(
    documents=st.lists(st.text(ALPHABET, max_size=20), min_size=1, max_size=12),
    block_tokens=st.integers(1, 17),
    limit_tokens=st.none() | st.integers(1, 60),
    last_block=st.sampled_from(["drop", "keep"]),
    max_chars=st.integers(1, 9),
    batch_chars=st.integers(1, 30),
)
def test_packing_covers_each_token_once_and_in_order(
    documents: list[str],
    block_tokens: int,
    limit_tokens: int | None,
    last_block: Literal["drop", "keep"],
    max_chars: int,
    batch_chars: int,
) -> None:
    real = [text for text in documents if text.strip()]
    stream = [id_ for text in real for id_ in [*(1 + ALPHABET.index(char) for char in text), EOS]]
    wanted = stream[:limit_tokens]
    num_left = len(wanted) % block_tokens
    if last_block == "drop" and num_left:
        wanted = wanted[:-num_left]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.corpus.pieces", partial(pieces, max_chars=max_chars))
        patch.setattr("pipeline.token_stream.BATCH_CHARS", batch_chars)
        stage = partial(
            stage_blocks,
            corpus_of(documents),
            TOKENIZER,
            folder=Path(folder),
            block_tokens=block_tokens,
            eos_token_id=EOS,
            vocab_size=1 + len(ALPHABET),
            limit_tokens=limit_tokens,
            last_block=last_block,
            key="a" * 64,
            quiet=True,
        )
        if not wanted:
            with pytest.raises(BadInputError) as caught:
                stage()
            assert caught.value.kind == ("too-little-text" if real else "no-text")
            return
        staged = stage()
        assert open_staged(Path(folder), "a" * 64) == staged

        ids_BT = staged.read(0, staged.num_blocks)
        lengths_B = staged.lengths(0, staged.num_blocks)
        assert ids_BT.shape == (staged.num_blocks, block_tokens)
        assert ids_BT.reshape(-1)[: len(wanted)].tolist() == wanted
        assert set(ids_BT.reshape(-1)[len(wanted) :].tolist()) <= {EOS}
        assert lengths_B[:-1].tolist() == [block_tokens] * (staged.num_blocks - 1)
        assert lengths_B.sum() == len(wanted) == staged.num_tokens
        assert 1 <= lengths_B[-1] == staged.last_block_tokens
        assert staged.tokens_sha256 == hashlib.sha256(ids_BT.astype("<u4").tobytes()).hexdigest()
        starts = [0, *accumulate(len(text) + 1 for text in real)][:-1]
        assert staged.num_documents == sum(start < len(wanted) for start in starts)
        for block in range(staged.num_blocks):
            np.testing.assert_array_equal(staged.read(block, 1), ids_BT[block : block + 1])
            assert staged.lengths(block, 1) == lengths_B[block]


@given(
    chunks=st.lists(st.text("ab \n", max_size=30), max_size=10),
    max_chars=st.integers(1, 25),
)
def test_pieces_join_to_the_text_however_it_arrives(chunks: list[str], max_chars: int) -> None:
    cut = list(pieces(chunks, max_chars))
    assert "".join(cut) == "".join(chunks)
    assert all(1 <= len(piece) <= max_chars for piece in cut)
    assert cut == list(pieces(["".join(chunks)], max_chars)), "the cuts depend on the text alone"


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "smollm2": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated"),
}


@pytest.mark.parametrize("splitter", SPLITTERS)
@given(
    text=st.lists(
        st.sampled_from([*" ab1.'\n\r\t", " a", "\n.", "'s", "é", "中", "\u0301", "\xa0"])
        | st.characters(exclude_categories=["Cs"]),
        max_size=60,
    ).map("".join),
    max_chars=st.integers(2, 12),
)
def test_a_cut_between_visible_characters_is_one_that_the_tokenizer_makes_too(
    splitter: str, text: str, max_chars: int
) -> None:
    def words(part: str) -> list[str]:
        return [word for word, _ in SPLITTERS[splitter].pre_tokenize_str(part)]

    cut = list(pieces([text], max_chars))
    for before, after in pairwise(cut):
        ends = before[-2:] + after[:2]
        at_space = re.fullmatch(r".\S \S", ends, re.S)
        # The "prefix space" splitter marks the start of any text without a space, so only its cuts at spaces count.
        at_newline = re.fullmatch(r"\S\n\S.", ends, re.S) and splitter != "prefix space"
        if at_space or at_newline:
            assert words(before + after) == words(before) + words(after)
