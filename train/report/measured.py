"""Files of other commands that a report shows: families, evaluations and plans come in as JSON, records go out.

What a file may leave out is None or empty; what it has too much is ignored: commands may come to say more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache_spec.errors import BadInputError
from train.run_files import FAMILY_NAME

Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class TextFigures(_Part):
    """A model on one text."""

    text: str
    num_tokens: int
    loss_nats: float
    perplexity: float | None = None
    bits_per_byte: float | None = None
    ece: float | None = None
    tokens_per_s: float | None = None
    intervals: dict[str, Interval] = {}


class CacheFigures(_Part):
    """A model against a cache's teacher."""

    cache: str
    temperature: float
    num_tokens: int
    loss_nats: float
    perplexity: float | None = None
    ece: float | None = None
    kl_is: str | None = None
    kl_to_teacher: float | None = None
    agreement: float | None = None
    overlap: float | None = None
    teacher_loss: float | None = None
    teacher_perplexity: float | None = None
    tokens_per_s: float | None = None
    intervals: dict[str, Interval] = {}


class Difference(_Part):
    """How much more a model has than the first one, on the same tokens."""

    to: str
    loss_nats: float | None = None
    accuracy: float | None = None
    intervals: dict[str, Interval] = {}


class CorpusFigures(_Part):
    """A model on a corpus by a stated protocol."""

    corpus: str
    source: str | None = None
    protocol: str | None = None
    mode: str | None = None
    window_tokens: int | None = None
    stride: int | None = None
    num_tokens: int | None = None
    num_words: int | None = None
    num_examples: int | None = None
    num_units: int | None = None
    loss_nats: float | None = None
    perplexity: float | None = None
    word_perplexity: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None
    intervals: dict[str, Interval] = {}
    interval_unit: str | None = None
    sampled: Any = None
    difference: Difference | None = None


class SpeedFigures(_Part):
    """How fast a model generates."""

    prompt_tokens: int | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    first_token_s: float | None = None
    token_s: float | None = None
    peak_bytes: int | None = None


class SampleText(_Part):
    """A text that a model went on with."""

    prompt: str
    text: str


class ModelFigures(_Part):
    """All that was measured of one model."""

    name: str
    parameters: int | None = None
    dtype: str | None = None
    device: str | None = None
    file_bytes: int | None = None
    texts: tuple[TextFigures, ...] = ()
    cache: CacheFigures | None = None
    corpora: tuple[CorpusFigures, ...] = ()
    speed: SpeedFigures | None = None
    samples: tuple[SampleText, ...] = ()


class Evaluation(_Part):
    """What ``kdpipe evaluate`` says."""

    models: tuple[ModelFigures, ...] = Field(min_length=1)
    bootstrap: Any = None


class FamilyStudent(_Part):
    """One student of a family."""

    name: str
    control_of: str | None = None
    status: str
    error: str | None = None
    parameters: int | None = None
    training_tokens: int | None = None
    training_hours: float | None = None
    evaluation: ModelFigures | None = None
    speed: SpeedFigures | None = None


class Family(_Part):
    """What ``family.json`` says."""

    format: str = Field(pattern="^kdpipe-family$")
    cache: str
    students: tuple[FamilyStudent, ...]


class Assumption(_Part):
    """What a plan takes as given."""

    name: str
    value: Any
    unit: str | None = None
    source: str | None = None


class PlannedCache(_Part):
    """The cache that was planned."""

    tokens: float
    tokens_certainty: str | None = None
    bytes: float | None = None
    bytes_by_array: dict[str, float] = {}
    bytes_by_table: dict[str, float] = {}
    """Of what is stored once."""


class PlannedCapture(_Part):
    """The capture that was planned."""

    hours: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: float | None = None


class Hours(_Part):
    """Of another way to train the same student."""

    hours: float | None = None


class PlannedStudent(_Part):
    """A student that was planned."""

    name: str
    parameters: int | None = None
    epochs: float | None = None
    tokens: float | None = None
    """Seen in all epochs."""
    hours_per_epoch: float | None = None
    hours: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: float | None = None
    online: Hours | None = None
    cross_entropy: Hours | None = None


class CurvePoint(_Part):
    """So many students, by several ways."""

    students: float
    ways: dict[str, dict[str, Any]]


class HoursPoint(CurvePoint):
    """What so many students could learn in some hours."""

    hours: float


class Plan(_Part):
    """What ``kdpipe plan --json`` says."""

    assumptions: tuple[Assumption, ...] = ()
    calibrated: bool = False
    device: Any = None
    num_devices: int | None = None
    teacher: dict[str, Any] = {}
    cache: PlannedCache
    capture: PlannedCapture | None = None
    students: tuple[PlannedStudent, ...] = ()
    totals: dict[str, Any] = {}
    break_even: Any = None
    budget: dict[str, Any] | None = None
    fits_in_memory: bool | None = None
    curve: tuple[CurvePoint, ...] | None = None
    loss_by_hours: tuple[HoursPoint, ...] | None = None


Kind = TypeVar("Kind", bound=_Part)


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation; BadInputError ``not-an-evaluation``."""
    return _read(path, Evaluation, "not-an-evaluation", "what kdpipe evaluate wrote as JSON")


def read_plan(path: Path) -> Plan:
    """A plan; BadInputError ``not-a-plan``."""
    return _read(path, Plan, "not-a-plan", "what kdpipe plan --json printed")


def read_family_report(folder: Path) -> Family:
    """The figures of a family; BadInputError ``not-a-family``."""
    return _read(folder / FAMILY_NAME, Family, "not-a-family", f"a family's folder, with {FAMILY_NAME}")


def _read(path: Path, kind: type[Kind], error_kind: str, expected: str) -> Kind:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInputError(error_kind, path, expected=expected, found=error.strerror) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        found = f"{where}: {first['msg']}" if where else first["msg"]
        raise BadInputError(error_kind, path, expected=expected, found=found) from None
