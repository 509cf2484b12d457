"""The parts of the fidelity benchmark against naive versions, and the whole of it, tiny, on the embedded teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import __main__ as program
from benchmarks.fidelity import students
from benchmarks.fidelity.captures import PARTS, Capture, cut, disk_bytes
from benchmarks.fidelity.configurations import ALL, QUICK, Configuration, chosen
from benchmarks.fidelity.measures import (
    Angles,
    Distance,
    Gradient,
    Head,
    Named,
    Positions,
    add_distances,
    degrees_between,
    dense_rows,
    gradient,
)
from benchmarks.fidelity.report import plot, student_table, target_table
from benchmarks.fidelity.rivals import RIVALS, DistillKit
from benchmarks.fidelity.targets import batches
from cache_spec.encodings.hidden import Hidden
from cache_spec.errors import BadInputError
from cache_spec.reader import CacheReader
from cache_spec.targets import Tail
from cache_spec.targets import dense as dense_meaning
from cache_spec.validate import verify_cache
from pipeline.demo import TEACHER
from pipeline.demo_text import python_docs
from pipeline.encoding_config import EncodingConfig, encoding_record
from tests.synthetic import ENCODINGS, make_manifest, make_rows, write_cache
from train.distil_batch import to_tensors
from train.loss_targets import NO_LABEL, BucketTargets, DenseTargets, LinearTargets, points
from train.teacher_targets import TeacherTargets

VOCABULARY, WIDTH = 50, 6


def make_cache(folder: Path, name: str, **sizes: Any) -> CacheReader:
    encoding = Hidden(head_dtype="float16") if name == "hidden" else ENCODINGS[name]
    manifest = make_manifest(encoding=encoding, hidden_size=WIDTH, vocab_size=VOCABULARY, **sizes)
    write_cache(folder, manifest, make_rows(manifest))
    return CacheReader.open(folder)


def make_positions(num_rows: int = 12) -> tuple[Positions, Head]:
    generator = torch.Generator().manual_seed(0)
    teacher_ND, student_ND = (torch.randn(num_rows, WIDTH, generator=generator) for _ in range(2))
    labels_N = torch.randint(VOCABULARY, (num_rows,), generator=generator)
    labels_N[-1] = NO_LABEL
    head = Head(torch.randn(VOCABULARY, WIDTH, generator=generator), torch.randn(VOCABULARY, generator=generator))
    return Positions(teacher_ND, student_ND, labels_N), head


def distributions(positions: Positions, head: Head, temperature: float) -> Tensor:
    assert head.bias_V is not None
    return ((positions.teacher_ND @ head.weight_VD.T + head.bias_V) / temperature).softmax(dim=1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("topk", "renormalise"),
        ("topk", "uniform"),
        ("topk", "gold"),
        ("prototype", "prototype"),
        ("sampled", None),
        ("sparsified", None),
        ("hidden", None),
    ],
)
def test_dense_rows_are_the_meaning_of_the_format(
    tmp_path: Path, name: str, tail: Tail | None, temperature: float
) -> None:
    reader = make_cache(tmp_path, name)
    batch = reader.batch([0, 3], temperature)
    labels_BT = batch.input_ids_BT.astype(np.int64)
    made = TeacherTargets.of_cache(reader, temperature=temperature, tail=tail)
    targets = made(to_tensors(batch).targets, torch.from_numpy(labels_BT.reshape(-1)))
    rows_CV = dense_rows(targets, torch.arange(labels_BT.size), VOCABULARY, temperature)
    meant_BTV = dense_meaning(
        batch.targets,
        temperature=temperature,
        vocab_size=VOCABULARY,
        tail=tail or "renormalise",
        prototypes_CV=reader.prototypes(temperature) if name == "prototype" else None,
        head=reader.output_head() if name == "hidden" else None,
        gold_BT=labels_BT,
    )
    assert rows_CV is not None
    np.testing.assert_allclose(rows_CV.numpy(), meant_BTV.reshape(-1, VOCABULARY), atol=2e-6)


def test_distances_are_those_of_the_dense_rows() -> None:
    positions, head = make_positions()
    p_NV = distributions(positions, head, 2.0)
    target_NV = (p_NV + 0.3 / VOCABULARY) / 1.3
    ids_NJ = target_NV.topk(4, dim=1).indices
    targets = {
        "all": points(torch.arange(VOCABULARY).expand(len(p_NV), -1), target_NV),
        "few": points(ids_NJ, p_NV.gather(1, ids_NJ)),
    }
    named = {"few": Named(ids_NJ, torch.tensor([True, True, False, True]).expand_as(ids_NJ))}
    distances = {name: Distance() for name in targets}
    add_distances(distances, targets, named, positions, head, 2.0)

    p_NV, target_NV = p_NV[:-1], target_NV[:-1]  # the last position has no next token
    every, few = distances["all"].figures(), distances["few"].figures()
    assert every["total_variation"] == pytest.approx(float((p_NV - target_NV).abs().sum(1).mean()) / 2, rel=1e-5)
    assert every["kl_nats"] == pytest.approx(float((p_NV * (p_NV / target_NV).log()).sum(1).mean()), rel=1e-4)
    assert every["mse"] == pytest.approx(float((p_NV - target_NV).square().sum(1).mean()), rel=1e-4)
    assert every["uncovered_mass"] == 0
    lost = 1 - p_NV.gather(1, ids_NJ[:-1]).sum(1)
    assert few["kl_nats"] is None
    assert few["uncovered_mass"] == pytest.approx(float(lost.mean()), rel=1e-4)
    assert few["mass_coverage"] == pytest.approx(float(p_NV.gather(1, ids_NJ[:-1, [0, 1, 3]]).sum(1).mean()), rel=1e-4)
    assert few["tokens_named"] == 3


def test_bucket_targets_have_no_distance() -> None:
    positions, head = make_positions()
    targets = RIVALS[1].targets(distributions(positions, head, 1.0).log(), 1.0)
    distance = Distance()
    add_distances({"bucket": distance}, {"bucket": targets}, {}, positions, head, 1.0)
    assert distance.figures()["total_variation"] is None


def test_gradients_are_the_errors_of_the_targets() -> None:
    positions, head = make_positions()
    student = Head(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1)), None)
    p_NV, q_NV = distributions(positions, head, 2.0), (positions.student_ND @ student.weight_VD.T / 2.0).softmax(dim=1)
    exact = DenseTargets(hidden_ND=positions.teacher_ND, weight_VD=head.weight_VD, bias_V=head.bias_V)
    made = gradient(exact, positions, student, 2.0)
    error_NV = 2.0 * (q_NV - p_NV)[:-1] / (len(q_NV) - 1)
    torch.testing.assert_close(made.on_logits_V, error_NV.sum(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(made.on_head_VD, error_NV.T @ positions.student_ND[:-1], atol=1e-6, rtol=1e-4)


def test_small_angles_are_not_lost_to_rounding() -> None:
    left = torch.tensor([1.0, 0.0, 0.0])
    assert degrees_between(left, torch.tensor([5.0, 5e-6, 0.0])) == pytest.approx(np.degrees(1e-6), rel=1e-6)
    assert degrees_between(left, torch.tensor([0.0, 2.0, 0.0])) == pytest.approx(90)
    assert degrees_between(left, -left) == pytest.approx(180)
    angles = Angles()
    angles.add(Gradient(2 * left, left), Gradient(left, left))
    assert angles.figures()["logits"] == {
        "degrees": 0,
        "degrees_std": 0,
        "norm_ratio": 2,
        "norm_ratio_std": 0,
        "batches": 1,
    }


def test_rivals_take_the_bytes_that_are_published_for_them() -> None:
    assert {rival.name: rival.bytes_per_token(50_257) for rival in RIVALS} == {
        "DistillKit 128, zero": 312,
        "DistillKit 128, uniform": 312,
        "DistillKit 50, zero": 114,
    }


def test_a_rival_gives_back_what_its_curve_can_follow() -> None:
    rank_K = torch.arange(20.0)
    values_CV = (-0.5 - 0.3 * rank_K - 0.4 * rank_K.sqrt()).expand(3, -1)
    rival = DistillKit(name="", k=20, exact=0, powers=(0, 1, 0.5), missing="zero")
    ids_CK, kept_CK = rival.kept(values_CV)
    assert ids_CK.tolist() == [list(range(20))] * 3
    torch.testing.assert_close(kept_CK, values_CV, atol=1e-5, rtol=1e-5)


def test_a_rival_without_the_missing_mass_sums_to_one_and_with_it_keeps_a_rest() -> None:
    log_p_CV = torch.randn(4, 400, generator=torch.Generator().manual_seed(0)).log_softmax(dim=1)
    for temperature in (1.0, 2.0):
        zero = RIVALS[0].targets(log_p_CV, temperature)
        assert isinstance(zero, LinearTargets)
        torch.testing.assert_close(zero.weights_NJ.sum(1), torch.ones(4))
        uniform = RIVALS[1].targets(log_p_CV, temperature)
        assert isinstance(uniform, BucketTargets)
        total_N = uniform.log_probs_NK.exp().sum(1) + uniform.log_rest_N.exp()
        torch.testing.assert_close(total_N, torch.ones(4))
        if temperature == 1.0:
            rest_N = 1 - log_p_CV.topk(128).values.exp().sum(1)
            torch.testing.assert_close(uniform.log_rest_N.exp(), rest_N, atol=0.02, rtol=0)


def test_batches_hold_each_block_once_and_are_whole(tmp_path: Path) -> None:
    reader = make_cache(tmp_path, "hidden", num_blocks=23)
    plan = batches(reader, (16, 48), most=None, seed=0)
    assert plan.positions == (16, 48)
    assert [len(larger) for larger in plan.larger] == [3, 3, 3]
    blocks = [int(block) for larger in plan.larger for smaller in larger for block in smaller]
    assert len(blocks) == len(set(blocks)) == 18
    assert len(batches(reader, (16, 48), most=50, seed=0).larger) == 1
    assert batches(reader, (16, 10_000), most=None, seed=0).positions == (16, 176)


def test_a_cut_capture_is_a_sound_cache_of_spread_blocks(tmp_path: Path) -> None:
    reader = make_cache(tmp_path / "whole", "hidden", num_blocks=9)
    made = cut(reader, 3, tmp_path / "cut")
    assert not verify_cache(made.path)
    np.testing.assert_array_equal(made.read("last_hidden", range(3)), reader.read("last_hidden", [0, 3, 6]))
    again = cut(reader, 3, tmp_path / "cut")
    assert again.manifest == made.manifest


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    reader = make_cache(tmp_path, "prototype")
    figures = disk_bytes(reader)
    names = ["head_ranks", "head_gaps", "tail_log_odds", "tail_prototype", "residual_ranks", "residual_log_mass"]
    assert sorted(figures["bytes_per_token_by_array"]) == sorted(names)
    files = [path for name in names for path in (tmp_path / name).iterdir() if path.name != "zarr.json"]
    num_bytes = sum(path.stat().st_size for path in files)
    assert figures["bytes_per_token"] * reader.manifest.corpus.num_tokens == pytest.approx(num_bytes)
    assert figures["table_bytes"] > 0


def test_configurations_have_names_of_their_own() -> None:
    assert len({one.name for one in ALL}) == len(ALL)
    assert [one.name for one in chosen(QUICK)] == list(QUICK)
    assert len({one.cache_name for one in chosen(["topk 16, *"])}) == 1
    with pytest.raises(BadInputError, match="unknown-configuration"):
        chosen(["no such"])


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_flags_are_those_of_the_command(one: Configuration) -> None:
    names, values = one.flags[::2], one.flags[1::2]
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(names, values, strict=True)}
    config = EncodingConfig.model_validate(given)
    assert encoding_record(config, config.encoding).name == one.encoding


def student_result(name: str, temperature: float | None, seed: int, loss: float, kl: float) -> dict[str, Any]:
    figures = {"loss_nats": loss, "kl_to_teacher": kl, "agreement": 0.2, "overlap": 0.3, "ece": 0.01}
    at = "1" if temperature is None else f"{temperature:g}"
    return {"name": name, "temperature": temperature, "seed": seed, "held_out": {at: figures}}


def test_the_gap_is_that_of_the_same_seed() -> None:
    results = []
    for seed in range(2):
        results += [
            student_result(students.CROSS_ENTROPY, None, seed, 6 + seed, 3 + seed),
            student_result(students.FULL, 1.0, seed, 5 + seed, 2 + seed),
            student_result("half", 1.0, seed, 5.5 + seed, 2.25 + seed),
        ]
    rows = {row["name"]: row for row in students.summary(results, [1.0])}
    assert rows["half"]["percent_of_gap_in_loss_nats"] == pytest.approx({"mean": 50, "std": 0})
    assert rows["half"]["percent_of_gap_in_kl_to_teacher"] == pytest.approx({"mean": 75, "std": 0})
    assert rows["half"]["kl_above_full_percent"]["mean"] == pytest.approx(100 * (0.25 / 2 + 0.25 / 3) / 2)
    assert rows[students.FULL]["percent_of_gap_in_loss_nats"]["mean"] == 100
    assert rows[students.CROSS_ENTROPY]["percent_of_gap_in_loss_nats"]["mean"] == 0
    assert rows["half"]["loss_nats"]["mean"] == 6


def test_no_gap_is_recovered_where_full_distillation_gains_nothing() -> None:
    results = [
        student_result(students.CROSS_ENTROPY, None, 0, 6, 3),
        student_result(students.FULL, 1.0, 0, 6.5, 2),
    ]
    row = students.summary(results, [1.0])[1]
    assert row["percent_of_gap_in_loss_nats"] is None
    assert row["percent_of_gap_in_kl_to_teacher"]["mean"] == 100


def test_a_run_that_is_done_or_claimed_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Capture(parts={}, work=tmp_path)
    training = students.Training(teacher="-", num_layers=1, steps=1, step_tokens=1, precision="fp32")
    done: list[students.Run] = []

    def result(capture: Capture, run: students.Run, *_: object) -> dict[str, Any]:
        done.append(run)
        return {"name": run.name, "temperature": run.temperature}

    monkeypatch.setattr(students, "_result", result)
    monkeypatch.setattr(students, "_key", lambda capture, run, training: f"full-{run.temperature or 0:g}")
    wanted = students.runs([], [1.0, 2.0], [0])
    (tmp_path / "students").mkdir()
    with filelock.FileLock(tmp_path / "students" / "full-2.lock"):
        assert len(students.campaign(capture, wanted, training, [1.0])) == 2
    assert [run.temperature for run in done] == [None, 1.0]
    assert len(students.campaign(capture, wanted, training, [1.0])) == 3
    assert [run.temperature for run in done] == [None, 1.0, 2.0]


def target_rows() -> list[dict[str, Any]]:
    angle = {"degrees": 2.0, "degrees_std": 0.1, "norm_ratio": 1.0, "norm_ratio_std": 0.0, "batches": 2}
    where = {"logits": angle, "head": angle}
    figures = {"total_variation": 0.1, "mse": 0.01, "uncovered_mass": 0.0, "mass_coverage": 0.8, "tokens_named": 16}
    known = {**figures, "kl_nats": 0.2, "kl_of_covered_nats": 0.2, "gradient": {"smaller": where, "larger": where}}
    infinite = known | {"kl_nats": None, "kl_of_covered_nats": None}
    nearly = known | {"kl_nats": None}
    return [
        {"name": "a", "encoding": {"name": "topk"}, "bytes_per_token": 20.0, "temperatures": {"1": known, "2": nearly}},
        {"name": "b", "rival": True, "bytes_per_token": 114.0, "temperatures": {"1": infinite}},
    ]


def test_tables_show_what_is_infinite_and_what_is_missing() -> None:
    header, first, second = target_table({"rows": target_rows()})
    assert header.count("T=") == 2
    assert "(0.2000)" in first
    assert second.split()[:4] == ["b", "114.0", "0.1000", "-"]
    assert len(student_table(students.summary([student_result("x", 1.0, 0, 5, 2)], [1.0]))) == 2


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = students.summary(
        [
            student_result(students.CROSS_ENTROPY, None, 0, 6, 3),
            student_result(students.FULL, 1.0, 0, 5, 2),
        ],
        [1.0],
    )
    made = plot({"targets": {"rows": target_rows()}, "students": {"summary": rows}}, tmp_path / "plots")
    assert [path.name for path in made] == ["divergence.svg", "variation.svg", "angle.svg", "recovered.svg"]
    assert all(path.stat().st_size for path in made)


@pytest.mark.slow
def test_the_whole_benchmark_runs_on_a_capture_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": document[:2_000]}) + "\n" for _, document in python_docs("train")]
    text.write_text("".join(lines[:60]), encoding="utf-8")
    sizes = [option for part in PARTS for option in (f"--{part}-tokens", "1024")]
    capture = ["capture", "--teacher", str(TEACHER), "--text", str(text), "--out", str(tmp_path / "capture"), *sizes]
    assert program.main([*capture, "--", "--block-tokens", "64", "--shard-blocks", "8"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert sum(account["documents"].values()) == 60

    command = ["--capture", str(tmp_path / "capture"), "--teacher", str(TEACHER), "--work", str(tmp_path / "work")]
    command += ["--only", "topk 16, renormalise", "prototype 16, C = 64", "--batch-positions", "128", "512"]
    command += ["--students", "--student-targets", "topk 16, bucket", "--seeds", "1", "--steps", "2"]
    assert program.main([*command, "--step-tokens", "256", "--layers", "2", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    rows = {row["name"]: row for row in report["targets"]["rows"]}
    assert set(rows) == {"topk 16, renormalise", "prototype 16, C = 64", *(rival.name for rival in RIVALS)}
    assert report["targets"]["batches"] == [8, 2]
    for row in rows.values():
        assert set(row["temperatures"]) == {"1", "2"}
        assert 0 < row["temperatures"]["1"]["gradient"]["larger"]["head"]["degrees"] < 90
    assert report["students"]["runs_done"] == report["students"]["runs_wanted"] == 5
    names = {(row["name"], row["temperature"]) for row in report["students"]["summary"]}
    kinds = (students.CROSS_ENTROPY, students.FULL, "topk 16, bucket")
    assert names == {(name, temperature) for name in kinds for temperature in (1.0, 2.0)}
    assert "B/token" in printed.err
