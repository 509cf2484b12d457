"""Settings of how targets are kept: the flags that capture and transcoding share, and the record that follows.

In: values from flags and recipes. Out: an encoding's record for the manifest, or the setting that it does not use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cache_spec.encodings import ENCODINGS, Encoding
from cache_spec.encodings.topk import DEFAULT_ODDS_STEP_NATS
from cache_spec.errors import BadInputError

if TYPE_CHECKING:
    from cache_spec.reader import CacheReader

EncodingName = Literal["topk", "prototype", "sampled", "sparsified", "hidden"]
DEFAULT_ENCODING: EncodingName = "prototype"
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 100.0

# Where a flag is not named as the field of the encoding's record that it sets.
_FIELDS = {"last_hidden_dtype": "dtype"}
# What a table that is taken from another cache was learnt with.
_OF_PROTOTYPES = ("prototypes", "calibration_tokens")


class EncodingConfig(BaseModel):
    """What to keep of the teacher's distributions and hidden states."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    HEADINGS: ClassVar = {"encoding": "What is kept"}

    encoding: EncodingName = DEFAULT_ENCODING
    """How targets are kept: topk (head and tail mass), prototype (topk, and the tail as one of a few shared
    distributions), sampled (draws with counts), sparsified (a fixed number of tokens, unbiased), hidden (last hidden
    states and the output head: exact at any temperature)."""
    k: int = Field(default=16, ge=1)
    """Tokens kept for each position, of topk, prototype and sparsified."""
    levels: int | None = Field(default=None, ge=2, lt=1 << 16)
    """Levels that square roots of kept probabilities are rounded to, of topk and prototype (default 128) and
    sparsified (default 4096)."""
    odds_step_nats: float = Field(default=DEFAULT_ODDS_STEP_NATS, gt=0, le=1)
    """Step that the tail's log odds are rounded to, of topk and prototype."""
    prototypes: int = Field(default=256, ge=1, le=1 << 16)
    """Shared tail distributions, of prototype."""
    residual_draws: int = Field(default=0, ge=0, lt=1 << 15, multiple_of=2)
    """Signed draws for each position that take a prototype's error away on average; 0 for none."""
    calibration_tokens: int = Field(default=65_536, ge=1)
    """Tokens of a random sample of blocks that prototypes are learnt from, at most."""
    prototypes_from: Path | None = None
    """Cache of the same teacher and k to take prototypes from, instead of learning them."""
    draws: int = Field(default=50, ge=1, lt=1 << 16)
    """Draws for each position and temperature, of sampled."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of calibration and draws, of prototype, sampled and sparsified."""
    last_hidden_dtype: Literal["float16", "int8"] = "float16"
    """Type of each token's hidden state, of hidden."""

    @field_validator("*", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        # An empty variable of a shell: as a path it would mean the current folder.
        if any(
            isinstance(part, str) and not part.strip()
            for part in (value if isinstance(value, list | tuple) else [value])
        ):
            raise ValueError("is empty")
        return value

    @field_validator("prototypes_from", "out", "cache", mode="after", check_fields=False)
    @classmethod
    def _at_home(cls, path: Path | None) -> Path | None:
        try:
            return path and path.expanduser()
        except RuntimeError:
            assert path is not None
            raise ValueError(f"no home folder for {path.parts[0]}") from None

    @field_validator("out", "teacher", "cache", "prototypes_from", mode="before", check_fields=False)
    @classmethod
    def _utf8(cls, value: Any) -> Any:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ValueError("is not UTF-8, which the libraries that open it need") from None
        return value

    @field_validator("temperatures", mode="after", check_fields=False)
    @classmethod
    def _temperature_grid(cls, temperatures: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if temperatures is None:
            return None
        if not temperatures or list(temperatures) != sorted(set(temperatures)):
            raise ValueError("temperatures must be distinct and ascending, at least one")
        if not all(LOWEST_TEMPERATURE <= t <= HIGHEST_TEMPERATURE for t in temperatures):
            raise ValueError(f"temperatures must be from {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}")
        return temperatures

    @model_validator(mode="after")
    def _all_used(self) -> Self:
        if self.encoding in ENCODINGS:
            refuse_unused(self.encoding, self.model_fields_set)
        return self

    @classmethod
    def superseded(cls, flags: Iterable[str], values: Mapping[str, Any]) -> set[str]:
        """Keys of a recipe that mean nothing once a flag has chosen another encoding than the recipe's."""
        name = values.get("encoding", DEFAULT_ENCODING)
        return set(_parameters()) - used_settings(name) if "encoding" in flags and name in ENCODINGS else set()


def used_settings(encoding: str) -> set[str]:
    """Names of the settings that an encoding uses."""
    fields = ENCODINGS[encoding].model_fields
    used = {name for name in _parameters() if _FIELDS.get(name, name) in fields}
    return used | {"prototypes_from"} if encoding == "prototype" else used


def refuse_unused(encoding: str, given: Iterable[str]) -> None:
    """ValueError for a setting that was given and that the encoding does not use."""
    given = set(given)
    if unused := sorted((set(_parameters()) - used_settings(encoding)) & given):
        raise ValueError(f"{unused[0]} means nothing to encoding {encoding}")
    if "prototypes_from" in given and (overruled := sorted(given & {"calibration_tokens"})):
        raise ValueError(f"{overruled[0]} means nothing with prototypes_from")


def encoding_record(
    config: EncodingConfig,
    name: str,
    *,
    inherited: Encoding | None = None,
    prototypes: CacheReader | None = None,
    **teachers: Any,
) -> Encoding:
    """The manifest's record of encoding ``name``: what was given, else ``inherited`` parameters, else the defaults.

    ``prototypes`` is the cache whose prototypes are taken over; ``teachers`` are parameters that follow from the
    teacher. Raises BadInputError ``bad-encoding``, ``other-prototypes``.
    """
    fields = ENCODINGS[name].model_fields
    values: dict[str, Any] = {field: value for field, value in teachers.items() if field in fields}
    for setting in used_settings(name) - {"prototypes_from"}:
        field = _FIELDS.get(setting, setting)
        given = setting in config.model_fields_set
        # Fields of one name mean one thing, but for the dtype, which is only handed on within one encoding.
        shared = inherited is not None and hasattr(inherited, field)
        values[field] = getattr(config, setting) if given or not shared else getattr(inherited, field)
        if values[field] is None:  # the record has its own default
            del values[field]
            continue
        if prototypes is not None and field in _OF_PROTOTYPES:
            theirs = getattr(prototypes.manifest.encoding, field)
            if given and values[field] != theirs:
                raise BadInputError(
                    "other-prototypes", f"{setting} {values[field]}", expected=f"{theirs}, as in prototypes_from"
                )
            values[field] = theirs
    try:
        return ENCODINGS[name].model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or name
        raise BadInputError("bad-encoding", where, found=first["msg"].removeprefix("Value error, ")) from None


def _parameters() -> list[str]:
    """Names of all settings that some encodings use and others do not."""
    return [name for name in EncodingConfig.model_fields if name != "encoding"]
