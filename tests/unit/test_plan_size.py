"""Bytes of a planned cache have the real arrays' shapes, and devices are a table that users can change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_spec.errors import BadInputError
from cache_spec.layout import array_specs
from cache_spec.receipts import read_manifest, read_receipt
from cache_spec.shardfile import index_bytes
from pipeline.plan.cache_size import TeacherSizes, cache_size, learnt_from, measured_size
from pipeline.plan.config import PlanConfig
from pipeline.plan.devices import DEVICES, device_named, devices_of
from pipeline.plan.rates import assumptions, counted_by, formula_rates
from tests.models import ENCODINGS
from tests.synthetic import make_manifest, make_rows, write_cache

TEACHER = TeacherSizes(model_type="gpt2", vocab_size=50, width=6, layers=2, parameters=1000)


def config(**changes: Any) -> PlanConfig:
    settings = {"teacher": "t", "student": "1", "tokens": 56, "block_tokens": 8, "hidden_window": 8}
    return PlanConfig.model_validate(settings | changes)


SMALL: dict[str, Any] = {"hidden_window": 4, "hidden_dtype": "float16", "shard_blocks": 3, "capture_batch_blocks": 2}


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_every_array_has_its_real_shape(encoding: str) -> None:
    planned = cache_size(config(encoding=encoding, **ENCODINGS[encoding], **SMALL), TEACHER, 56)
    manifest = make_manifest(encoding=planned.encoding)
    specs = array_specs(manifest)
    assert planned.raw_bytes_per_token == {
        name: math.prod(spec.row_shape) * spec.dtype.itemsize / 8 for name, spec in specs.items()
    }
    assert set(planned.table_bytes) == {table.name for table in planned.encoding.tables(manifest.geometry)}
    assert planned.num_shards == 3
    assert planned.bytes(56) == round(56 * sum(planned.bytes_per_token.values())) + sum(planned.table_bytes.values())


def test_measured_blocks_give_the_bytes_of_the_cache_they_are_from(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_cache(tmp_path, manifest, make_rows(manifest))
    manifest = read_manifest(tmp_path)
    shards = range(manifest.blocks.num_shards)
    files = dict.fromkeys(array_specs(manifest), 0)
    for shard in shards:
        receipt = read_receipt(tmp_path, manifest, shard)
        assert receipt is not None
        for name in files:
            files[name] += receipt.files[name].num_bytes
    block_bytes = {
        name: (files[name] - len(shards) * index_bytes(spec)) / manifest.blocks.num_blocks
        for name, spec in array_specs(manifest).items()
    }
    size = measured_size(config(encoding="topk", k=5, **SMALL), TEACHER, 56, block_bytes, {})
    assert {name: round(56 * stored) for name, stored in size.bytes_per_token.items()} == files


def test_larger_vocabularies_and_heads_take_more() -> None:
    def per_token(vocab_size: int = 50_000, **changes: Any) -> float:
        teacher = TEACHER._replace(vocab_size=vocab_size)
        return sum(cache_size(config(**{"hidden_window": 0} | changes), teacher, 5600).bytes_per_token.values())

    assert per_token() < per_token(vocab_size=100_000) < per_token(vocab_size=100_000, k=32)
    assert per_token(encoding="topk") > per_token()
    assert per_token(encoding="hidden") < per_token(encoding="sampled")


def test_the_default_encoding_takes_what_results_say_it_takes() -> None:
    """29.4 bytes of targets and 2.05 of text a token, SmolLM2-135M in blocks of 512."""
    teacher = TEACHER._replace(vocab_size=49_152, width=576)
    planned = cache_size(config(tokens=65_536, block_tokens=512, hidden_window=0, shard_blocks=16), teacher, 65_536)
    assert sum(planned.bytes_per_token.values()) == pytest.approx(29.4 + 2.09, rel=0.02)
    assert planned.table_bytes["prototypes"] == pytest.approx(31.1e6, rel=0.02)


def test_what_does_not_fit_the_teacher_is_refused() -> None:
    with pytest.raises(BadInputError, match="bad-encoding: encoding topk"):
        cache_size(config(encoding="topk", k=51), TEACHER, 56)


def test_only_prototypes_are_learnt_from_text() -> None:
    for name, tokens in (("prototype", 56), ("topk", 0)):
        planned = cache_size(config(encoding=name, k=4, **SMALL), TEACHER, 56)
        assert learnt_from(planned.encoding, 56) == tokens


class Cost:
    """A model of round figures."""

    parameters, vocab_size, width, layers, kept_bytes, forward_flops = 10**9, 50_000, 1024, 10, 1e6, 2e9
    is_counted = True


class Train:
    """Settings of a student that the formula looks at."""

    precision, batch_blocks, accumulate, epochs, activation_checkpointing = "auto", 8, 1, 1, False


def formula(device: str, share: int = 1, train: Any = None, **changes: Any) -> Any:
    settings = config(**changes)
    (chosen,) = devices_of(settings.model_copy(update={"device": (device,)}), device)
    sizes: dict[str, Any] = {"learnt_tokens": 0, "bytes_per_token": 50.0, "table_bytes": 0, "share": share}
    return formula_rates(settings, chosen, Cost(), [("a", Cost(), train or Train())], **sizes)


def test_the_formula_is_flops_over_what_a_device_reaches() -> None:
    rates = formula("a100", block_tokens=1024, tokens=10**6)
    forward_s = 2e9 / (312e12 * 0.5)
    encode_s = 7 * 4 * 50_000 / 2039e9
    weights_s = 2e9 / 4096 / 2039e9
    assert rates.capture_token_s == pytest.approx(forward_s + encode_s + weights_s)
    (student,) = rates.students
    assert student.token_s == pytest.approx(student.cross_entropy_token_s)
    assert student.token_s > 3 * 2e9 / (312e12 * 0.4)
    assert student.online_token_s == pytest.approx(student.token_s + forward_s + weights_s)
    assert student.online_fixed_s == pytest.approx(student.fixed_s + 2e9 / 500e6)
    assert student.peak_bytes > 16e9


def test_faster_devices_and_more_of_them_take_less_and_a_slow_disk_is_a_limit() -> None:
    few, many = formula("h100"), formula("h100", share=4)
    assert many.capture_token_s == pytest.approx(few.capture_token_s / 4)
    assert formula("a100").capture_token_s > few.capture_token_s
    assert formula("h100", disk_mb_per_s=0.001).capture_token_s == pytest.approx(50 / 1e3)


def test_half_precision_is_the_default_on_cuda_alone() -> None:
    assert formula("a100").capture_token_s < formula("a100", dtype="float32").capture_token_s
    assert formula("t4").capture_token_s == formula("t4", dtype="float32").capture_token_s
    assert formula("m2-max").capture_peak_bytes == formula("m2-max", dtype="float32").capture_peak_bytes
    assert formula("m2-max").capture_peak_bytes > formula("m2-max", dtype="float16").capture_peak_bytes


def test_checkpointed_activations_take_a_fourth_pass_and_keep_each_layers_input() -> None:
    train = Train()
    train.activation_checkpointing = True
    (one,), (plain,) = formula("a100", train=train).students, formula("a100").students
    assert one.token_s - plain.token_s == pytest.approx(2e9 / (312e12 * 0.4))
    pass_tokens, kept = 8 * 8, 4 * 1024 * 10 + 1e6 / 10
    assert plain.peak_bytes - one.peak_bytes == pytest.approx(pass_tokens * (1e6 - kept) / 2, abs=2)


@pytest.mark.parametrize(
    ("card", "memory_gb", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0, "h100"),
        ("NVIDIA H200", 150.0, "h200"),
        ("NVIDIA A100-SXM4-80GB", 85.0, "a100"),
        ("NVIDIA A100 80GB PCIe", 85.0, "a100"),
        ("NVIDIA A100-SXM4-40GB", 42.5, "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", 42.5, "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", 25.3, "rtx4090"),
        ("NVIDIA L4", 23.7, "l4"),
        ("Tesla T4", 15.8, "t4"),
    ],
)
def test_a_drivers_name_is_that_of_the_table(card: str, memory_gb: float, name: str) -> None:
    assert device_named(card, memory_gb) == name


@pytest.mark.parametrize(
    "card",
    ["NVIDIA L40", "NVIDIA L40S", "NVIDIA T400", "NVIDIA T400 4GB", "NVIDIA GH200 480GB", "NVIDIA RTX A1000"]
    + ["NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"],
)
def test_a_card_that_is_not_in_the_table_is_no_other_one(card: str) -> None:
    with pytest.raises(BadInputError, match=r"^unknown-device: "):
        devices_of(config(), device_named(card, 80.0))


def test_memory_is_this_machines_and_every_figure_says_where_it_is_from() -> None:
    (here,) = devices_of(config(), "a100", 64.0)
    assert (here.memory_gb, here.source_of("memory_gb")) == (64.0, "this machine's driver")
    (named,) = devices_of(config(device=["a100"]), "a100", 64.0)
    assert named.memory_gb == 80.0
    (given,) = devices_of(config(device_memory_gb=7, training_utilisation=0.3), "a100", 64.0)
    assert (given.memory_gb, given.source_of("memory_gb")) == (7, "given")
    told = {one.name: one.source for one in assumptions(config(training_utilisation=0.3), given, 2, "counted", ["a"])}
    assert told["utilisation, training"] == "given"
    assert told["utilisation, capture"] == "assumed"
    assert told["memory bandwidth"] == "maker's data sheet"
    assert told["forward pass"] == "counted"
    assert told["training step with checkpointed activations"].endswith(": a")
    other = Cost()
    other.is_counted = False
    assert counted_by([("teacher", Cost()), ("b", Cost())]) == "counted by torch"
    assert counted_by([("teacher", Cost()), ("b", other)]) == "counted by torch; by the shapes of weights: b"
    assert counted_by([("b", other)]) == "by the shapes of weights: b"


def test_devices_come_from_the_table_a_file_or_flags(tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text("mine: {tflops: 10, gb_per_s: 100}\nh100: {tflops: 1, half_tflops: 2, gb_per_s: 3, memory_gb: 4}\n")
    mine, ours = devices_of(config(device=["mine", "h100"], devices=path), "cpu-core")
    assert (mine.half_tflops, mine.memory_gb, mine.source) == (10, None, str(path))
    assert (ours.half_tflops, ours.memory_gb) == (2, 4)
    (here,) = devices_of(config(), "cpu-core")
    assert here == DEVICES["cpu-core"]
    (new,) = devices_of(config(device=["new"], device_tflops=5, device_gb_per_s=6), "cpu-core")
    assert (new.tflops, new.half_tflops, new.gb_per_s) == (5, 5, 6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "bad-devices"),
        ("3", "bad-devices: .*expected a mapping"),
        ("a: 3", "bad-devices: .*: a"),
        ("a: {tflops: 1}", "bad-devices: .*: a, expected gb_per_s"),
        ("a: {tflops: -1, gb_per_s: 1}", "bad-devices: .*tflops, expected a number above 0"),
        ("a: {tflops: 1, gb_per_s: 1, speed: 2}", "unknown-key: .*speed"),
        ("a: {tflops: 1, gb_per_s: 1, training_utilisation: 2}", "bad-devices: .*at most 1"),
    ],
)
def test_a_wrong_file_of_devices_is_refused_by_its_place(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text(content)
    with pytest.raises(BadInputError, match=words):
        devices_of(config(device=["a"], devices=path), "cpu-core")


def test_a_missing_file_and_an_unknown_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="bad-devices: "):
        devices_of(config(devices=tmp_path / "none"), "cpu-core")
    with pytest.raises(BadInputError, match="unknown-device: abacus, expected one of h200, "):
        devices_of(config(device=["abacus"]), "cpu-core")


def test_rates_are_finite_for_every_device_and_encoding() -> None:
    for device in DEVICES:
        for encoding in ENCODINGS:
            rates = formula(device, encoding=encoding)
            assert np.isfinite([rates.capture_token_s, rates.students[0].token_s]).all()
