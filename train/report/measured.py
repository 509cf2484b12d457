"""Files of other commands that a report shows: runs, families, evaluations, plans come in as JSON, records go out.

What a file may leave out is None or empty; what it has too much is ignored: commands may come to say more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from cache_spec.errors import BadInputError
from train.run_files import FAMILY_NAME

Interval = tuple[float, float]
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A whole number that a page can calculate with."""


class Part(BaseModel):
    """An object of a file."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class TextFigures(Part):
    """A model on one text."""

    text: str
    num_tokens: Count
    loss_nats: float
    perplexity: float | None = None
    bits_per_byte: float | None = None
    ece: float | None = None
    tokens_per_s: float | None = None
    intervals: dict[str, Interval] = {}


class CacheFigures(Part):
    """A model against a cache's teacher."""

    cache: str
    temperature: FiniteFloat
    num_tokens: Count
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


class Difference(Part):
    """How much more a model has than the first one, on the same tokens."""

    to: str
    loss_nats: float | None = None
    accuracy: float | None = None
    intervals: dict[str, Interval] = {}


class CorpusFigures(Part):
    """A model on a corpus by a stated protocol."""

    corpus: str
    source: str | None = None
    protocol: str | None = None
    mode: str | None = None
    window_tokens: Count | None = None
    stride: Count | None = None
    num_tokens: Count | None = None
    num_words: Count | None = None
    num_examples: Count | None = None
    num_units: Count | None = None
    loss_nats: float | None = None
    perplexity: float | None = None
    word_perplexity: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None
    intervals: dict[str, Interval] = {}
    interval_unit: str | None = None
    sampled: Any = None
    difference: Difference | None = None


class SpeedFigures(Part):
    """How fast a model generates."""

    prompt_tokens: Count | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    first_token_s: float | None = None
    token_s: float | None = None
    peak_bytes: Count | None = None


class SampleText(Part):
    """A text that a model went on with."""

    prompt: str
    text: str


class ModelFigures(Part):
    """All that was measured of one model."""

    name: str
    parameters: Count | None = None
    dtype: str | None = None
    device: str | None = None
    file_bytes: Count | None = None
    texts: tuple[TextFigures, ...] = ()
    cache: CacheFigures | None = None
    corpora: tuple[CorpusFigures, ...] = ()
    speed: SpeedFigures | None = None
    samples: tuple[SampleText, ...] = ()


class Evaluation(Part):
    """What ``kdpipe evaluate`` says."""

    models: tuple[ModelFigures, ...] = Field(min_length=1)
    bootstrap: Any = None


class FamilyStudent(Part):
    """One student of a family."""

    name: str
    control_of: str | None = None
    status: str
    error: str | None = None
    parameters: Count | None = None
    training_tokens: Count | None = None
    training_hours: float | None = None
    evaluation: ModelFigures | None = None
    speed: SpeedFigures | None = None


class Family(Part):
    """What ``family.json`` says."""

    format: str = Field(pattern="^kdpipe-family$")
    cache: str
    students: tuple[FamilyStudent, ...]


class Assumption(Part):
    """What a plan takes as given."""

    name: str
    value: Any
    unit: str | None = None
    source: str | None = None


class PlannedCache(Part):
    """The cache that was planned."""

    tokens: FiniteFloat
    tokens_certainty: str | None = None
    bytes: float | None = None
    bytes_by_array: dict[str, float] = {}
    bytes_by_table: dict[str, float] = {}
    """Of what is stored once."""


class PlannedCapture(Part):
    """The capture that was planned."""

    hours: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: float | None = None


class Hours(Part):
    """Of another way to train the same student."""

    hours: float | None = None


class PlannedStudent(Part):
    """A student that was planned."""

    name: str
    parameters: Count | None = None
    epochs: float | None = None
    tokens: float | None = None
    """Seen in all epochs."""
    hours_per_epoch: float | None = None
    hours: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: float | None = None
    online: Hours | None = None
    cross_entropy: Hours | None = None


class CurvePoint(Part):
    """So many students, by several ways."""

    students: FiniteFloat
    ways: dict[str, dict[str, Any]]


class HoursPoint(CurvePoint):
    """What so many students could learn in some hours."""

    hours: FiniteFloat


class Plan(Part):
    """What ``kdpipe plan --json`` says."""

    assumptions: tuple[Assumption, ...] = ()
    calibrated: bool = False
    device: Any = None
    num_devices: Count | None = None
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


class RunStudent(Part):
    """What kind of student it is; what more there is, is shown as it is."""

    model_config = ConfigDict(extra="allow")

    num_parameters: Count | None = None


class Run(Part):
    """What ``run.json`` says."""

    fingerprint: str | None = None
    settings: dict[str, Any] = {}
    config: dict[str, Any] = {}
    student: RunStudent = RunStudent()
    versions: dict[str, Any] = {}
    total_steps: Count | None = None


class Result(Part):
    """What ``result.json`` says."""

    stopped_by: str | None = None
    steps: Count | None = None
    tokens: Count | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    parameters: Count | None = None
    evaluation: dict[str, Any] | None = None


class Position(Part):
    """How far a checkpoint is."""

    tokens: Count | None = None
    seconds: float | None = None


class CheckpointState(Part):
    """What the ``state.json`` of a checkpoint says."""

    position: Position = Position()


Kind = TypeVar("Kind", bound=Part)


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
        raise BadInputError(error_kind, path, expected=expected, found=first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """Where a file's object is wrong, and how."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
