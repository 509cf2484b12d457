"""Students are built from a cache's small files: copied layers, fresh configs, checkpoints, and every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import train.student
import train.teacher_layers
from cache_spec.errors import BadInputError
from cache_spec.manifest import (
    BlocksInfo,
    ComputeInfo,
    CorpusInfo,
    EncodingInfo,
    HiddenInfo,
    Manifest,
    TeacherInfo,
    TokenizerInfo,
)
from train.student import StudentBuild, build_student, public_name
from train.teacher_layers import spread_layers, weights_digest

V = 120
BLOCK_TOKENS = 16
NUM_LAYERS = 5
LLAMA_SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
TEACHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": NUM_LAYERS, "n_embd": 24, "n_head": 4, "n_positions": 32},
    "llama": {**LLAMA_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "gpt_neox": LLAMA_SIZES,
    "qwen2": {
        **LLAMA_SIZES,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
}


def save_teacher(folder: Path, model_type: str, *, max_shard_size: str = "1GB", rows: int = V, **changes: Any) -> Any:
    torch.manual_seed(7)
    special = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**TEACHERS[model_type], "vocab_size": rows, **special, **changes})
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms and biases too, so that a mix-up of layers shows everywhere
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model.eval()


def make_manifest(teacher_folder: Path, *, vocab_size: int = V, block_tokens: int = BLOCK_TOKENS) -> Manifest:
    config = AutoConfig.from_pretrained(teacher_folder)
    return Manifest(
        teacher=TeacherInfo(
            name=str(teacher_folder),
            revision=None,
            model_type=config.model_type,
            weights_sha256=weights_digest(teacher_folder.glob("*.safetensors")),
            vocab_size=vocab_size,
            padded_vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_parameters=1000,
            max_positions=config.max_position_embeddings,
        ),
        tokenizer=TokenizerInfo(sha256="0" * 64, eos_token_id=0),
        corpus=CorpusInfo(
            sources=(), text_field="text", num_documents=1, num_tokens=block_tokens, tokens_sha256="0" * 64
        ),
        blocks=BlocksInfo(
            num_blocks=2, block_tokens=block_tokens, shard_blocks=2, last_block="keep", limit_tokens=None
        ),
        encoding=EncodingInfo(name="topk", k=4, step_nats=1 / 256),
        temperatures=(1.0, 2.0),
        hidden=HiddenInfo(window=block_tokens),
        compute=ComputeInfo(device_type="cpu", dtype="float32", batch_blocks=2),
        files={},
        provenance={},
    )


def save_tokenizer(folder: Path, words: list[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0], unk_token=words[0]).save_pretrained(folder)


def build(teacher_folder: Path, cache: Path, *, manifest: Manifest | None = None, **changes: Any) -> StudentBuild:
    (cache / "teacher").mkdir(parents=True, exist_ok=True)
    if not (cache / "teacher" / "config.json").exists():
        shutil.copy(teacher_folder / "config.json", cache / "teacher" / "config.json")
    settings: dict[str, Any] = {
        "teacher_folder_in_cache": cache / "teacher",
        "manifest": manifest or make_manifest(teacher_folder),
        "init": "teacher-layers",
        "num_layers": None,
        "layer_indices": None,
        "overrides": {},
        "teacher": None,
        "checkpoint": None,
        "seed": 3,
        "initializer_range": None,
    }
    return build_student(**settings | changes)


def refusal(run: Callable[..., object], *args: Any, **kwargs: Any) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        run(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "teacher", "gpt2")
    return tmp_path / "teacher"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "cache" / "tokenizer", [f"w{i}" for i in range(V)])
    return tmp_path / "cache"


# --- copied layers


@pytest.mark.parametrize(("num_layers", "depth", "expected"), [(6, 12, (0, 2, 4, 7, 9, 11)), (4, 30, (0, 10, 19, 29))])
def test_default_spread_is_the_published_one(num_layers: int, depth: int, expected: tuple[int, ...]) -> None:
    assert spread_layers(num_layers, depth) == expected


def test_spread_is_strictly_ascending_from_first_to_last() -> None:
    for depth in range(1, 40):
        for num_layers in range(1, depth + 1):
            layers = spread_layers(num_layers, depth)
            assert (layers[0], len(set(layers))) == (0, num_layers)
            assert list(layers) == sorted(layers)
            assert num_layers == 1 or layers[-1] == depth - 1


@pytest.mark.parametrize("model_type", TEACHERS)
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_copied_tensors_equal_the_teachers_bit_by_bit(tmp_path: Path, model_type: str, max_shard_size: str) -> None:
    model = save_teacher(tmp_path / "t", model_type, max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "t").glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    built = build(tmp_path / "t", tmp_path / "cache", layer_indices=(1, 3, 4))
    theirs = model.state_dict()
    ours = built.model.state_dict()
    prefix = {"gpt2": "transformer.h.", "gpt_neox": "gpt_neox.layers."}.get(model_type, "model.layers.")
    for name, tensor in ours.items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{(1, 3, 4)[int(number)]}.{rest}"
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == torch.float32
    assert built.summary["layers"] == [1, 3, 4]
    assert built.summary["source_weights"] == "those of the cache's teacher"
    assert built.summary["num_parameters"] == sum(p.numel() for p in built.model.parameters())
    assert built.model.training


@pytest.mark.parametrize("model_type", TEACHERS)
def test_a_student_of_all_layers_has_the_teachers_logits(tmp_path: Path, model_type: str) -> None:
    model = save_teacher(tmp_path / "t", model_type)
    student: Any = build(tmp_path / "t", tmp_path / "cache", num_layers=NUM_LAYERS).model.eval()
    ids_BT = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_no_other_layers_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_size: str) -> None:
    save_teacher(tmp_path / "t", "llama", max_shard_size=max_shard_size)
    read: list[str] = []
    real_open = safetensors.safe_open

    class Spy:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file: Any = real_open(*args, **kwargs)

        def __enter__(self) -> Spy:
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            tensor: torch.Tensor = self.file.get_tensor(name)
            return tensor

    monkeypatch.setattr(train.teacher_layers, "safe_open", Spy)
    build(tmp_path / "t", tmp_path / "cache", num_layers=2)
    layers = {name.split(".")[2] for name in read if ".layers." in name}
    assert layers == {"0", "4"}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(read)


def test_checkpoints_of_the_base_model_are_accepted(tmp_path: Path, teacher: Path) -> None:
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(teacher / "model.safetensors").items()}
    tensors |= {f"h.{n}.attn.bias": torch.ones(1, 1, 32, 32) for n in range(NUM_LAYERS)}
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    student = build(teacher, tmp_path / "cache", layer_indices=(4, 2)).model
    assert torch.equal(student.state_dict()["transformer.h.0.mlp.c_fc.weight"], tensors["h.4.mlp.c_fc.weight"])
    assert torch.equal(student.state_dict()["lm_head.weight"], tensors["wte.weight"])


def test_lists_for_each_layer_are_cut_to_the_chosen_ones(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "qwen2")
    config: Any = build(tmp_path / "t", tmp_path / "cache", layer_indices=(1, 2, 4)).model.config
    assert config.layer_types == ["full_attention", "full_attention", "sliding_attention"]


def test_settings_that_change_no_shape_may_be_changed_beside_copied_layers(tmp_path: Path, teacher: Path) -> None:
    config: Any = build(teacher, tmp_path / "cache", num_layers=2, overrides={"resid_pdrop": 0.25}).model.config
    assert (config.resid_pdrop, config.embd_pdrop) == (0.25, 0.1)


def test_half_precision_teachers_give_float32_students(tmp_path: Path, teacher: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(teacher / "model.safetensors").items()}
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((teacher / "config.json").read_text()) | {"dtype": "bfloat16"}
    (teacher / "config.json").write_text(json.dumps(config))
    student: Any = build(teacher, tmp_path / "cache", num_layers=2).model
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert student.config.dtype == torch.float32
    assert torch.equal(student.transformer.wte.weight, tensors["transformer.wte.weight"].float())


def test_padded_vocabularies_are_kept(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "llama", rows=128)
    manifest = make_manifest(tmp_path / "t", vocab_size=V)
    assert build(tmp_path / "t", tmp_path / "cache", manifest=manifest, num_layers=2).summary["vocabulary_rows"] == 128
    cut = build(tmp_path / "t", tmp_path / "cache", manifest=manifest, init="config", overrides={"vocab_size": V})
    assert cut.summary["vocabulary_rows"] == V


def test_the_row_of_the_padding_token_learns(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "llama")
    for init in ({"num_layers": 2}, {"init": "config"}, {"init": "checkpoint", "checkpoint": str(tmp_path / "t")}):
        model: Any = build(tmp_path / "t", tmp_path / "cache", **init).model
        assert model.config.pad_token_id == 0
        model(input_ids=torch.tensor([[0, 1, 2]])).logits.square().sum().backward()
        assert model.model.embed_tokens.weight[0].abs().sum() > 0
        assert model.model.embed_tokens.weight.grad[0].abs().sum() > 0


def test_another_fine_tune_of_the_teacher_is_said(
    tmp_path: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_manifest(teacher)
    tensors = load_file(teacher / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    built = build(teacher, tmp_path / "cache", manifest=manifest, num_layers=2)
    assert built.summary["source_weights"] == "not those of the cache's teacher"
    assert "weights differ" in caplog.text


def test_a_missing_tensor_is_named(tmp_path: Path, teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    del tensors["transformer.h.4.ln_1.bias"]
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    error = refusal(build, teacher, tmp_path / "cache", num_layers=2)
    assert error.kind == "cannot-copy-layers"
    assert "transformer.h.1.ln_1.bias" in error.place
    build(teacher, tmp_path / "cache", layer_indices=(0, 1))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path, teacher: Path) -> None:
    error = refusal(build, teacher, tmp_path / "cache", num_layers=2, overrides={"n_inner": 48})
    assert error.kind == "cannot-copy-layers"
    assert "mlp" in error.place


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": NUM_LAYERS + 1},
        {"num_layers": None},
        {"layer_indices": (0, NUM_LAYERS)},
        {"layer_indices": (-1,)},
        {"layer_indices": ()},
        {"layer_indices": (1, 1)},
        {"layer_indices": (0, 1), "num_layers": 3},
        {"num_layers": 2, "overrides": {"n_layer": 3}},
        {"init": "checkpoint"},
        {"init": "config", "overrides": {"n_head": 5}},
        {"init": "config", "overrides": {"n_layer": "four"}},
        {"init": "config", "overrides": {"n_embd": -24}},
        {"init": "config", "overrides": {"model_type": "no-such-architecture"}},
        {"init": "config", "overrides": {"model_type": "qwen2", "hidden_size": 30, "num_attention_heads": 4}},
    ],
)
def test_descriptions_that_make_no_model_are_refused(tmp_path: Path, teacher: Path, changes: dict[str, Any]) -> None:
    assert refusal(build, teacher, tmp_path / "cache", **changes).kind == "bad-student-config"


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"n_layer": 6}, "num_hidden_layers"), ({"n_embd": 48}, "hidden_size"), ({"n_head": 2}, "heads")],
)
def test_a_teacher_of_another_shape_is_refused(
    tmp_path: Path, teacher: Path, changes: dict[str, Any], field: str
) -> None:
    save_teacher(tmp_path / "other", "gpt2", **changes)
    error = refusal(build, teacher, tmp_path / "cache", num_layers=2, teacher=str(tmp_path / "other"))
    assert error.kind == "other-teacher"
    assert field in error.place


@pytest.mark.parametrize("name", ["model.Q8_0.gguf", "pytorch_model.bin"])
def test_teachers_that_are_not_safetensors_are_refused_with_a_hint(tmp_path: Path, teacher: Path, name: str) -> None:
    manifest = make_manifest(teacher)
    (teacher / "model.safetensors").rename(teacher / name)
    for source in (teacher, teacher / name):
        error = refusal(build, teacher, tmp_path / "cache", manifest=manifest, num_layers=2, teacher=str(source))
        assert error.kind == "teacher-not-safetensors"
        assert error.hint


def test_unknown_teachers_are_refused(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(train.teacher_layers, "snapshot_download", unreachable)
    (tmp_path / "empty").mkdir()
    for name in ("nobody/nothing", str(tmp_path / "gone"), str(tmp_path / "empty")):
        assert refusal(build, teacher, tmp_path / "cache", num_layers=2, teacher=name).kind == "unknown-teacher"


def test_a_local_teacher_that_moved_is_not_looked_for_on_the_hub(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.teacher_layers, "snapshot_download", lambda *args, **kwargs: pytest.fail("hub was asked"))
    manifest = make_manifest(teacher)
    for name, kind in (("moved-teacher", "unknown-teacher"), ("model.Q8_0.gguf", "teacher-not-safetensors")):
        info = manifest.teacher.model_copy(update={"name": name})
        other = manifest.model_copy(update={"teacher": info})
        error = refusal(build, teacher, tmp_path / "cache", manifest=other, num_layers=2)
        assert error.kind == kind
        assert error.hint


def test_hub_teachers_are_fetched_at_the_caches_revision(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, tuple(allow_patterns)))
        return str(teacher)

    monkeypatch.setattr(train.teacher_layers, "snapshot_download", download)
    manifest = make_manifest(teacher)
    info = manifest.teacher.model_copy(update={"name": "org/teacher", "revision": "abc"})
    built = build(teacher, tmp_path / "c", manifest=manifest.model_copy(update={"teacher": info}), num_layers=2)
    assert asked == [("org/teacher", "abc", ("model*.safetensors", "*.safetensors.index.json", "config.json"))]
    assert built.summary["source"] == "org/teacher"


def test_truncated_weights_and_indexes_that_leave_the_folder_are_refused(tmp_path: Path, teacher: Path) -> None:
    manifest = make_manifest(teacher)
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    def run() -> StudentBuild:
        return build(teacher, tmp_path / "cache", manifest=manifest, num_layers=2)

    assert refusal(run).kind == "unreadable-weights"
    weights.unlink()
    (teacher / "other.safetensors").touch()
    index = teacher / "model.safetensors.index.json"
    for text in (
        '{"weight_map": {"lm_head.weight": "../other.safetensors"}}',
        "{",
        '{"weight_map": {"a": "gone.bin"}}',
    ):
        index.write_text(text)
        assert refusal(run).kind == "unreadable-weights"


# --- fresh students


def test_overrides_change_the_teachers_config(tmp_path: Path, teacher: Path) -> None:
    built = build(
        teacher, tmp_path / "c", init="config", overrides={"n_layer": 2, "hidden_size": 16}, initializer_range=0.5
    )
    config: Any = built.model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.vocab_size) == (2, 16, 4, V)
    model: Any = built.model
    assert 0.45 < float(model.transformer.wte.weight.detach().std()) < 0.55
    assert config.embd_pdrop == 0.1


def test_sizes_follow_a_changed_width_and_are_told(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "llama")
    built = build(
        tmp_path / "t", tmp_path / "c", init="config", overrides={"hidden_size": 12, "num_attention_heads": 2}
    )
    assert built.summary["derived_sizes"] == {"intermediate_size": 32, "num_key_value_heads": 1}
    wide = build(tmp_path / "t", tmp_path / "c", init="config", overrides={"hidden_size": 48})
    assert wide.summary["derived_sizes"] == {"intermediate_size": 128, "head_dim": 12}
    given = build(tmp_path / "t", tmp_path / "c", init="config", overrides={"hidden_size": 48, "intermediate_size": 40})
    assert given.summary["derived_sizes"] == {"head_dim": 12}


def test_fresh_students_of_another_depth_get_their_own_layer_types(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", "qwen2")
    config: Any = build(tmp_path / "t", tmp_path / "c", init="config", num_layers=7).model.config
    assert config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 4


def test_another_architecture_takes_the_teachers_vocabulary(tmp_path: Path, teacher: Path) -> None:
    sizes = {**LLAMA_SIZES, "num_hidden_layers": 2}
    built = build(teacher, tmp_path / "c", init="config", overrides={"model_type": "llama", **sizes})
    config = built.model.config
    assert (built.summary["architecture"], config.vocab_size, config.eos_token_id) == ("LlamaForCausalLM", V, 0)


def test_the_seed_decides_the_weights_and_the_global_random_state_stays(tmp_path: Path, teacher: Path) -> None:
    def run(seed: int) -> torch.Tensor:
        model: Any = build(teacher, tmp_path / "c", init="config", seed=seed).model
        weight: torch.Tensor = model.transformer.h[0].attn.c_attn.weight.detach()
        return weight

    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = run(1), run(1), run(2)
    build(teacher, tmp_path / "c", num_layers=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("init", ["config", "teacher-layers"])
@pytest.mark.parametrize("key", ["n_layers", "vocabsize", "auto_map"])
def test_unknown_config_keys_are_refused(tmp_path: Path, teacher: Path, init: str, key: str) -> None:
    error = refusal(build, teacher, tmp_path / "c", init=init, num_layers=2, overrides={key: 3})
    assert error.kind == "unknown-key"
    assert key in error.place


def test_another_vocabulary_is_refused_with_both_sizes(tmp_path: Path, teacher: Path) -> None:
    error = refusal(build, teacher, tmp_path / "c", init="config", overrides={"vocab_size": V + 1})
    assert (error.kind, error.expected, error.found) == ("student-vocabulary", str(V), str(V + 1))


def test_blocks_longer_than_the_students_positions_are_refused(tmp_path: Path, teacher: Path) -> None:
    error = refusal(build, teacher, tmp_path / "c", init="config", overrides={"n_positions": 8})
    assert (error.kind, error.place) == ("student-positions", "n_positions")


@pytest.mark.parametrize("model_type", ["t5", "bert", "vit"])
def test_students_that_are_no_causal_language_model_are_refused(tmp_path: Path, teacher: Path, model_type: str) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2} if model_type != "t5" else {}
    overrides = {"model_type": model_type, **sizes}
    if model_type == "vit":
        save_vit = {"model_type": "vit"}
        (tmp_path / "c" / "teacher").mkdir(parents=True)
        (tmp_path / "c" / "teacher" / "config.json").write_text(json.dumps(save_vit))
        overrides = {}
    error = refusal(build, teacher, tmp_path / "c", init="config", overrides=overrides)
    assert error.kind == "not-a-causal-lm"


def test_broken_configs_in_the_cache_are_refused(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "c" / "teacher").mkdir(parents=True)
    for text in ("{", '{"model_type": "gpt2", "auto_map": {"AutoConfig": "x.Y"}, "n_layer": "many"}'):
        (tmp_path / "c" / "teacher" / "config.json").write_text(text)
        assert refusal(build, teacher, tmp_path / "c", num_layers=2).kind == "unreadable-config"


# --- existing models


def test_a_checkpoint_of_the_same_vocabulary_is_taken_as_it_is(tmp_path: Path, teacher: Path, cache: Path) -> None:
    model = save_teacher(tmp_path / "student", "llama")
    save_tokenizer(tmp_path / "student", [f"w{i}" for i in range(V)])
    built = build(teacher, cache, init="checkpoint", checkpoint=str(tmp_path / "student"))
    assert all(torch.equal(t, built.model.state_dict()[name]) for name, t in model.state_dict().items())
    assert built.summary["source"] == "student"
    assert built.model.config._name_or_path == ""


def test_a_checkpoint_whose_tokens_mean_something_else_is_refused(tmp_path: Path, teacher: Path, cache: Path) -> None:
    save_teacher(tmp_path / "student", "gpt2")
    save_tokenizer(tmp_path / "student", [f"w{i}" for i in reversed(range(V))])
    error = refusal(build, teacher, cache, init="checkpoint", checkpoint=str(tmp_path / "student"))
    assert error.kind == "student-vocabulary"


def test_checkpoints_that_do_not_load_whole_are_refused(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(train.student, "snapshot_download", unreachable)

    def kind(folder: Path) -> str:
        return refusal(build, teacher, tmp_path / "c", init="checkpoint", checkpoint=str(folder)).kind

    assert kind(tmp_path / "gone") == "unknown-checkpoint"
    student = tmp_path / "student"
    save_teacher(student, "gpt2")
    tensors = load_file(student / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    assert kind(student) == "unreadable-weights"
    (student / "model.safetensors").unlink()
    torch.save(tensors, student / "pytorch_model.bin")
    assert kind(student) == "unknown-checkpoint"


def test_public_names_hold_no_folders(tmp_path: Path) -> None:
    assert public_name(str(tmp_path / "my-teacher")) == "my-teacher"
    assert public_name("../models/t") == "t"
    assert public_name("org/name") == "org/name"
    assert public_name("gpt2") == "gpt2"
