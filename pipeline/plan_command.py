"""``kdpipe plan`` put together: models' costs and the students' side from ``train``, the cache's side from here.

In: checked settings. Out: one report, by formula or from a probe of this machine; nothing is left on the disk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_spec.errors import BadInputError
from cache_spec.failures import first_line
from pipeline.plan.config import PlanConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pipeline.plan.children import Answer
    from pipeline.plan.measured import Probed

_LEAST_STEPS, _MOST_STEPS = 3, 32
"""Of a student's probe: the first step is slow, and of the others the median counts."""
_CACHED_SHARE = 0.7
"""Of a student's time; the rest is for steps from the text alone."""
_OF_TRAINING = ("epochs", "batch_blocks", "accumulate", "precision")


def plan(config: PlanConfig) -> dict[str, Any]:
    """What the capture and the students would take; raises BadInputError for what cannot be planned."""
    from pipeline.plan.cache_size import TeacherSizes, cache_size, learnt_from, measured_size
    from pipeline.plan.curve import laws
    from pipeline.plan.devices import devices_of
    from pipeline.plan.measured import measured_assumptions, measured_rates
    from pipeline.plan.rates import assumptions, counted_by, formula_rates
    from pipeline.plan.report import facts_of
    from pipeline.settings import recipe_path
    from train.model_cost import model_cost
    from train.planned_students import planned_students

    by_way = laws(config.runs)
    teacher_config = load_model_config(config.teacher, f"teacher {config.teacher}")
    students = planned_students(
        config.student,
        teacher_config,
        settings={name: getattr(config, name) for name in _OF_TRAINING if name in config.model_fields_set},
        file_of=recipe_path,
        load=lambda name: load_model_config(name, f"model {name}"),
    )
    teacher = model_cost(teacher_config, config.block_tokens, f"teacher {config.teacher}")
    costs = [model_cost(one.model, config.block_tokens, f"student {one.name}") for one in students]
    for one, cost in zip(students, costs, strict=True):
        if one.train.student == "checkpoint" and cost.vocab_size != teacher.vocab_size:
            place = f"student {one.name}"
            raise BadInputError(
                "student-vocabulary", place, expected=f"the teacher's {teacher.vocab_size} ids", found=cost.vocab_size
            )
    tokens, certainty = _tokens(config)
    sizes = TeacherSizes(teacher.model_type, teacher.vocab_size, teacher.width, teacher.layers, teacher.parameters)
    size = cache_size(config, sizes, tokens)
    learnt = learnt_from(size.encoding, tokens)
    common: dict[str, Any] = {
        "teacher": teacher,
        "students": [
            {"name": one.name, "settings": one.settings, "cost": cost}
            for one, cost in zip(students, costs, strict=True)
        ],
        "tokens": tokens,
        "certainty": certainty,
        "laws": by_way,
    }
    named = [(one.name, cost, one.train) for one, cost in zip(students, costs, strict=True)]
    if config.calibrate:
        probed = _probe(config, teacher, students, costs)
        vocab_size = probed.capture["vocab_size"]
        size = measured_size(
            config,
            sizes._replace(vocab_size=vocab_size),
            tokens,
            probed.capture["block_bytes"],
            probed.capture["table_bytes"],
        )
        rates = measured_rates(config, probed, teacher, named, learnt_tokens=learnt, size=size)
        told = measured_assumptions(config, probed, teacher)
        return facts_of(config, rates, size, told, device=None, num_devices=1, **common) | {"probe": probed.facts()}
    costs_source = counted_by([("teacher", teacher), *((one, cost) for one, cost, _ in named)])
    checkpointing = [name for name, _, train in named if train.activation_checkpointing]
    here, share, memory_gb = _here(config)
    reports = []
    for device in devices_of(config, here, memory_gb):
        rates = formula_rates(
            config,
            device,
            teacher,
            named,
            learnt_tokens=learnt,
            bytes_per_token=sum(size.bytes_per_token.values()),
            table_bytes=sum(size.table_bytes.values()),
            share=share,
        )
        told = assumptions(config, device, share, costs_source, checkpointing)
        reports.append(facts_of(config, rates, size, told, device=device, num_devices=share, **common))
    first = reports[0]
    return first | {"by_device": [_short(report) for report in reports]}


def _short(report: dict[str, Any]) -> dict[str, Any]:
    """One device beside others."""
    return {
        "device": report["device"]["name"],
        "capture_hours": report["capture"]["hours"],
        "student_hours": [student["hours"] for student in report["students"]],
        "totals": report["totals"],
        "budget": report["budget"],
        "fits_in_memory": report["fits_in_memory"],
    }


def load_model_config(name: str, place: str) -> PreTrainedConfig:
    """The config of a model: a shipped one, that of a folder, or a hub repository's; no weights are read.

    Raises BadInputError ``unknown-model``, ``unreadable-config``, ``not-a-language-model``.
    """
    from pipeline.plan.presets import PRESETS, preset
    from train.student_config import load_config

    path = Path(name).expanduser()
    if path.is_dir():
        return load_config(path, "unreadable-config")
    shipped = preset(name)
    if shipped is not None:
        return shipped
    if path.is_file():
        raise BadInputError("unknown-model", place, expected="a folder with config.json", found="a file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BadInputError("unknown-model", place, expected="a folder with config.json", found="no such folder")
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:
        expected = "a folder, one of " + ", ".join(PRESETS) + ", or a hub name that is cached or can be fetched"
        raise BadInputError("unknown-model", place, expected=expected, found=first_line(error)) from None
    return load_config(folder, "unreadable-config")


def _tokens(config: PlanConfig) -> tuple[int, str]:
    """Whole blocks' tokens that are captured, and how sure that is."""
    if config.tokens is not None:
        return config.tokens // config.block_tokens * config.block_tokens, "as given"
    from pipeline.corpus import resolve
    from pipeline.counting import count_tokens
    from pipeline.plan.presets import PRESETS
    from pipeline.teacher_files import load_tokenizer, tokenizer_files

    if config.teacher in PRESETS and not Path(config.teacher).is_dir():
        hint = "give --tokens, or the teacher's folder"
        raise BadInputError("no-tokenizer", f"teacher {config.teacher}", found="a shipped config alone", hint=hint)
    tokenizer = load_tokenizer(tokenizer_files(config.teacher))
    counted = count_tokens(
        resolve(config.text, text_field=config.text_field, split=config.split),
        tokenizer,
        eos_token_id=tokenizer.eos_token_id or 0,
        limit_tokens=None,
        stream_tokens=config.block_tokens,
    )
    if counted.num_tokens < config.block_tokens:
        raise BadInputError(
            "too-little-text", "text", expected=f"{config.block_tokens} tokens", found=counted.num_tokens
        )
    return counted.num_tokens // config.block_tokens * config.block_tokens, counted.certainty


def _here(config: PlanConfig) -> tuple[str, int, float | None]:
    """The name of this machine's device, how many share the work, and the GB of memory of a GPU."""
    import torch

    from pipeline.plan.devices import CPU, device_named

    if config.device:
        return config.device[0], config.num_devices or 1, None
    if torch.cuda.is_available():
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
        return device_named(torch.cuda.get_device_name(0), memory_gb), config.num_devices or 1, memory_gb
    return CPU, config.num_devices or torch.get_num_threads(), None


def _probe(config: PlanConfig, teacher: Any, students: list[Any], costs: list[Any]) -> Probed:
    """Capture and train a little, in a folder of its own on the cache's disk."""
    from pipeline.plan.children import ask
    from pipeline.plan.measured import Probed, capture_settings
    from pipeline.plan.rates import forward_passes

    if not config.probe_folder.is_dir():
        raise BadInputError("no-such-folder", config.probe_folder, expected="a folder on the cache's disk")
    # Half of the time is the teacher's; the students share the rest.
    share_s = 0.5 * config.probe_seconds
    least_blocks = max(one.train.batch_blocks for one in students)
    with tempfile.TemporaryDirectory(prefix=".kdpipe-plan-", dir=config.probe_folder) as name:
        folder = Path(name).absolute()
        order = {
            "settings": capture_settings(config, folder / "cache"),
            "seconds": share_s,
            "least_blocks": least_blocks,
        }
        capture = ask("pipeline.plan.probe", order)
        trained: list[Answer] = []
        flop_s = capture.facts["forward_token_s"] / teacher.forward_flops
        for one, cost in zip(students, costs, strict=True):
            settings = {
                **one.settings,
                "cache": str(folder / "cache"),
                "out": str(folder / f"run-{len(trained)}" / "run"),
            }
            if one.train.student in ("teacher-layers", "sliced"):
                settings["teacher"] = one.settings.get("teacher", config.teacher)
            if 1.0 not in config.temperatures:
                settings.setdefault("temperature", config.temperatures[0])
            expected_s = (
                forward_passes(one.train) * cost.forward_flops * flop_s * one.train.batch_blocks * config.block_tokens
            )
            fit = int(_CACHED_SHARE * share_s / len(students) / expected_s)
            steps = min(max(_LEAST_STEPS, fit), _MOST_STEPS)
            trained.append(ask("train.probe", {"settings": settings, "steps": steps}))
    return Probed(capture=capture.facts, capture_wall_s=capture.wall_s, students=tuple(trained))


def lines(facts: dict[str, Any]) -> list[str]:
    """The report for people."""
    from pipeline.plan.report import describe

    return describe(facts)
