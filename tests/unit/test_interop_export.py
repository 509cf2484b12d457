"""Exports hold what the cache holds: Parquet as others read it, and plain arrays.

In: golden caches of every encoding. Out: columns compared with the reader's, and with a trainer's use of them.

Legend of axes: B rows, T tokens, K kept, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors import safe_open

from cache_spec.encodings.topk import TopK
from cache_spec.errors import KdpipeError, WouldLoseDataError
from cache_spec.reader import CacheReader
from cache_spec.targets import Array, HeadTargets, HiddenTargets, dense
from pipeline.interop import tables_out
from pipeline.interop.arrays_out import bytes_of_block
from pipeline.interop.config import ExportConfig
from pipeline.interop.export import AsParquet, export
from pipeline.interop.index import INDEX_NAME
from tests.conformance.generate import CASES, VALID
from tests.refusals import refusal, refused
from tests.synthetic import make_manifest, make_rows, write_cache

HEADS = ("plain", "prototype", "prototype-residual", "kept-last-block", "a-document-a-block", "wide-ids")


def exported(name: str, out: Path, **settings: Any) -> Path:
    config = ExportConfig(cache=VALID / name, out=out, **{"to": "parquet", **settings})
    export(config, quiet=True)
    return out


def opened(out: Path, cache: Path) -> Any:
    """What Hugging Face datasets makes of an export, without a network."""
    files = sorted(map(str, (out / "data").glob("*.parquet")))
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))


def full_logprobs(reader: CacheReader, temperature: float) -> Array:
    """float64 [N, T, V]: what the reader's targets stand for, the tail spread evenly."""
    batch = reader.batch(range(reader.manifest.blocks.num_blocks), temperature)
    head = reader.output_head() if isinstance(batch.targets, HiddenTargets) else None
    vocab_size = reader.manifest.teacher.vocab_size
    with np.errstate(divide="ignore"):
        return np.log(dense(batch.targets, temperature=temperature, vocab_size=vocab_size, tail="uniform", head=head))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [*HEADS, "hidden-int8"])
def test_datasets_opens_the_same_values_as_the_reader(tmp_path: Path, name: str, temperature: float) -> None:
    k: dict[str, Any] = {"k": 3} if name.startswith("hidden") else {}
    out = exported(name, tmp_path / "out", logprobs="full", tail=True, temperature=temperature, **k)
    rows, reader = opened(out, tmp_path / "hub"), CacheReader.open(VALID / name)
    logprobs_NTV = full_logprobs(reader, temperature)
    lengths = reader.lengths(range(len(rows)))
    ids_NT = reader.read("input_ids", range(len(rows)))
    assert len(rows) == reader.manifest.blocks.num_blocks
    for block, row in enumerate(rows):
        length = int(lengths[block])
        assert row["input_ids"] == row["labels"] == ids_NT[block, :length].tolist()
        assert row["attention_mask"] == [1] * length
        ids_TK, values_TK = np.array(row["target_token_ids"]), np.array(row["target_logprobs"])
        expected_TV = logprobs_NTV[block, :length]
        np.testing.assert_allclose(values_TK, np.take_along_axis(expected_TV, ids_TK, 1), rtol=2e-5, atol=2e-5)
        assert (np.diff(values_TK, axis=1) <= 0).all()
        outside_TV = expected_TV.copy()
        np.put_along_axis(outside_TV, ids_TK, -np.inf, 1)
        tails_T = np.logaddexp.reduce(outside_TV, axis=1)
        np.testing.assert_allclose(row[f"log_tail_mass_t{temperature:g}"], tails_T, rtol=1e-4, atol=1e-5)
        assert row["target_mask"] == [[1] * ids_TK.shape[1]] * (length - 1) + [[0] * ids_TK.shape[1]]


def test_what_is_not_asked_for_is_renormalised_and_has_no_more_columns(tmp_path: Path) -> None:
    rows = opened(exported("plain", tmp_path / "out", dtype="float16", k=3), tmp_path / "hub")
    assert rows.column_names == [
        "input_ids",
        "attention_mask",
        "labels",
        "target_token_ids",
        "target_logprobs",
        "target_mask",
    ]
    reader = CacheReader.open(VALID / "plain")
    targets = reader.batch([0], 1.0).targets
    assert isinstance(targets, HeadTargets)
    logprobs_TK = targets.logprobs_BTK[0, :, :3]
    expected_TK = logprobs_TK - np.logaddexp.reduce(logprobs_TK, axis=-1, keepdims=True)
    np.testing.assert_allclose(rows[0]["target_logprobs"], expected_TK, rtol=1e-3)
    assert rows.features["target_logprobs"].feature.feature.dtype == "float16"


def collated(rows: list[dict[str, Any]]) -> dict[str, Array]:
    """What a trainer of padded batches makes of rows: lists padded on the right, masks 0 there."""
    longest, k = max(len(row["input_ids"]) for row in rows), max(len(row["target_mask"][0]) for row in rows)
    out = {"labels": np.full((len(rows), longest), -100)}
    out |= {name: np.zeros((len(rows), longest, k), np.int64) for name in ("target_token_ids", "target_mask")}
    out["target_logprobs"] = np.full((len(rows), longest, k), -1e9)
    for number, row in enumerate(rows):
        for name, values in out.items():
            given = np.array(row[name])
            values[number, : len(given)] = given
    return out


def test_a_trainer_pairs_targets_with_the_student_that_predicts_the_next_token(tmp_path: Path) -> None:
    """KL over the columns, with the student's row j against target j, is zero where the student is the teacher."""
    out = exported("a-document-a-block", tmp_path / "out")
    batch = collated(list(opened(out, tmp_path / "hub")))
    reader = CacheReader.open(VALID / "a-document-a-block")
    student_BTV = full_logprobs(reader, 1.0)[:, : batch["labels"].shape[1]]
    valid = batch["target_mask"].astype(bool)
    # A target counts where the label that is shifted by one does: not at the last token of a row, nor in padding.
    shifted = np.pad(batch["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    np.testing.assert_array_equal(valid.any(-1), shifted != -100)

    def divergence(student: Array) -> float:
        kept = np.take_along_axis(student, batch["target_token_ids"], 2)
        kept = kept - np.logaddexp.reduce(kept, axis=-1, keepdims=True)
        teacher = batch["target_logprobs"]
        return float((np.exp(teacher) * (teacher - kept))[valid].sum())

    assert divergence(student_BTV) == pytest.approx(0, abs=1e-4)
    assert divergence(np.roll(student_BTV, 1, axis=1)) > 1


@pytest.mark.parametrize("name", ["sampled", "sparsified"])
def test_drawn_tokens_have_columns_of_their_own(tmp_path: Path, name: str) -> None:
    rows, reader = opened(exported(name, tmp_path / "out"), tmp_path / "hub"), CacheReader.open(VALID / name)
    assert {"point_token_ids", "point_probs"} < set(rows.column_names)
    assert not {"target_logprobs", "target_token_ids"} & set(rows.column_names)
    expected_NTV = np.exp(full_logprobs(reader, 1.0))
    for block, row in enumerate(rows):
        for at, (ids, probs) in enumerate(zip(row["point_token_ids"], row["point_probs"], strict=True)):
            np.testing.assert_allclose(probs, expected_NTV[block, at, ids], rtol=1e-5)
            assert sum(probs) == pytest.approx(1, abs=1e-5)
    config = ExportConfig(cache=VALID / name, to="parquet", out=tmp_path / "k", k=3)
    assert "drawn tokens" in refused("unused-setting", export, config, quiet=True)


@pytest.mark.parametrize("name", sorted(CASES))
def test_plain_arrays_hold_what_the_reader_decodes(tmp_path: Path, name: str) -> None:
    out = exported(name, tmp_path / "out", to="safetensors")
    reader, index = CacheReader.open(VALID / name), json.loads((out / INDEX_NAME).read_text())
    blocks, grid = reader.manifest.blocks, reader.manifest.temperatures
    assert index["finished"]
    files = {path for path in index["files"] if path.startswith("shards/")}
    assert len(files) == blocks.num_shards
    for path in files:
        entry = index["files"][path]
        numbers = range(entry["first_block"], entry["first_block"] + entry["num_blocks"])
        with safe_open(out / path, framework="np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            assert file.metadata()["fingerprint"] == reader.manifest.fingerprint
        batches = [reader.batch(numbers, temperature) for temperature in grid]
        np.testing.assert_array_equal(arrays["input_ids"], batches[0].input_ids_BT)
        if batches[0].hidden_BWD is not None:
            np.testing.assert_array_equal(arrays["hidden"], batches[0].hidden_BWD)
        if batches[0].masked is not None:
            np.testing.assert_array_equal(arrays["kept"], batches[0].masked.kept_BT)
        for at, batch in enumerate(batches):
            if isinstance(batch.targets, HeadTargets):
                np.testing.assert_array_equal(arrays["head_ids"], batch.targets.ids_BTK)
                np.testing.assert_array_equal(arrays["head_logprobs"], batch.targets.logprobs_BTK)
                odds = batch.targets.tail_log_odds_BT.astype(np.float64)
                np.testing.assert_allclose(arrays["log_tail_mass"][:, at], -np.logaddexp(0, -odds), rtol=1e-6)
            elif isinstance(batch.targets, HiddenTargets):
                np.testing.assert_array_equal(arrays["last_hidden"], batch.targets.hidden_BTD)
            else:
                np.testing.assert_array_equal(arrays["point_ids"][:, at], batch.targets.ids_BTJ)
                np.testing.assert_array_equal(arrays["point_probs"][:, at], batch.targets.probs_BTJ)
        assert ("block_loss" in arrays) is (reader.manifest.imported is None)
    if reader.manifest.tables:
        with safe_open(out / "tables.safetensors", framework="np") as file:
            names = set(file.keys())
        assert names == ({"prototypes"} if "prototypes" in reader.manifest.tables else set(reader.manifest.tables))


def test_an_interrupted_export_goes_on_with_the_files_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exported("plain", tmp_path / "whole")
    write = AsParquet.write
    written: list[str] = []

    def dies_at_the_second(self: AsParquet, part: Any, *rest: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(part.name)
        write(self, part, *rest)

    monkeypatch.setattr(AsParquet, "write", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        exported("plain", tmp_path / "out")
    assert not json.loads((tmp_path / "out" / INDEX_NAME).read_text())["finished"]
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    monkeypatch.setattr(AsParquet, "write", write)
    facts = export(ExportConfig(cache=VALID / "plain", to="parquet", out=tmp_path / "out"), quiet=True)
    assert (facts["files"], facts["files_written_now"]) == (2, 1)
    for path in whole.rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(whole)).read_bytes()
    again = export(ExportConfig(cache=VALID / "plain", to="parquet", out=tmp_path / "out"), quiet=True)
    assert again["files_written_now"] == 0


def test_what_reads_back_differently_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = tables_out.table_digest
    calls: list[pa.Table] = []

    def changed_on_disk(table: pa.Table) -> str:
        calls.append(table)
        return digest(table) if len(calls) == 1 else "another"

    monkeypatch.setattr(tables_out, "table_digest", changed_on_disk)
    with pytest.raises(KdpipeError) as caught:
        exported("plain", tmp_path / "out")
    assert caught.value.kind == "not-as-written"
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_digest_sees_values_and_how_lists_divide_them() -> None:
    tables = [
        pa.table({"a": pa.array(values, pa.list_(pa.list_(pa.int32())))})
        for values in ([[[1, 2], [3]]], [[[1], [2, 3]]], [[[1, 2]], [[3]]], [[[1, 2], [4]]])
    ]
    assert len({tables_out.table_digest(table) for table in tables}) == len(tables)
    cut = pa.concat_tables([tables[2].slice(0, 1), tables[2].slice(1)])
    assert tables_out.table_digest(cut) == tables_out.table_digest(tables[2])


def test_batches_and_files_do_not_change_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = parquet.read_table(exported("plain", tmp_path / "one", shards_per_file=9) / "data")
    monkeypatch.setattr("pipeline.interop.export._BATCH_BYTES", 1)
    many = parquet.read_table(exported("plain", tmp_path / "many") / "data")
    assert one.equals(many)
    assert len(list((tmp_path / "one" / "data").iterdir())) == 1


def test_another_export_or_anything_else_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    exported("plain", tmp_path / "out")
    for settings in ({"k": 2}, {"dtype": "float16"}, {"logprobs": "full"}):
        with pytest.raises(WouldLoseDataError) as caught:
            exported("plain", tmp_path / "out", **settings)
        assert caught.value.kind == "other-export"
        assert next(iter(settings)) in str(caught.value)
    with pytest.raises(WouldLoseDataError, match="other-export"):
        exported("no-hidden", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(WouldLoseDataError, match="not-an-export"):
        exported("plain", tmp_path / "mine")


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("masked", {}, "masked-cache"),
        ("plain", {"temperature": 3.0}, "undeclared-temperature"),
        ("plain", {"k": 6}, "no-top-k"),
        ("imported-renormalised", {"logprobs": "full"}, "imported-cache"),
        ("imported-renormalised", {"tail": True}, "imported-cache"),
    ],
)
def test_what_the_cache_does_not_tell_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, settings: dict[str, Any], kind: str
) -> None:
    config = ExportConfig(cache=VALID / name, to="parquet", out=tmp_path / "out", **settings)
    assert refusal(export, config, quiet=True).kind == kind
    assert not (tmp_path / "out").exists()


def test_the_page_says_what_is_lost_and_whose_it_is(tmp_path: Path) -> None:
    page = (exported("prototype", tmp_path / "out") / "README.md").read_text()
    assert CacheReader.open(VALID / "prototype").manifest.fingerprint in page
    for said in ("path: data/*.parquet", "Every temperature but 1", "shared distributions", "sum to one"):
        assert said in page
    kept = (exported("prototype", tmp_path / "tail", tail=True) / "README.md").read_text()
    assert "Every temperature but 1" not in kept
    assert "log_tail_mass_tX" in kept


def test_small_heads_leave_their_mass_to_the_tail(tmp_path: Path) -> None:
    manifest = make_manifest(encoding=TopK(k=5, levels=4096, odds_step_nats=1 / 64))
    write_cache(tmp_path / "cache", manifest, make_rows(manifest))
    config = ExportConfig(cache=tmp_path / "cache", to="parquet", out=tmp_path / "out", k=2, logprobs="full", tail=True)
    export(config, quiet=True)
    for row in opened(tmp_path / "out", tmp_path / "hub"):
        sums = np.exp(row["target_logprobs"]).sum(1) + np.exp(row["log_tail_mass_t1"])
        np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_a_page_that_somebody_edited_is_left_alone(tmp_path: Path) -> None:
    page = exported("plain", tmp_path / "out") / "README.md"
    ours = page.read_text()
    page.write_text("mine")
    exported("plain", tmp_path / "out")
    assert page.read_text() == "mine"
    page.unlink()
    exported("plain", tmp_path / "out")
    assert page.read_text() == ours


def test_our_page_of_another_time_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.interop.export.export_card", lambda *about: "as it was once")
        page = exported("plain", tmp_path / "out") / "README.md"
        assert page.read_text() == "as it was once"
    exported("plain", tmp_path / "out")
    assert "What is lost" in page.read_text()


def test_a_file_that_was_changed_in_place_is_written_again(tmp_path: Path) -> None:
    out = exported("plain", tmp_path / "out")
    file = sorted((out / "data").iterdir())[1]
    good = file.read_bytes()
    file.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    facts = export(ExportConfig(cache=VALID / "plain", to="parquet", out=out), quiet=True)
    assert facts["files_written_now"] == 1
    assert file.read_bytes() == good
    assert json.loads((out / INDEX_NAME).read_text())["finished"]


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["files"]["data/train-00000-of-00002.parquet"].pop("num_bytes"),
        lambda index: index["files"].update({"data/train-00000-of-00002.parquet": 3}),
        lambda index: index.pop("settings"),
        lambda index: index.update(format_version=2),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, change: Any) -> None:
    path = exported("plain", tmp_path / "out") / INDEX_NAME
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    config = ExportConfig(cache=VALID / "plain", to="parquet", out=tmp_path / "out")
    assert INDEX_NAME in refused("broken-export", export, config, quiet=True)


def test_states_that_are_read_count_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of rows is as large as the states of its blocks, not as the few columns that they become."""
    reader = CacheReader.open(VALID / "hidden")
    blocks = reader.manifest.blocks
    columns_of_two = 2 * (16 + 16) * blocks.block_tokens
    assert columns_of_two < bytes_of_block(reader) + columns_of_two // 2
    monkeypatch.setattr("pipeline.interop.export._BATCH_BYTES", columns_of_two)
    out = exported("hidden", tmp_path / "out", k=1, shards_per_file=9)
    with parquet.ParquetFile(next((out / "data").iterdir())) as file:
        sizes = [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)]
    assert sum(sizes) == blocks.num_blocks > 1
    assert max(sizes) == 1


def test_states_have_a_tail_at_the_one_temperature_that_was_asked_for(tmp_path: Path) -> None:
    out = exported("hidden-int8", tmp_path / "out", tail=True, temperature=2.0)
    names = parquet.read_schema(next((out / "data").iterdir())).names
    assert [name for name in names if name.startswith("log_tail_mass")] == ["log_tail_mass_t2"]
    assert "Every temperature but 2" in (out / "README.md").read_text()
