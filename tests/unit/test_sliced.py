"""A student cut from the teacher's tensors: at full width it is the teacher, narrower it is what was chosen of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import make_tokenizer
from tests.refusals import refusal
from tests.students import NUM_LAYERS, TEACHERS, V, build, save_teacher
from train.sliced import _chosen, _Sizes

NARROW: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 12},
    "llama": {"hidden_size": 12},
    "gpt_neox": {"hidden_size": 12},
    "qwen2": {"hidden_size": 12},
}
HALF = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
"""Every other of 24 channels."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TEACHERS)
def test_cut_to_the_full_width_a_student_is_the_teacher(tmp_path: Path, family: str, tied: bool) -> None:
    model = save_teacher(tmp_path / "t", family, tie_word_embeddings=tied)
    student: Any = build(tmp_path / "t", tmp_path / "c", init="sliced").model.eval()
    ids_BT = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits)
    theirs = model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("family", TEACHERS)
def test_narrower_students_are_of_the_asked_sizes_and_stay_tied(tmp_path: Path, family: str) -> None:
    save_teacher(tmp_path / "t", family, tie_word_embeddings=True)
    built = build(tmp_path / "t", tmp_path / "c", init="sliced", num_layers=2, overrides=NARROW[family])
    model: Any = built.model
    config: Any = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (12, 2, 2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    theirs = model.get_input_embeddings().weight
    assert built.summary["layers"] == [0, NUM_LAYERS - 1]
    assert torch.isfinite(model(input_ids=torch.arange(16)[None]).logits).all()
    assert theirs.shape == (V, 12)


def test_every_matrix_is_cut_alike_and_the_units_sum_is_scaled(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "t", "llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    overrides = {"hidden_size": 12, "intermediate_size": 16}
    student: Any = build(tmp_path / "t", tmp_path / "c", init="sliced", layer_indices=(3,), overrides=overrides).model
    ours, theirs = student.state_dict(), teacher.state_dict()
    old = "model.layers.3."
    # Of 4 heads of 6 channels, two to a key-value head, 2 remain and one key-value head with them.
    queries, keys, units = torch.arange(12), torch.arange(6), torch.arange(0, 64, 4)
    width = torch.tensor(HALF)
    expected = {
        "self_attn.q_proj.weight": theirs[old + "self_attn.q_proj.weight"][queries][:, width],
        "self_attn.k_proj.weight": theirs[old + "self_attn.k_proj.weight"][keys][:, width],
        "self_attn.v_proj.bias": theirs[old + "self_attn.v_proj.bias"][keys],
        "self_attn.o_proj.weight": theirs[old + "self_attn.o_proj.weight"][width][:, queries],
        "self_attn.o_proj.bias": theirs[old + "self_attn.o_proj.bias"][width],
        "mlp.gate_proj.weight": theirs[old + "mlp.gate_proj.weight"][units][:, width],
        "mlp.up_proj.bias": theirs[old + "mlp.up_proj.bias"][units],
        "mlp.down_proj.weight": theirs[old + "mlp.down_proj.weight"][width][:, units] * 2.0,
        "input_layernorm.weight": theirs[old + "input_layernorm.weight"][width],
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[f"model.layers.0.{name}"], tensor, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["model.norm.weight"], theirs["model.norm.weight"][width])
    assert torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"][:, width])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_fused_projections_are_cut_part_by_part(tmp_path: Path, family: str) -> None:
    """What a head attends to does not change when other heads are cut and the residual stream is whole."""
    teacher = save_teacher(tmp_path / "t", family)
    heads = {"num_attention_heads": 2, "hidden_size": 12}
    student: Any = build(tmp_path / "t", tmp_path / "c", init="sliced", overrides=heads).model
    if family == "gpt2":
        ours = student.transformer.h[0].attn.c_attn.weight.detach().reshape(12, 3, 2, 6)
        whole = teacher.transformer.h[0].attn.c_attn.weight.detach().reshape(24, 3, 4, 6)
        expected = whole[::2, :, ::2]
    else:
        ours = student.gpt_neox.layers[0].attention.query_key_value.weight.detach().reshape(2, 3, 6, 12)
        whole = teacher.gpt_neox.layers[0].attention.query_key_value.weight.detach().reshape(4, 3, 6, 24)
        expected = whole[::2, ..., ::2]
    torch.testing.assert_close(ours, expected)


def test_rotated_pairs_stay_pairs_of_the_same_frequency() -> None:
    wide = _Sizes(width=64, heads=4, kv_heads=4, head_dim=16, rotated=8, inner=64, positions=8)
    narrow = _Sizes(width=32, heads=4, kv_heads=4, head_dim=8, rotated=4, inner=32, positions=8)
    channels = _chosen(wide, narrow)["K"][:8].tolist()
    # Of four pairs (0, 4) ... (3, 7) every other, whose frequencies are those of a head of two pairs.
    assert channels == [0, 2, 4, 6, 8, 10, 12, 14]
    wide, narrow = (_Sizes(**{f: getattr(s, f) for f in s.__slots__} | {"rotated": s.head_dim}) for s in (wide, narrow))
    assert _chosen(wide, narrow)["K"][:8].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    third = _Sizes(width=24, heads=4, kv_heads=4, head_dim=6, rotated=6, inner=32, positions=8)
    assert _chosen(wide, third)["K"][:6].tolist() == [0, 2, 5, 8, 10, 13]


def test_query_heads_stay_with_their_key_value_head() -> None:
    wide = _Sizes(width=72, heads=9, kv_heads=3, head_dim=1, rotated=0, inner=8, positions=8)
    narrow = _Sizes(width=32, heads=4, kv_heads=2, head_dim=1, rotated=0, inner=8, positions=8)
    chosen = _chosen(wide, narrow)
    assert chosen["K"].tolist() == [0, 1]
    assert chosen["Q"].tolist() == [0, 1, 3, 4]


def test_heads_that_share_follow_the_width(tmp_path: Path) -> None:
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3}
    save_teacher(tmp_path / "t", "llama", hidden_size=36, intermediate_size=48, **heads)
    built = build(tmp_path / "t", tmp_path / "c", init="sliced", num_layers=1, overrides={"hidden_size": 16})
    # Each key-value head serves three query heads in the teacher, so one would be too few for four.
    expected = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    assert built.summary["derived_sizes"] == expected


def test_padded_vocabularies_and_fewer_positions_are_cut_too(tmp_path: Path) -> None:
    from tests.students import teacher_manifest

    save_teacher(tmp_path / "t", "gpt2", rows=V + 8)
    built = build(
        tmp_path / "t",
        tmp_path / "c",
        init="sliced",
        manifest=teacher_manifest(tmp_path / "t", vocab_size=V),
        overrides={"n_embd": 12, "n_positions": 20},
    )
    model: Any = built.model
    assert model.transformer.wte.weight.shape == (V, 12)
    assert model.transformer.wpe.weight.shape == (20, 12)


@pytest.mark.parametrize(
    ("family", "overrides", "place"),
    [
        ("gpt2", {"n_embd": 48}, "n_embd"),
        ("gpt2", {"n_head": 8}, "n_head"),
        ("gpt2", {"n_inner": 97}, "n_inner"),
        ("llama", {"num_key_value_heads": 1}, "num_key_value_heads"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("llama", {"intermediate_size": 65}, "intermediate_size"),
        ("llama", {"num_hidden_layers": 1}, "num_hidden_layers"),
    ],
)
def test_sizes_that_the_teacher_does_not_have_are_refused(
    tmp_path: Path, family: str, overrides: dict[str, Any], place: str
) -> None:
    save_teacher(tmp_path / "t", family)
    error = refusal(build, tmp_path / "t", tmp_path / "c", init="sliced", overrides=overrides)
    assert (error.kind, error.place) == ("bad-student-config", place)


def test_other_families_are_not_sliced(tmp_path: Path) -> None:
    from tests.models import make_model

    make_model("opt", ffn_dim=48).save_pretrained(tmp_path / "t")
    make_tokenizer(V).save_pretrained(tmp_path / "t")
    error = refusal(build, tmp_path / "t", tmp_path / "c", init="sliced", overrides={})
    assert (error.kind, error.place) == ("cannot-slice", "model_type opt")


@pytest.mark.parametrize("family", TEACHERS)
def test_training_improves_a_narrower_student(tmp_path: Path, family: str) -> None:
    """Towards the teacher that it was cut from, whose text it reads."""
    teacher = save_teacher(tmp_path / "t", family)
    student: Any = build(tmp_path / "t", tmp_path / "c", init="sliced", num_layers=2, overrides=NARROW[family]).model
    torch.manual_seed(0)
    ids_BT = torch.randint(V, (4, 16))
    with torch.no_grad():
        target_BTV = teacher(input_ids=ids_BT).logits.log_softmax(-1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(12):
        logprobs_BTV = student(input_ids=ids_BT).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(logprobs_BTV, target_BTV, log_target=True, reduction="none").sum(-1).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(loss < 1e3 for loss in losses)
    assert losses[-1] < 0.8 * losses[0]
