"""What devices can do, by what their makers publish, and how much of it a run gets.

In: a name, and settings that replace figures of the table. Out: a ``Device``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from cache_spec.errors import BadInputError
from pipeline.plan.config import PlanConfig

CPU = "cpu-core"
_ASSUMED = {"capture_utilisation": "assumed", "training_utilisation": "assumed"}
_NO_NAME = re.compile(r"nvidia|tesla|geforce|gpu|sxm\d*|hbm\d*e?|\d+gb")
"""Words of a driver's name that tell no device of the table from another."""
_SAME = {"a100pcie": "a100"}
"""Cards within a few percent of one in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device; rates are peaks, of dense matrices."""

    name: str
    tflops: float
    """Of float32, or what matrix products of float32 run at by default."""
    half_tflops: float
    """Of bfloat16 or float16 with sums in float32; that of float32 where it gains nothing."""
    gb_per_s: float
    """Memory bandwidth."""
    memory_gb: float | None
    """None: the machine's own."""
    half_by_default: bool = True
    """Whether kdpipe computes in half precision there where nothing else is asked for: on CUDA."""
    capture_utilisation: float = 0.5
    """Share of the peak that a large forward pass reaches."""
    training_utilisation: float = 0.4
    """Share that forward, backward and their small kernels reach together."""
    source: str = "maker's data sheet"
    sources: Mapping[str, str] = field(default_factory=lambda: dict(_ASSUMED))
    """Of the figures that have another one, by their names."""

    def source_of(self, figure: str) -> str:
        """Where a figure is from."""
        return self.sources.get(figure, self.source)

    def peak_flops(self, dtype: str) -> float:
        """FLOPs a second in that type."""
        return 1e12 * (self.tflops if dtype in ("float32", "fp32") else self.half_tflops)


def _gpu(name: str, tflops: float, half_tflops: float, gb_per_s: float, memory_gb: float, half: bool = True) -> Device:
    return Device(
        name=name,
        tflops=tflops,
        half_tflops=half_tflops,
        gb_per_s=gb_per_s,
        memory_gb=memory_gb,
        half_by_default=half,
    )


DEVICES = {
    device.name: device
    for device in (
        _gpu("h200", 67.0, 989.0, 4800.0, 141.0),
        _gpu("h100", 67.0, 989.0, 3350.0, 80.0),
        _gpu("a100", 19.5, 312.0, 2039.0, 80.0),
        _gpu("a100-40gb", 19.5, 312.0, 1555.0, 40.0),
        _gpu("l4", 30.3, 121.0, 300.0, 24.0),
        # No bfloat16: capture and training take float32 there.
        _gpu("t4", 8.1, 65.0, 320.0, 16.0, half=False),
        _gpu("rtx4090", 82.6, 165.2, 1008.0, 24.0),
        _gpu("rtx3090", 35.6, 71.0, 936.0, 24.0),
        _gpu("m2-max", 13.6, 13.6, 400.0, 96.0, half=False),
        Device(
            name=CPU,
            tflops=0.1,
            half_tflops=0.1,
            gb_per_s=10.0,
            memory_gb=None,
            half_by_default=False,
            # SmolLM2-135M took 4,966 microseconds a token, 0.29 GFLOPs.
            capture_utilisation=0.55,
            training_utilisation=0.5,
            source="assumed: 3.1 GHz, 32 FLOPs a cycle (AVX2); a share of the memory's bandwidth",
            sources=_ASSUMED
            | {"capture_utilisation": 'docs/RESULTS.md, "Encoding beside the teacher"', "memory_gb": "the machine's"},
        ),
    )
}


def devices_of(config: PlanConfig, here: str, memory_gb: float | None = None) -> list[Device]:
    """The devices to plan for, ``here`` being this machine's, with ``memory_gb`` where its driver says so.

    Raises BadInputError ``unknown-device``, ``bad-devices``.
    """
    known = DEVICES | (_read(config.devices) if config.devices is not None else {})
    changes: dict[str, Any] = {
        "tflops": config.device_tflops,
        "half_tflops": config.device_tflops,
        "gb_per_s": config.device_gb_per_s,
        "memory_gb": config.device_memory_gb,
        "capture_utilisation": config.capture_utilisation,
        "training_utilisation": config.training_utilisation,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    told = dict.fromkeys(given, "given")
    if not config.device and memory_gb is not None and config.device_memory_gb is None:
        given["memory_gb"], told["memory_gb"] = memory_gb, "this machine's driver"
    chosen = []
    for name in dict.fromkeys(config.device or (here,)):
        if name not in known:
            if "tflops" not in given or "gb_per_s" not in given:
                hint = "describe it in a --devices file, or give --device-tflops and --device-gb-per-s"
                raise BadInputError("unknown-device", name, expected="one of " + ", ".join(known), hint=hint)
            known[name] = Device(
                name=name, tflops=1.0, half_tflops=1.0, gb_per_s=1.0, memory_gb=None, source="not known"
            )
        device = known[name]
        chosen.append(replace(device, **given, sources={**device.sources, **told}))
    return chosen


def device_named(card: str, memory_gb: float) -> str:
    """The table's name of a GPU, by what its driver calls it and its memory; the driver's where the table has none."""
    words = [word for word in re.findall(r"[a-z0-9]+", card.lower()) if not _NO_NAME.fullmatch(word)]
    name = _SAME.get("".join(words), "".join(words))
    if name == "a100" and memory_gb < 60:
        name = "a100-40gb"
    return name if name in DEVICES else card


def _read(path: Path) -> dict[str, Device]:
    try:
        body = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise BadInputError("bad-devices", path, found=error) from None
    if not isinstance(body, dict) or not body:
        raise BadInputError("bad-devices", path, expected="a mapping from names to devices")
    return {str(name): _device(str(name), values, path) for name, values in body.items()}


def _device(name: str, values: Any, path: Path) -> Device:
    known = {one.name for one in fields(Device)} - {"name", "source", "sources"}
    place = f"{path}: {name}"
    if not isinstance(values, dict):
        raise BadInputError("bad-devices", place, expected="tflops and gb_per_s, at least")
    for key, value in values.items():
        if key not in known:
            raise BadInputError("unknown-key", f"{place}: {key}", expected="one of " + ", ".join(sorted(known)))
        if key == "half_by_default" and isinstance(value, bool):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise BadInputError("bad-devices", f"{place}: {key}", expected="a number above 0", found=value)
        if key.endswith("utilisation") and value > 1:
            raise BadInputError("bad-devices", f"{place}: {key}", expected="a share, at most 1", found=value)
    if missing := [key for key in ("tflops", "gb_per_s") if key not in values]:
        raise BadInputError("bad-devices", place, expected=missing[0])
    settings = {"half_tflops": values["tflops"], "memory_gb": None} | values
    sources = {figure: source for figure, source in _ASSUMED.items() if figure not in values}
    return Device(name=name, source=str(path), sources=sources, **settings)


def as_facts(device: Device) -> dict[str, Any]:
    """The device as plain values."""
    return asdict(device)
