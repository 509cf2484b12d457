"""The settings of encodings: every check fires, defaults are the records' own, and what is not used is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from cache_spec.encodings import ENCODINGS
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import TopK
from pipeline.config import CaptureConfig, TranscodeConfig
from pipeline.encoding_config import DEFAULT_ENCODING, EncodingName, encoding_record, used_settings

PATHS: dict[str, Any] = {"teacher": "t", "text": ("x",), "out": Path("o")}
DEFAULT_K = CaptureConfig.model_fields["k"].default


def test_every_encoding_of_the_format_has_a_name_and_a_record() -> None:
    assert set(get_args(EncodingName)) == set(ENCODINGS)
    assert DEFAULT_ENCODING in ENCODINGS
    for name in ENCODINGS:
        config = CaptureConfig(**PATHS, encoding=name)
        assert encoding_record(config, name).name == name


@pytest.mark.parametrize(
    ("settings", "record"),
    [
        ({"encoding": "topk"}, TopK(k=DEFAULT_K)),
        ({"encoding": "topk", "k": 7, "levels": 99, "odds_step_nats": 0.5}, TopK(k=7, levels=99, odds_step_nats=0.5)),
        ({"encoding": "sampled", "draws": 9, "seed": 3}, Sampled(draws=9, seed=3)),
        ({"encoding": "sparsified", "k": 9}, Sparsified(k=9)),
        (
            {"encoding": "prototype", "prototypes": 8, "residual_draws": 2, "calibration_tokens": 99},
            Prototype(k=DEFAULT_K, prototypes=8, residual_draws=2, calibration_tokens=99),
        ),
        ({"encoding": "hidden", "last_hidden_dtype": "int8"}, Hidden(dtype="int8")),
    ],
)
def test_a_record_follows_from_settings(settings: dict[str, Any], record: Any) -> None:
    assert encoding_record(CaptureConfig(**PATHS, **settings), settings["encoding"]) == record


def test_what_is_not_given_is_inherited() -> None:
    config = TranscodeConfig(cache=Path("c"), out=Path("o"), k=4)
    old = Prototype(k=9, levels=77, prototypes=3, seed=5, calibration_tokens=8)
    assert encoding_record(config, "topk", inherited=old) == TopK(k=4, levels=77)
    assert encoding_record(config, "sampled", inherited=old) == Sampled(draws=50, seed=5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_setting_that_an_encoding_does_not_use_is_refused(encoding: str) -> None:
    given: dict[str, Any] = {
        "k": 8,
        "levels": 64,
        "odds_step_nats": 0.1,
        "prototypes": 2,
        "residual_draws": 2,
        "draws": 5,
        "seed": 1,
    }
    given |= {"calibration_tokens": 9, "last_hidden_dtype": "int8"}
    for name, value in given.items():
        if name in used_settings(encoding):
            CaptureConfig(**PATHS, encoding=encoding, **{name: value})
            continue
        with pytest.raises(ValidationError, match=f"{name} means nothing to encoding {encoding}"):
            CaptureConfig(**PATHS, encoding=encoding, **{name: value})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"encoding": "nonsense"}, "encoding"),
        ({"k": 0}, "k"),
        ({"levels": 1}, "levels"),
        ({"levels": 1 << 16}, "levels"),
        ({"odds_step_nats": 0}, "odds_step_nats"),
        ({"encoding": "prototype", "prototypes": 0}, "prototypes"),
        ({"encoding": "prototype", "residual_draws": 3}, "multiple of 2"),
        ({"encoding": "prototype", "calibration_tokens": 0}, "calibration_tokens"),
        ({"encoding": "prototype", "prototypes_from": ""}, "is empty"),
        ({"encoding": "prototype", "prototypes_from": "~nouser-of-ours/c"}, "no home folder"),
        ({"encoding": "prototype", "prototypes_from": "c", "calibration_tokens": 9}, "nothing with prototypes_from"),
        ({"encoding": "sampled", "draws": 0}, "draws"),
        ({"encoding": "sampled", "draws": 1 << 16}, "draws"),
        ({"encoding": "sampled", "seed": -1}, "seed"),
        ({"encoding": "hidden", "last_hidden_dtype": "int4"}, "last_hidden_dtype"),
        ({"hidden_dtype": "bfloat16"}, "hidden_dtype"),
        ({"hidden_window": 0, "hidden_dtype": "int8"}, "hidden_dtype means nothing without hidden_window"),
        ({"spread": True, "workers": 2}, "spread takes all GPUs for one teacher"),
        ({"spread": True, "device": "cuda:1"}, "device cuda:1 is one"),
        ({"temperatures": ()}, "at least one"),
        ({"temperatures": (2.0, 1.0)}, "ascending"),
        ({"temperatures": (0.01,)}, "from 0.05 to 100"),
    ],
)
def test_each_check_fires(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CaptureConfig(**PATHS, **settings)


def test_a_recipes_settings_of_another_encoding_give_way_to_a_flag() -> None:
    values = {"encoding": "sampled", "k": 8, "seed": 1, "block_tokens": 64}
    assert CaptureConfig.superseded({"encoding"}, values) >= {"k"}
    assert not CaptureConfig.superseded({"encoding"}, values) & {"seed", "block_tokens", "encoding"}
    assert CaptureConfig.superseded({"draws"}, values) == set()
