"""Teachers: found, described and loaded as they are, or refused in one line of a stable kind."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.teacher import load_teacher, pick_device, pick_dtype
from pipeline.teacher_description import save_teacher_description
from pipeline.teacher_files import (
    TeacherFiles,
    check_block_tokens,
    describe_teacher,
    load_tokenizer,
    resolve_teacher,
    tokenizer_sha256,
)
from tests.models import FAMILIES, ROWS, make_folder, make_model, make_tokenizer
from tests.refusals import refusal


def refused(kind: str, call: Any, *args: Any, **kwargs: Any) -> str:
    """The message of a call's error, which is of this kind and hides what another library raised."""
    error = refusal(call, *args, **kwargs)
    assert error.kind == kind
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    return str(error)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tiny")


@pytest.mark.parametrize("family", FAMILIES)
def test_description_without_weights_equals_the_loaded_teachers(tmp_path: Path, family: str) -> None:
    files = resolve_teacher(str(make_folder(tmp_path / "tiny", family)))
    info, tokenizer_info = describe_teacher(files)
    teacher = load_teacher(files, device="cpu")
    assert (teacher.info, teacher.tokenizer_info) == (info, tokenizer_info)
    assert (info.name, info.revision, info.model_type) == ("tiny", None, family)
    assert (info.vocab_size, info.padded_vocab_size) == (100, ROWS)
    assert (info.hidden_size, info.num_layers, info.max_positions) == (32, 2, 64)
    assert info.num_parameters == sum(p.numel() for p in teacher.model.parameters())
    assert tokenizer_info.eos_token_id == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_times_head_equals_the_models_own_logits(tmp_path: Path, family: str) -> None:
    teacher = load_teacher(resolve_teacher(str(make_folder(tmp_path / "tiny", family))), device="cpu")
    ids_BT = np.arange(60, dtype=np.uint16).reshape(2, 30)
    hidden_BTD = teacher.hidden(ids_BT)
    assert hidden_BTD.shape == (2, 30, 32)
    assert not hidden_BTD.requires_grad
    assert not teacher.model.training
    ours = teacher.head.logits(hidden_BTD.flatten(0, 1), torch.empty(60, 100))
    theirs = teacher.model(torch.from_numpy(ids_BT.astype(np.int64))).logits[..., :100].flatten(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_teacher_gives_float32_logits_off_the_half_grid(folder: Path, dtype: str) -> None:
    teacher = load_teacher(resolve_teacher(str(folder)), device="cpu", dtype=dtype)
    assert teacher.dtype_name == dtype
    hidden_BTD = teacher.hidden(np.arange(8).reshape(1, 8))
    assert hidden_BTD.dtype == teacher.dtype
    logits = teacher.head.logits(hidden_BTD[0], torch.empty(8, 100))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.to(teacher.dtype).float())


def test_weights_digest_is_of_the_files_digests_in_name_order(tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    make_tokenizer(100).save_pretrained(tmp_path)
    files = resolve_teacher(str(tmp_path))
    assert len(files.weight_files) > 1
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names]
    assert files.weights_sha256 == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert load_teacher(files, device="cpu").info.num_parameters == model.num_parameters()


def test_a_hub_name_is_fetched_at_its_revision_and_keeps_the_commit(folder: Path, monkeypatch: Any) -> None:
    calls: list[tuple[Any, Any]] = []
    commit = folder.rename(folder.parent / "0123abc")

    def fetch(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    files = resolve_teacher("someone/model", revision="v1")
    assert (files.name, files.revision, files.folder) == ("someone/model", "0123abc", commit)
    assert calls[0][0] == ("someone/model",)
    assert calls[0][1]["revision"] == "v1"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in calls[0][1]["allow_patterns"])


def test_an_unknown_teacher_is_one_line_offline(monkeypatch: Any, tmp_path: Path) -> None:
    def offline(*_args: Any, **_kwargs: Any) -> str:
        raise LocalEntryNotFoundError("nothing cached\nand no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "someone/nothing" in refused("unknown-teacher", resolve_teacher, "someone/nothing")
    refused("unknown-teacher", resolve_teacher, str(tmp_path / "absent"))
    refused("unknown-teacher", resolve_teacher, "absent.gguf")


@pytest.mark.parametrize("name", ["~nouser-of-ours/x", "n" * 300, "/" + "n" * 300, "a\0b"])
def test_what_can_be_no_path_is_an_unknown_teacher(name: str) -> None:
    refused("unknown-teacher", resolve_teacher, name)


def test_a_file_of_a_teacher_is_refused_with_a_hint(folder: Path) -> None:
    message = refused("unknown-teacher", resolve_teacher, str(folder / "model.safetensors"))
    assert "give the folder" in message


def test_a_hub_teacher_cached_in_part_is_refused_without_a_network(folder: Path, monkeypatch: Any) -> None:
    def offline(*_args: Any, **_kwargs: Any) -> Any:
        raise type("ConnectError", (Exception,), {})("no route")

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    refused("no-weights", resolve_teacher, "someone/model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("unknown-teacher", resolve_teacher, "someone/model")


def test_a_name_the_hub_cannot_have_is_unknown() -> None:
    refused("unknown-teacher", resolve_teacher, "not a name!")


def test_pickled_weights_are_never_read(folder: Path, monkeypatch: Any) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused("unsafe-weights", resolve_teacher, str(folder))
    (folder / "pytorch_model.bin").unlink()
    refused("no-weights", resolve_teacher, str(folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *a, **k: ["pytorch_model.bin"])
    refused("unsafe-weights", resolve_teacher, "someone/model")


@pytest.mark.parametrize("body", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_weights_index_that_leads_astray_is_refused(folder: Path, body: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(body)
    refused("bad-weights-index", resolve_teacher, str(folder))


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    refused("revision-of-a-folder", resolve_teacher, str(folder), revision="main")


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_broken_weights_are_refused(folder: Path, damage: bytes | None) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    refused("broken-weights", load_teacher, resolve_teacher(str(folder)), device="cpu")


def test_weights_of_another_shape_than_the_configs_are_named(folder: Path) -> None:
    change_config(folder, n_inner=48)
    message = refused("other-shape", load_teacher, resolve_teacher(str(folder)), device="cpu")
    assert "mlp.c_fc" in message
    assert "48" in message


def test_memory_that_runs_out_is_not_told_as_broken_weights(folder: Path, monkeypatch: Any) -> None:
    def full(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_teacher(resolve_teacher(str(folder)), device="cpu")


def test_a_checkpoint_without_a_language_head_is_refused(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("llama", **FAMILIES["llama"])
    auto: Any = transformers.AutoModelForSequenceClassification
    auto.from_config(config).save_pretrained(tmp_path)
    make_tokenizer(100).save_pretrained(tmp_path)
    message = refused("incomplete-weights", load_teacher, resolve_teacher(str(tmp_path)), device="cpu")
    assert "lm_head" in message


@pytest.mark.parametrize(
    ("family", "architectures"),
    [("bert", ["BertForTokenClassification"]), ("t5", None), ("vit", None), ("bart", None), ("clip", None)],
)
def test_what_is_no_language_model_is_refused_without_loading(
    folder: Path, family: str, architectures: list[str] | None
) -> None:
    transformers.AutoConfig.for_model(family, architectures=architectures).save_pretrained(folder)
    files = resolve_teacher(str(folder))
    refused("not-a-language-model", describe_teacher, files)
    refused("not-a-language-model", load_teacher, files, device="cpu")


def test_a_model_that_reads_to_the_right_is_refused(folder: Path, monkeypatch: Any) -> None:
    def look_ahead(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state[:, -1:]
        return output

    original: Any = transformers.AutoModelForCausalLM.from_pretrained

    def patched(*args: Any, **kwargs: Any) -> Any:
        loaded: Any = original(*args, **kwargs)
        loaded[0].base_model.register_forward_hook(look_ahead)
        return loaded

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", patched)
    refused("not-a-causal-lm", load_teacher, resolve_teacher(str(folder)), device="cpu")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_families_that_cap_or_scale_logits_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: str
) -> None:
    files = resolve_teacher(str(make_folder(tmp_path, family, **changes)))
    assert family in refused("unsupported-head", load_teacher, files, device="cpu", dtype=dtype)


def test_a_teacher_of_nans_loads_so_that_its_first_block_is_named(tmp_path: Path) -> None:
    load_teacher(resolve_teacher(str(make_folder(tmp_path, spread=float("nan")))), device="cpu")


def test_a_tokenizer_of_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    files = resolve_teacher(str(make_folder(tmp_path, vocab_size=ROWS + 1)))
    refused("vocabulary-mismatch", describe_teacher, files)
    refused("vocabulary-mismatch", load_teacher, files, device="cpu")


def test_a_declared_plain_tokenizer_is_not_replaced_by_its_familys(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_teacher(str(make_folder(tmp_path, "qwen2"))))
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert len(tokenizer.get_vocab()) == 100


def test_added_tokens_count_as_vocabulary(folder: Path) -> None:
    tokenizer = make_tokenizer(100)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    assert describe_teacher(resolve_teacher(str(folder)))[0].vocab_size == 101


def test_eos_comes_from_the_config_where_the_tokenizer_has_none(folder: Path) -> None:
    make_tokenizer(100, eos=None).save_pretrained(folder)
    files = resolve_teacher(str(folder))
    assert describe_teacher(files)[1].eos_token_id == 1
    for eos, kind in ((None, "no-eos"), (ROWS - 1, "vocabulary-mismatch")):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
        refused(kind, describe_teacher, files)


def test_a_missing_or_broken_tokenizer_is_refused(folder: Path) -> None:
    files = resolve_teacher(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    refused("no-tokenizer", load_tokenizer, files)
    (folder / "tokenizer.json").unlink()
    refused("no-tokenizer", describe_teacher, files)


def test_a_missing_or_broken_config_is_refused(folder: Path) -> None:
    files = resolve_teacher(str(folder))
    (folder / "config.json").write_text("{")
    refused("unreadable-config", describe_teacher, files)
    (folder / "config.json").unlink()
    refused("unreadable-config", describe_teacher, files)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_head": 3},
        {"n_head": 0},
        {"n_embd": "x"},
        {"n_embd": -1},
        {"n_positions": -1},
        {"n_layer": 0},
        {"n_layer": "two"},
        {"vocab_size": None},
        {"activation_function": "nonsense"},
        {"model_type": "nonsense"},
        {"model_type": ["gpt2"]},
        {"rope_scaling": 3, "model_type": "llama"},
    ],
)
def test_a_config_of_nonsense_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, **changes)
    refused("unreadable-config", describe_teacher, resolve_teacher(str(folder)))


@pytest.mark.parametrize("body", ["{", "[]", "[" * 100_000, "\udc80"])
def test_a_broken_generation_config_is_refused_before_anything_is_written(folder: Path, body: str) -> None:
    (folder / "generation_config.json").write_bytes(body.encode(errors="surrogateescape"))
    refused("unreadable-config", describe_teacher, resolve_teacher(str(folder)))


def test_blocks_longer_than_the_positions_are_refused(folder: Path) -> None:
    info, _ = describe_teacher(resolve_teacher(str(folder)))
    check_block_tokens(info, 64)
    refused("block-too-long", check_block_tokens, info, 65)
    check_block_tokens(info.model_copy(update={"max_positions": None}), 1 << 20)


@pytest.mark.parametrize("name", ["cuda:99", "cuda:x", "tpu", "cpu:1", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    refused("no-such-device", pick_device, name)


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    refused("no-such-device", pick_device, "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    refused("no-such-device", pick_device, "cuda:2")


def test_auto_dtype_is_bfloat16_only_on_cuda_that_has_it(monkeypatch: Any) -> None:
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert pick_dtype("auto", torch.device("cuda")) == expected
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16
    refused("no-such-dtype", pick_dtype, "int4", torch.device("cpu"))


def test_a_gguf_file_reaches_config_tokenizer_and_model(folder: Path, monkeypatch: Any) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        original = getattr(transformers, name).from_pretrained

        def patched(path: Any, *, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            if kwargs.get("gguf_file"):
                seen.append((_name, dict(kwargs)))
                del kwargs["gguf_file"]
            return _original(path, **kwargs)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", patched)
    (folder / "tiny.Q4.gguf").write_bytes(b"GGUF")
    (folder / "other.gguf").write_bytes(b"GGUF")
    files = resolve_teacher(str(folder), gguf_file="tiny.Q4.gguf")
    assert files == resolve_teacher(str(folder / "tiny.Q4.gguf"))
    assert (files.name, files.weight_files) == ("tiny.Q4.gguf", ("tiny.Q4.gguf",))
    teacher = load_teacher(files, device="cpu")
    assert (teacher.info, teacher.tokenizer_info) == describe_teacher(files)
    model_call = next(kwargs for name, kwargs in seen if name == "AutoModelForCausalLM")
    assert model_call["gguf_file"] == "tiny.Q4.gguf"
    assert "use_safetensors" not in model_call
    assert {name for name, _ in seen} == {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
    refused("unknown-teacher", resolve_teacher, str(folder), gguf_file="absent.gguf")
    (folder / "model.safetensors").unlink()
    assert "other.gguf" in refused("no-weights", resolve_teacher, str(folder))


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_saved_description_is_the_same_wherever_the_files_lie(tmp_path: Path) -> None:
    saved = []
    for place in ("here", "there"):
        folder = make_folder(tmp_path / place / "tiny")
        save_teacher_description(resolve_teacher(str(folder)), tmp_path / f"cache-{place}")
        saved.append(read_all(tmp_path / f"cache-{place}"))
    assert saved[0] == saved[1]
    assert {"teacher/config.json", "teacher/generation_config.json", "tokenizer/tokenizer.json"} <= set(saved[0])
    for body in saved[0].values():
        assert str(tmp_path).encode() not in body
        assert b"name_or_path" not in body
    config = transformers.AutoConfig.from_pretrained(tmp_path / "cache-here" / "teacher")
    assert config.vocab_size == ROWS


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_tokenizer_has_the_originals_digest_and_ids(family: str, tmp_path: Path) -> None:
    files = resolve_teacher(str(make_folder(tmp_path / "tiny", family)))
    save_teacher_description(files, tmp_path / "cache")
    original = load_tokenizer(files)
    saved: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "cache" / "tokenizer")
    assert tokenizer_sha256(saved) == tokenizer_sha256(original)
    assert saved("w5 w7 nothing")["input_ids"] == original("w5 w7 nothing")["input_ids"] == [5, 7, 0]


def test_the_tokenizer_digest_knows_vocabulary_and_special_tokens_but_not_the_last_call() -> None:
    base = make_tokenizer(50)
    digest = tokenizer_sha256(base)
    base.pad_token = "<eos>"
    with_pad = tokenizer_sha256(base)
    assert (
        len({digest, with_pad, tokenizer_sha256(make_tokenizer(51)), tokenizer_sha256(make_tokenizer(50, None))}) == 4
    )
    base(["w3", "w4 w5"], padding=True, truncation=True, max_length=4)
    assert tokenizer_sha256(base) == with_pad


def test_loading_keeps_the_terminal_quiet(folder: Path, capfd: Any) -> None:
    load_teacher(resolve_teacher(str(folder)), device="cpu")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_teacher_files_survive_a_process_boundary(folder: Path) -> None:
    files = resolve_teacher(str(folder))
    again = pickle.loads(pickle.dumps(files))
    assert isinstance(again, TeacherFiles)
    assert again == files
    assert again.weights_sha256 == files.weights_sha256
    assert describe_teacher(again) == describe_teacher(files)


def test_a_teacher_that_is_spread_over_devices_says_what_one_in_one_place_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve_teacher(str(folder))
    whole = load_teacher(files, device="cpu")
    real: Any = transformers.GPT2LMHeadModel.from_pretrained
    asked: list[object] = []

    def from_pretrained(*args: Any, device_map: object = None, **kwargs: Any) -> Any:
        asked.append(device_map)
        model, report = real(*args, **kwargs)
        # What transformers does where there are several devices: every layer moves what it reads to its own.
        layers = dict.fromkeys(("transformer", "lm_head"), "cpu")
        return accelerate.dispatch_model(model, layers, force_hooks=True), report

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    spread = load_teacher(files, device="cpu", spread=True)
    assert asked == ["auto"]
    assert hasattr(spread.model.transformer, "_hf_hook")
    ids_BT = np.arange(24).reshape(2, 12)
    torch.testing.assert_close(spread.hidden(ids_BT), whole.hidden(ids_BT), rtol=0, atol=0)


def test_a_teacher_whose_layers_do_not_fit_on_the_gpus_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = transformers.GPT2LMHeadModel.from_pretrained

    def from_pretrained(*args: Any, device_map: object = None, **kwargs: Any) -> Any:
        model, report = real(*args, **kwargs)
        model.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
        return model, report

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert "layers left to cpu" in refused(
        "teacher-too-large", load_teacher, resolve_teacher(str(folder)), device="cpu", spread=True
    )
