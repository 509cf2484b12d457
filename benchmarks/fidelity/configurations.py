"""What is compared: named ways to keep targets, each as the flags of ``kdpipe transcode`` that make it.

In: nothing. Out: ``Configuration`` records, of which several may share a cache and differ in how its tail is treated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from cache_spec.errors import BadInputError
from cache_spec.targets import Tail

TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to keep targets, and to use them."""

    name: str
    flags: tuple[str, ...]
    """Of ``kdpipe transcode``, but for places and temperatures."""
    tail: Tail | None = None
    """What training does with the mass outside a head; None: the best that the cache has."""
    temperatures: tuple[float, ...] = TEMPERATURES
    """The grid of the cache: its bytes are for all of them."""
    trains: bool = False
    """Whether students are trained from it where nothing else is asked for."""

    @property
    def encoding(self) -> str:
        """Name of the encoding."""
        return self.flags[1]

    @property
    def cache_name(self) -> str:
        """The same for all configurations that share a cache."""
        key = " ".join([*self.flags, *map(str, self.temperatures)])
        return f"{self.encoding}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _topk(k: int, tail: Tail, *, trains: bool = False) -> Configuration:
    flags = ("--encoding", "topk", "--k", str(k))
    return Configuration(name=f"topk {k}, {tail}", flags=flags, tail=tail, trains=trains)


def _sampled(draws: int, temperatures: tuple[float, ...] = TEMPERATURES, *, trains: bool = False) -> Configuration:
    flags = ("--encoding", "sampled", "--draws", str(draws))
    only = "" if len(temperatures) > 1 else f", T = {temperatures[0]:g} only"
    return Configuration(name=f"sampled {draws}{only}", flags=flags, temperatures=temperatures, trains=trains)


def _sparsified(k: int, *, trains: bool = False) -> Configuration:
    return Configuration(name=f"sparsified {k}", flags=("--encoding", "sparsified", "--k", str(k)), trains=trains)


def _prototype(
    k: int, prototypes: int, *, draws: int = 0, levels: int | None = None, trains: bool = False
) -> Configuration:
    flags: tuple[str, ...] = ("--encoding", "prototype", "--k", str(k), "--prototypes", str(prototypes))
    name = f"prototype {k}, C = {prototypes}"
    if draws:
        flags, name = (*flags, "--residual-draws", str(draws)), f"{name}, S = {draws}"
    if levels is not None:
        flags, name = (*flags, "--levels", str(levels)), f"{name}, {levels} levels"
    return Configuration(name=name, flags=flags, trains=trains)


ALL = (
    _topk(16, "renormalise", trains=True),
    _topk(64, "renormalise"),
    _topk(16, "bucket", trains=True),
    _topk(32, "bucket"),
    _topk(32, "uniform"),
    _topk(32, "gold"),
    _sampled(25),
    _sampled(50, trains=True),
    _sampled(50, (1.0,)),
    _sampled(200),
    _sparsified(16),
    _sparsified(32, trains=True),
    _prototype(7, 256, trains=True),
    _prototype(16, 64),
    _prototype(16, 256, trains=True),
    _prototype(16, 1024),
    _prototype(24, 256),
    _prototype(32, 64),
    _prototype(32, 256),
    _prototype(32, 1024),
    _prototype(7, 256, draws=4, trains=True),
    _prototype(16, 256, draws=16),
    Configuration(name="hidden int8", flags=("--encoding", "hidden", "--last-hidden-dtype", "int8")),
)
QUICK = (
    "topk 16, renormalise",
    "topk 16, bucket",
    "sampled 50",
    "sparsified 32",
    "prototype 16, C = 64",
)
"""What ``--quick`` measures."""
QUICK_STUDENTS = ("prototype 16, C = 64",)
"""What its students learn from."""


def chosen(patterns: Iterable[str], among: Iterable[Configuration] = ALL) -> list[Configuration]:
    """The configurations whose names match any pattern, in their order; BadInputError for a pattern of none."""
    among, patterns = list(among), list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in among):
            names = "; ".join(one.name for one in among)
            raise BadInputError("unknown-configuration", pattern, expected=f"a pattern of one of: {names}")
    return [one for one in among if any(fnmatchcase(one.name, pattern) for pattern in patterns)]
