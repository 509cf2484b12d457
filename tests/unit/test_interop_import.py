"""Log-probabilities of others become a cache, whatever their columns look like; what is wrong is said in a line.

In: a small true distribution, written to Parquet in the forms that others write. Out: caches, and refusals.

Legend of axes: B rows, T tokens, K kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from cache_spec import commit as cache_commit
from cache_spec.errors import WouldLoseDataError
from cache_spec.reader import CacheReader
from cache_spec.targets import Array, HeadTargets, dense
from cache_spec.validate import verify_cache
from pipeline.interop import importing
from pipeline.interop.config import ExportConfig, ImportConfig
from pipeline.interop.export import export
from pipeline.interop.importing import import_logprobs
from tests.conformance.generate import VALID
from tests.models import make_tokenizer
from tests.refusals import refused

V, K = 50, 6
LENGTHS = (9, 4, 12, 12, 7)
Lists = list[list[list[Any]]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(V).save_pretrained(folder)
    return str(folder)


class Text:
    """Rows of tokens, and what follows each: the top K of a known distribution that likes the next token."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.tokens = [rng.integers(2, V, length).tolist() for length in LENGTHS]
        self.ids: Lists = []
        self.logprobs: Lists = []
        for row in self.tokens:
            logits_TV = rng.normal(size=(len(row), V)) * 2
            logits_TV[np.arange(len(row) - 1), row[1:]] += 4
            full_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
            ids_TK = np.argsort(-full_TV, axis=1)[:, :K]
            self.ids.append(ids_TK.tolist())
            self.logprobs.append(np.take_along_axis(full_TV, ids_TK, 1).tolist())

    def write(self, path: Path, **changes: Any) -> Path:
        """With axolotl's columns; ``changes`` replace, add or (None) remove some."""
        columns = {"input_ids": self.tokens, "target_token_ids": self.ids, "target_logprobs": self.logprobs} | changes
        table = pa.table({name: values for name, values in columns.items() if values is not None})
        parquet.write_table(table, path, row_group_size=2)
        return path


def made(path: Path, tokenizer: str, out: Path, **settings: Any) -> CacheReader:
    config = ImportConfig(from_=(path,), out=out, tokenizer=tokenizer, shard_blocks=2, **settings)
    import_logprobs(config, quiet=True)
    assert verify_cache(out) == []
    return CacheReader.open(out)


def assert_holds(reader: CacheReader, text: Text, *, lengths: tuple[int, ...] = LENGTHS, k: int = K) -> None:
    """Ids in order, and roots of probabilities within half a level."""
    batch = reader.batch(range(len(lengths)), 1.0)
    assert isinstance(batch.targets, HeadTargets)
    assert batch.lengths_B.tolist() == list(lengths)
    for block, length in enumerate(lengths):
        assert batch.input_ids_BT[block, :length].tolist() == text.tokens[block][:length]
        assert batch.targets.ids_BTK[block, :length].tolist() == [ids[:k] for ids in text.ids[block][:length]]
        expected_TK = np.array([values[:k] for values in text.logprobs[block][:length]])
        roots_TK = np.exp(batch.targets.logprobs_BTK[block, :length] / 2)
        np.testing.assert_allclose(roots_TK, np.exp(expected_TK / 2), atol=0.5 / 4096 + 1e-6)
        odds_T = batch.targets.tail_log_odds_BT[block, :length]
        mass_T = 1 - np.exp(expected_TK).sum(1)
        np.testing.assert_allclose(odds_T, np.log(mass_T / (1 - mass_T)), atol=0.5 / 64 + 1e-4)


def pairs(text: Text, entry: Callable[[int, float], Any], *, first: Any = None, kind: Any = None) -> pa.Array:
    """One column of pairs for each token itself, as vLLM has them; ``first`` stands where nothing came before."""
    rows = [
        [first, *([entry(i, value) for i, value in zip(*both, strict=True)] for both in zip(ids, values, strict=True))]
        for ids, values in zip(text.ids, text.logprobs, strict=True)
    ]
    return pa.array([row[:-1] for row in rows], kind)


RANKS = pa.list_(pa.map_(pa.int64(), pa.struct([("rank", pa.int64())])))
MAP = pa.list_(pa.map_(pa.int64(), pa.struct([("logprob", pa.float64()), ("rank", pa.int64())])))


@pytest.mark.parametrize("form", ["structs", "texts", "map"])
def test_prompt_logprobs_of_vllm_are_shifted_by_one(tmp_path: Path, tokenizer: str, form: str) -> None:
    text = Text()
    column = {
        "structs": lambda: pairs(text, lambda i, x: {"token_id": i, "logprob": x, "decoded_token": "w"}),
        "texts": lambda: pairs(text, lambda i, x: {"token": f"token_id:{i}", "logprob": x}, first=[]),
        "map": lambda: pairs(text, lambda i, x: (i, {"logprob": x, "rank": 1}), kind=MAP),
    }[form]()
    path = text.write(
        tmp_path / "a.parquet",
        input_ids=None,
        target_token_ids=None,
        target_logprobs=None,
        prompt_token_ids=text.tokens,
        prompt_logprobs=column,
    )
    reader = made(path, tokenizer, tmp_path / "cache", shift=1)
    assert_holds(reader, text, lengths=tuple(length - 1 for length in LENGTHS))
    config = ImportConfig(from_=(path,), out=tmp_path / "no", tokenizer=tokenizer, shift=0)
    assert "row 0, position 0" in refused("no-target", import_logprobs, config, quiet=True)


def test_axolotls_columns_become_a_cache(tmp_path: Path, tokenizer: str) -> None:
    text = Text()
    reader = made(text.write(tmp_path / "a.parquet"), tokenizer, tmp_path / "cache", teacher="some/model")
    assert_holds(reader, text)
    manifest = reader.manifest
    assert manifest.imported is not None
    assert (manifest.imported.logprobs, manifest.temperatures, manifest.teacher.name) == ("full", (1.0,), "some/model")
    assert (manifest.blocks.block_tokens, manifest.corpus.num_documents) == (max(LENGTHS), len(LENGTHS))


def test_padding_and_order_of_entries_do_not_matter(tmp_path: Path, tokenizer: str) -> None:
    """A last row of a mask of 0 has no target; entries of -1e9, -inf and null are none; the rest is sorted."""
    text = Text()
    ids = [[[*row[::-1], 0, 3, 7] for row in rows] for rows in text.ids]
    values = [[[*row[::-1], -1e9, float("-inf"), None] for row in rows] for rows in text.logprobs]
    masks = [[[1] * K + [0] * 3 for _ in rows] for rows in text.ids]
    for number in range(len(ids)):
        values[number][-1], masks[number][-1] = [-1e9] * (K + 3), [0] * (K + 3)
    path = text.write(tmp_path / "a.parquet", target_token_ids=ids, target_logprobs=values, target_mask=masks)
    assert_holds(made(path, tokenizer, tmp_path / "cache"), text, lengths=tuple(length - 1 for length in LENGTHS))


def test_the_shortest_list_decides_how_many_tokens_are_kept(tmp_path: Path, tokenizer: str) -> None:
    text = Text()
    ids, values = ([[[*row] for row in rows] for rows in lists] for lists in (text.ids, text.logprobs))
    del ids[2][3][4:], values[2][3][4:]
    path = text.write(tmp_path / "a.parquet", target_token_ids=ids, target_logprobs=values)
    assert_holds(made(path, tokenizer, tmp_path / "cache"), text, k=4)
    config = ImportConfig(from_=(path,), out=tmp_path / "no", tokenizer=tokenizer, k=5)
    line = refused("short-list", import_logprobs, config, quiet=True)
    assert "row 2, position 3, expected 5 tokens, found 4" in line


def test_renormalised_values_tell_nothing_of_the_tail(tmp_path: Path, tokenizer: str) -> None:
    text = Text()
    text.logprobs = [[(np.array(r) - np.logaddexp.reduce(r)).tolist() for r in rows] for rows in text.logprobs]
    path = text.write(tmp_path / "a.parquet")
    reader = made(path, tokenizer, tmp_path / "cache", logprobs="renormalised")
    targets = reader.batch([0], 1.0).targets
    assert isinstance(targets, HeadTargets)
    assert np.isneginf(targets.tail_log_odds_BT).all()
    config = ImportConfig(from_=(path,), out=tmp_path / "no", tokenizer=tokenizer, logprobs="full")
    assert "--logprobs renormalised" in refused("mass-not-one", import_logprobs, config, quiet=True)


def test_what_was_exported_comes_back(tmp_path: Path, tokenizer: str) -> None:
    for name in ("imported", "plain", "a-document-a-block"):
        out = tmp_path / name
        export(ExportConfig(cache=VALID / name, to="parquet", out=out, logprobs="full"), quiet=True)
        reader, original = made(out / "data", tokenizer, tmp_path / f"{name}-back"), CacheReader.open(VALID / name)
        blocks = range(original.manifest.blocks.num_blocks)
        ours, theirs = reader.batch(blocks, 1.0), original.batch(blocks, 1.0)
        assert isinstance(ours.targets, HeadTargets)
        assert isinstance(theirs.targets, HeadTargets)
        length = reader.manifest.blocks.block_tokens
        real_BT = np.arange(length) < ours.lengths_B[:, None]
        np.testing.assert_array_equal(ours.lengths_B, theirs.lengths_B)
        np.testing.assert_array_equal(ours.input_ids_BT[real_BT], theirs.input_ids_BT[:, :length][real_BT])
        assert_same_roots(ours.targets, theirs.targets, real_BT)


def assert_same_roots(ours: HeadTargets, theirs: HeadTargets, real_BT: Array) -> None:
    """Ids and probabilities of two heads, whose mass in the second is told by its tail."""
    length = real_BT.shape[1]
    logprobs_BTK = theirs.logprobs_BTK[:, :length].astype(np.float64)
    logprobs_BTK -= np.logaddexp.reduce(logprobs_BTK, axis=-1, keepdims=True)
    logprobs_BTK -= np.logaddexp(0, theirs.tail_log_odds_BT[:, :length, None].astype(np.float64))
    expected, found = np.exp(logprobs_BTK[real_BT] / 2), np.exp(ours.logprobs_BTK[real_BT].astype(np.float64) / 2)
    np.testing.assert_allclose(found, expected, atol=0.5 / 4096 + 1e-5)
    # Tokens that the first cache had rounded to one value have no order in it.
    np.testing.assert_array_equal(
        np.sort(ours.ids_BTK[real_BT], axis=1), np.sort(theirs.ids_BTK[:, :length][real_BT], axis=1)
    )


def test_an_interrupted_import_goes_on(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text()
    path = text.write(tmp_path / "a.parquet")
    whole = made(path, tokenizer, tmp_path / "whole")
    commit = cache_commit.commit_shard
    committed: list[int] = []

    def dies_at_the_second(cache: Path, manifest: Any, shard: int, arrays: Any) -> None:
        if committed:
            raise KeyboardInterrupt
        committed.append(shard)
        commit(cache, manifest, shard, arrays)

    monkeypatch.setattr(importing, "commit_shard", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        made(path, tokenizer, tmp_path / "cache")
    monkeypatch.setattr(importing, "commit_shard", commit)
    again = made(path, tokenizer, tmp_path / "cache")
    assert again.manifest.fingerprint == whole.manifest.fingerprint
    for spec in whole.specs.values():
        for shard in range(whole.manifest.blocks.num_shards):
            files = [cache / spec.shard_path(shard) for cache in (tmp_path / "whole", tmp_path / "cache")]
            assert files[0].read_bytes() == files[1].read_bytes()
    for settings in ({"levels": 128}, {"k": 3}, {"block_tokens": 20}):
        with pytest.raises(WouldLoseDataError, match="other-settings"):
            made(path, tokenizer, tmp_path / "cache", **settings)


def changed(lists: Lists, row: int, position: int, entry: int, value: Any) -> Lists:
    copy = [[[*entries] for entries in rows] for rows in lists]
    copy[row][position][entry] = value
    return copy


WRONG: dict[str, tuple[str, str, Callable[[Text], dict[str, Any]], dict[str, Any]]] = {
    "a probability": (
        "not-logprobs",
        "row 3, position 2",
        lambda t: {"target_logprobs": changed(t.logprobs, 3, 2, 1, 0.4)},
        {},
    ),
    "NaN": (
        "not-logprobs",
        "row 0, position 8",
        lambda t: {"target_logprobs": changed(t.logprobs, 0, 8, 0, float("nan"))},
        {},
    ),
    "an id twice": (
        "repeated-id",
        "row 4, position 6",
        lambda t: {"target_token_ids": changed(t.ids, 4, 6, 0, t.ids[4][6][1])},
        {},
    ),
    "an id outside": (
        "id-out-of-range",
        "row 1, position 0",
        lambda t: {"target_token_ids": changed(t.ids, 1, 0, 2, V)},
        {},
    ),
    "a negative id": (
        "id-out-of-range",
        "row 1, position 0",
        lambda t: {"target_token_ids": changed(t.ids, 1, 0, 2, -1)},
        {},
    ),
    "a token outside": (
        "id-out-of-range",
        "row 2, position 5",
        lambda t: {"input_ids": [[*r[:5], V, *r[6:]] if n == 2 else r for n, r in enumerate(t.tokens)]},
        {},
    ),
    "a mass above one": (
        "mass-above-one",
        "row 2, position 1",
        lambda t: {
            "target_logprobs": [
                [[-0.1] * K if (n, i) == (2, 1) else e for i, e in enumerate(r)] for n, r in enumerate(t.logprobs)
            ]
        },
        {},
    ),
    "full values declared as renormalised": (
        "mass-not-one",
        "row 0, position 0",
        lambda t: {},
        {"logprobs": "renormalised"},
    ),
    "not the top": (
        "not-top-k",
        "row 0, position 0",
        lambda t: {"target_logprobs": [[[x - 4 for x in e] for e in r] for r in t.logprobs]},
        {},
    ),
    "a gap": (
        "no-target",
        "row 2, position 4",
        lambda t: {
            "target_logprobs": [
                [[None] * K if (n, i) == (2, 4) else e for i, e in enumerate(r)] for n, r in enumerate(t.logprobs)
            ]
        },
        {},
    ),
    "a masked position": (
        "masked-position",
        "row 3, position 0",
        lambda t: {
            "target_mask": [[[int((n, i) != (3, 0))] * K for i, _ in enumerate(r)] for n, r in enumerate(t.ids)]
        },
        {},
    ),
    "too few lists": (
        "uneven-row",
        "row 0",
        lambda t: {"target_token_ids": [r[2:] for r in t.ids], "target_logprobs": [r[2:] for r in t.logprobs]},
        {},
    ),
    "lists of other lengths": (
        "uneven-row",
        "target_token_ids",
        lambda t: {"target_token_ids": [[e[1:] for e in r] for r in t.ids]},
        {},
    ),
    "the wrong shift": (
        "wrong-shift",
        "by the other shift",
        lambda t: {
            "target_token_ids": [[r[-1], *r[:-1]] for r in t.ids],
            "target_logprobs": [[r[-1], *r[:-1]] for r in t.logprobs],
        },
        {},
    ),
    "a shift that is none": ("wrong-shift", "give the other --shift", lambda t: {}, {"shift": 1}),
    "a row too long": ("row-too-long", "row 2", lambda t: {}, {"block_tokens": 10}),
    "no column of tokens": ("no-such-column", "--tokens-column", lambda t: {"input_ids": None, "words": t.tokens}, {}),
    "a column that is not there": ("no-such-column", "expected one of", lambda t: {}, {"mask_column": "mine"}),
    "two columns": ("ambiguous-column", "--logprobs-column", lambda t: {"top_logprobs": t.logprobs}, {}),
    "no lists of lists": ("bad-column", "lists", lambda t: {"target_logprobs": t.tokens}, {}),
    "tokens in no lists": (
        "bad-column",
        "input_ids, expected a list of whole numbers",
        lambda t: {"input_ids": [1] * len(t.tokens)},
        {},
    ),
    "tokens that are real numbers": (
        "bad-column",
        "expected a list of whole numbers",
        lambda t: {"input_ids": [[float(token) for token in row] for row in t.tokens]},
        {},
    ),
    "structs without logprob": (
        "bad-column",
        "expected structs of logprob, found rank",
        lambda t: {"target_token_ids": None, "target_logprobs": pairs(t, lambda i, x: (i, {"rank": 1}), kind=RANKS)},
        {"shift": 1},
    ),
    "an id of 64 bits": (
        "id-out-of-range",
        "target_token_ids, expected ids below 2^63",
        lambda t: {"target_token_ids": pa.array(changed(t.ids, 1, 0, 2, 1 << 63), pa.list_(pa.list_(pa.uint64())))},
        {},
    ),
    "a token of 64 bits": (
        "id-out-of-range",
        "input_ids, expected ids below 2^63",
        lambda t: {"input_ids": pa.array([[1 << 63, *row[1:]] for row in t.tokens], pa.list_(pa.uint64()))},
        {},
    ),
    "padding inside of a row": (
        "attention-hole",
        "row 2, position 5",
        lambda t: {
            "attention_mask": [[int((n, i) != (2, 5)) for i, _ in enumerate(r)] for n, r in enumerate(t.tokens)]
        },
        {},
    ),
    "padding on the left": (
        "attention-hole",
        "row 0, position 0",
        lambda t: {"attention_mask": [[int(i > 0) for i, _ in enumerate(r)] for r in t.tokens]},
        {},
    ),
    "a flag too few": (
        "uneven-row",
        "attention_mask",
        lambda t: {"attention_mask": [[1] * (len(r) - 1) for r in t.tokens]},
        {},
    ),
    "attention that is no list": ("bad-column", "0 and 1", lambda t: {"attention_mask": [1] * len(t.tokens)}, {}),
    "no whole numbers": ("bad-column", "whole numbers", lambda t: {"target_token_ids": t.logprobs}, {}),
    "a vocabulary too small": ("vocabulary-mismatch", "tokenizer", lambda t: {}, {"vocab_size": 10}),
    "no row with a target": (
        "no-text",
        "log-probabilities",
        lambda t: {
            "input_ids": pa.array([[5]]),
            "target_token_ids": pa.array([[[]]], pa.list_(pa.list_(pa.int64()))),
            "target_logprobs": pa.array([[[]]], pa.list_(pa.list_(pa.float64()))),
        },
        {},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_line_with_its_place(tmp_path: Path, tokenizer: str, name: str) -> None:
    kind, said, change, settings = WRONG[name]
    text = Text()
    path = text.write(tmp_path / "a.parquet", **change(text))
    config = ImportConfig(from_=(path,), out=tmp_path / "cache", tokenizer=tokenizer, **settings)
    assert said in refused(kind, import_logprobs, config, quiet=True)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    for source, kind in (("a.parquet", "broken-file"), ("b.parquet", "no-text")):
        config = ImportConfig(from_=(tmp_path / source,), out=tmp_path / "cache", tokenizer=tokenizer)
        assert source in refused(kind, import_logprobs, config, quiet=True)


def test_masked_positions_are_taken_where_that_is_asked_for(tmp_path: Path, tokenizer: str) -> None:
    text = Text()
    masks = [[[int(i > 1)] * K for i, _ in enumerate(rows)] for rows in text.ids]
    path = text.write(tmp_path / "a.parquet", target_mask=masks)
    assert_holds(made(path, tokenizer, tmp_path / "cache", ignore_mask=True), text)


def test_a_row_ends_where_its_attention_mask_does(tmp_path: Path, tokenizer: str) -> None:
    """Padding is no text, whatever its ids and lists hold; what follows a row's last token is a target still."""
    text = Text()
    longest = max(LENGTHS) + 3
    padding = [longest - length for length in LENGTHS]
    path = text.write(
        tmp_path / "a.parquet",
        input_ids=[[*row, *[-100] * more] for row, more in zip(text.tokens, padding, strict=True)],
        attention_mask=[[1] * length + [0] * more for length, more in zip(LENGTHS, padding, strict=True)],
        target_token_ids=[[*row, *[row[0]] * more] for row, more in zip(text.ids, padding, strict=True)],
        target_logprobs=[[*row, *[row[0]] * more] for row, more in zip(text.logprobs, padding, strict=True)],
    )
    whole = made(text.write(tmp_path / "b.parquet"), tokenizer, tmp_path / "whole")
    reader = made(path, tokenizer, tmp_path / "cache")
    assert_holds(reader, text)
    assert reader.manifest.corpus.tokens_sha256 == whole.manifest.corpus.tokens_sha256


def test_what_does_not_fit_below_the_last_kept_token_is_counted(
    tmp_path: Path, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One list of 240, by less than what is refused: a last token so improbable that all others are next to none."""
    text = Text()
    text.tokens, text.ids, text.logprobs = text.tokens * 6, text.ids * 6, [list(rows) for rows in text.logprobs * 6]
    other = np.log([*np.full(K - 1, (1 - 0.004) / (K - 1)), 1e-12])
    text.logprobs[1][2] = other.tolist()
    with caplog.at_level("WARNING", logger="kdpipe"):
        config = ImportConfig(from_=(text.write(tmp_path / "a.parquet"),), out=tmp_path / "cache", tokenizer=tokenizer)
        facts = import_logprobs(config, quiet=True)
    assert facts["positions_beyond"] == 1
    assert f"1 of {6 * sum(LENGTHS)} positions" in caplog.text
    assert verify_cache(tmp_path / "cache") == []
    # A single one that leaves much more is refused: these are no top k.
    text.logprobs[1][2] = (other - 0.05).tolist()
    far = ImportConfig(from_=(text.write(tmp_path / "b.parquet"),), out=tmp_path / "far", tokenizer=tokenizer)
    assert "row 1, position 2" in refused("not-top-k", import_logprobs, far, quiet=True)


def test_only_tokens_that_are_kept_decide_what_fits(tmp_path: Path, tokenizer: str) -> None:
    """vLLM adds the text's own token, however improbable: below it nothing fits, and it is cut off."""
    text = Text()
    ids, values = ([[[*row] for row in rows] for rows in lists] for lists in (text.ids, text.logprobs))
    for number in range(len(ids) - 1):
        for entries, logprobs in zip(ids[number], values[number], strict=True):
            entries.append(next(token for token in range(V) if token not in entries))
            logprobs.append(-30.0)
    path = text.write(tmp_path / "a.parquet", target_token_ids=ids, target_logprobs=values)
    assert_holds(made(path, tokenizer, tmp_path / "cache"), text)


def test_each_file_is_read_once_and_has_a_name_of_its_own(tmp_path: Path, tokenizer: str) -> None:
    for name in ("x/a.parquet", "x/deep/a.parquet", "y/a.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Text().write(tmp_path / name)

    def config(*sources: str) -> ImportConfig:
        return ImportConfig(
            from_=tuple(tmp_path / source for source in sources),
            out=tmp_path / "-".join(("to", *sources)).replace("/", "-"),
            tokenizer=tokenizer,
        )

    for sources, names in {
        ("x",): ["a.parquet", "deep/a.parquet"],
        ("x", "y"): ["x/a.parquet", "x/deep/a.parquet", "y/a.parquet"],
    }.items():
        import_logprobs(config(*sources), quiet=True)
        manifest = CacheReader.open(config(*sources).out).manifest
        assert [source.name for source in manifest.corpus.sources] == names
    (tmp_path / "link.parquet").symlink_to(tmp_path / "y" / "a.parquet")
    for twice in (("x", "x/deep"), ("y", "link.parquet")):
        assert "a.parquet" in refused("repeated-file", import_logprobs, config(*twice), quiet=True)


def test_an_export_is_taken_as_what_its_index_says(tmp_path: Path, tokenizer: str) -> None:
    def line(kind: str, out: Path, **settings: Any) -> str:
        config = ImportConfig(from_=(out,), out=tmp_path / "no", tokenizer=tokenizer, **settings)
        return refused(kind, import_logprobs, config, quiet=True)

    for name, settings in {"hot": {"temperature": 2.0, "logprobs": "full"}, "plain": {}}.items():
        export(ExportConfig(cache=VALID / "plain", to="parquet", out=tmp_path / name, **settings), quiet=True)
    assert "temperature 2.0" in line("undeclared-temperature", tmp_path / "hot" / "data")
    assert "--logprobs renormalised" in line("other-logprobs", tmp_path / "plain")
    made(tmp_path / "plain", tokenizer, tmp_path / "cache", logprobs="renormalised")
    index = tmp_path / "plain" / "export.json"
    index.write_text(index.read_text().replace('"finished": true', '"finished": false'))
    file = next((tmp_path / "plain" / "data").iterdir())
    assert "export.json" in line("unfinished-export", file, logprobs="renormalised")
    index.write_text("{}")
    line("broken-export", file)


def test_probabilities_are_off_by_what_the_page_says(tmp_path: Path, tokenizer: str) -> None:
    """A reader's head is that of the tail's rounded odds: docs/interop.md has the bound."""
    text = Text()
    for step, levels in ((1 / 64, 4096), (1 / 4, 4096), (1 / 1024, 256)):
        path = text.write(tmp_path / "a.parquet")
        reader = made(path, tokenizer, tmp_path / f"{step}", odds_step_nats=step, levels=levels)
        targets = reader.batch([2], 1.0).targets
        assert isinstance(targets, HeadTargets)
        dense_TV = dense(targets, temperature=1.0, vocab_size=V, tail="uniform")[0]
        roots_TK = np.sqrt(np.take_along_axis(dense_TV, np.array(text.ids[2]), 1))
        error = np.abs(roots_TK - np.exp(np.array(text.logprobs[2]) / 2)).max()
        assert error < step / 10 + (1 + K**0.5) / (2 * levels)
        assert error > 0.5 / levels or step < 1 / 64
