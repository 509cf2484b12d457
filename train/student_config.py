"""From the teacher's config and a description to the config of a student, before any weight exists.

In: the config in the cache, and changes to it. Out: a checked float32 config of a text-only language model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from train.lm_kind import is_masked_lm

# Facts about a checkpoint that a config file may carry, and that say nothing about the shape of a model.
_NOT_SHAPE = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config")
_FEED_FORWARD_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def load_config(folder: Path, kind: str) -> PreTrainedConfig:
    """The config of a language model's folder; raises ``BadInputError`` of ``kind`` if it cannot be read."""
    if not (folder / "config.json").is_file():
        raise BadInputError(kind, folder, expected="config.json", found="no such file")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise BadInputError(kind, folder / "config.json", found=first_line(error)) from None
    refuse_no_lm(config)
    assert isinstance(config, PreTrainedConfig)
    return config


def refuse_no_lm(config: PreTrainedConfig) -> None:
    """Raise ``not-a-language-model`` for an architecture without a text-only head, causal or for masked tokens."""
    is_one = is_masked_lm(config) or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_one or config.get_text_config() is not config:
        expected = "a text-only causal or masked language model"
        raise BadInputError("not-a-language-model", config.model_type, expected=expected)


def layers_config(
    teacher: PreTrainedConfig, layers: Sequence[int], overrides: Mapping[str, object]
) -> PreTrainedConfig:
    """The teacher's config cut to some of its layers, with changes that keep every tensor's shape."""
    known = _known_overrides(teacher, overrides)
    depth_key = config_key(teacher, "num_hidden_layers")
    if depth_key in known:
        raise BadInputError("bad-student-config", depth_key, hint="choose num_layers or layer_indices instead")
    values = _shape_values(teacher)
    for key in _per_layer_keys(teacher, values):
        values[key] = [values[key][layer] for layer in layers]
    return _config_of(type(teacher), values | {depth_key: len(layers)} | known)


def sliced_config(
    teacher: PreTrainedConfig, layers: Sequence[int], overrides: Mapping[str, object]
) -> tuple[PreTrainedConfig, dict[str, object]]:
    """The teacher's config cut to some of its layers and to narrower sizes, and the sizes that follow the given ones.

    Heads keep their size where the width allows it: then a narrower student has fewer heads.
    """
    known = _known_overrides(teacher, overrides)
    derived = _sliced_sizes(teacher, known)
    return layers_config(teacher, layers, derived | known), derived


def _sliced_sizes(teacher: PreTrainedConfig, known: Mapping[str, Any]) -> dict[str, object]:
    width, heads_key = known.get(config_key(teacher, "hidden_size")), config_key(teacher, "num_attention_heads")
    heads, head_dim = teacher.num_attention_heads, teacher.hidden_size // teacher.num_attention_heads
    if heads_key not in known and isinstance(width, int) and width % head_dim == 0:
        heads = width // head_dim
    values, asked = _shape_values(teacher), {heads_key: heads} | dict(known)
    derived = {heads_key: heads} | _derived_sizes(teacher, values, asked)
    heads, shared = asked[heads_key], values.get("num_key_value_heads")
    if isinstance(shared, int) and isinstance(heads, int) and heads > 0:
        # As few as can serve all heads, and no more heads each than in the teacher.
        group = teacher.num_attention_heads // shared
        fitting = [n for n in range(1, shared + 1) if heads % n == 0 and heads // n <= group]
        derived["num_key_value_heads"] = fitting[0] if fitting else shared
    return {key: value for key, value in derived.items() if key not in known and values.get(key) != value}


def student_config(
    teacher: PreTrainedConfig, eos_token_id: int, overrides: Mapping[str, object]
) -> tuple[PreTrainedConfig, dict[str, object]]:
    """The teacher's config with changes, or, where they name a ``model_type``, that architecture's from scratch.

    Also returns the sizes that were not given and follow the changed ones.
    """
    if "model_type" not in overrides:
        known = _known_overrides(teacher, overrides)
        values = _shape_values(teacher)
        derived = _derived_sizes(teacher, values, known)
        if known.get(config_key(teacher, "num_hidden_layers"), teacher.num_hidden_layers) != teacher.num_hidden_layers:
            # Lists for each of the teacher's layers: the architecture writes those of another depth itself.
            per_layer = _per_layer_keys(teacher, values)
            values = {key: value for key, value in values.items() if key not in per_layer}
        return _config_of(type(teacher), values | derived | known), derived
    model_type = str(overrides["model_type"])
    try:
        default = AutoConfig.for_model(model_type)
    except Exception as error:
        found = "no such architecture" if isinstance(error, ValueError) else first_line(error)
        raise BadInputError("bad-student-config", f"model_type {model_type}", found=found) from None
    known = _known_overrides(default, {key: value for key, value in overrides.items() if key != "model_type"})
    # Some masked language models count their positions from the padding.
    pad = teacher.pad_token_id if is_masked_lm(teacher) else None
    base = {"vocab_size": teacher.vocab_size, "eos_token_id": eos_token_id, "pad_token_id": pad}
    base["bos_token_id"] = getattr(teacher, "bos_token_id", None)
    return _config_of(type(default), {config_key(default, key): value for key, value in base.items()} | known), {}


def _derived_sizes(
    config: PreTrainedConfig, values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, object]:
    """Sizes that follow a changed width or number of heads: feed-forward ratio, head size, shared-head ratio."""
    width_key, heads_key = config_key(config, "hidden_size"), config_key(config, "num_attention_heads")
    old_width, old_heads = config.hidden_size, config.num_attention_heads
    width, heads = overrides.get(width_key, old_width), overrides.get(heads_key, old_heads)
    if not all(isinstance(size, int) and size > 0 for size in (width, heads)):
        return {}  # the architecture's own validation names what is wrong
    derived: dict[str, object] = {}
    for key in _FEED_FORWARD_KEYS:
        inner = values.get(key)
        if isinstance(inner, int) and width != old_width:
            # The same ratio to the width; where that is no whole number, the nearest multiple of 8.
            whole, rest = divmod(inner * width, old_width)
            derived[key] = whole if rest == 0 else 8 * max(1, round(inner * width / old_width / 8))
    if values.get("word_embed_proj_dim") == old_width:
        derived["word_embed_proj_dim"] = width
    head_dim, shared = values.get("head_dim"), values.get("num_key_value_heads")
    if isinstance(head_dim, int) and head_dim * old_heads == old_width and width % heads == 0:
        derived["head_dim"] = width // heads
    if isinstance(shared, int) and heads != old_heads:
        most = max(1, heads * shared // old_heads)
        derived["num_key_value_heads"] = max(n for n in range(1, most + 1) if heads % n == 0)
    return {k: v for k, v in derived.items() if config_key(config, k) not in overrides and values.get(k) != v}


def config_key(config: PreTrainedConfig, name: str) -> str:
    """What this architecture calls a setting: ``n_layer`` for ``num_hidden_layers`` in GPT-2."""
    return config.attribute_map.get(name, name)


def _shape_values(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_SHAPE}


def _per_layer_keys(config: PreTrainedConfig, values: Mapping[str, Any]) -> list[str]:
    return [
        key
        for key, value in values.items()
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers and not key.endswith("_token_id")
    ]


def _known_overrides(config: PreTrainedConfig, overrides: Mapping[str, object]) -> dict[str, object]:
    """Overrides by the architecture's own names; a key that its config does not have is refused."""
    known = set(config.to_dict()) | set(config.attribute_map) | set(type(config).__dataclass_fields__)
    known -= {"model_type", *_NOT_SHAPE}
    for key in overrides:
        if key not in known and key not in _NOT_SHAPE:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else None
            raise BadInputError("unknown-key", f"student config key {key} of {config.model_type}", hint=hint)
    return {config_key(config, key): value for key, value in overrides.items() if key not in _NOT_SHAPE}


def _config_of(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    try:
        config = config_class.from_dict({**values, "dtype": "float32"})
    except Exception as error:
        raise BadInputError("bad-student-config", config_class.model_type, found=first_line(error)) from None
    refuse_no_lm(config)
    return config
