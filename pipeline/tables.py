"""What an encoding stores once for a whole cache: learnt from a sample of blocks, or taken from the teacher or a cache.

In: a cache's manifest to be, the teacher's output head, and hidden states of sampled blocks. Out: its tables by name.

Legend of axes: B blocks, T tokens, D teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.errors import BadInputError
from cache_spec.manifest import Manifest, TeacherInfo
from cache_spec.reader import CacheReader
from cache_spec.targets import Array
from pipeline import calibrate
from pipeline.encoders.hidden import head_dtype, head_tables
from pipeline.teacher import OutputHead

HiddenOf = Callable[[Sequence[int]], tuple[torch.Tensor, Array]]
"""Last hidden states [B, T, D] and lengths [B] of at most one batch of blocks."""


def open_prototypes(cache: Path) -> CacheReader:
    """A finished cache of encoding ``prototype``, to take prototypes from."""
    reader = CacheReader.open(cache)
    if not isinstance(reader.manifest.encoding, Prototype):
        found = f"encoding {reader.manifest.encoding.name}"
        raise BadInputError("other-prototypes", cache, expected="a cache of encoding prototype", found=found)
    return reader


def refuse_other_prototypes(
    reader: CacheReader, teacher: TeacherInfo, encoding: Prototype, temperatures: tuple[float, ...]
) -> None:
    """BadInputError ``other-prototypes`` unless its prototypes are those of this teacher, k and temperatures."""
    theirs, place = reader.manifest, f"prototypes of {reader.path}"
    if theirs.teacher.weights_sha256 != teacher.weights_sha256:
        expected, found = str(teacher.weights_sha256)[:16], str(theirs.teacher.weights_sha256)[:16]
        raise BadInputError("other-prototypes", place, expected=f"teacher {expected}", found=found)
    assert isinstance(theirs.encoding, Prototype)
    if theirs.encoding.k != encoding.k:
        raise BadInputError("other-prototypes", place, expected=f"k {encoding.k}", found=theirs.encoding.k)
    if missing := set(temperatures) - set(theirs.temperatures):
        raise BadInputError("other-prototypes", place, expected=f"prototypes at temperature {min(missing):g}")


def settled(encoding: Encoding, head: OutputHead) -> Encoding:
    """The encoding with what follows from the teacher's weights."""
    if not isinstance(encoding, Hidden):
        return encoding
    return encoding.model_copy(update={"head_dtype": head_dtype(head), "bias": head.bias_V is not None})


def make_tables(
    manifest: Manifest, head: OutputHead, hidden_of: HiddenOf, prototypes: CacheReader | None
) -> dict[str, Array]:
    """The tables of a cache to be: the same from the same teacher, blocks and settings on the same machine."""
    if isinstance(manifest.encoding, Hidden):
        return head_tables(head)
    if not isinstance(manifest.encoding, Prototype):
        return {}
    if prototypes is not None:
        return at_temperatures(prototypes, manifest.temperatures)
    sample = _sample(manifest, manifest.encoding)

    def batches() -> Iterator[tuple[torch.Tensor, Array]]:
        size = manifest.batch_blocks
        for first in range(0, len(sample), size):
            yield hidden_of(sample[first : first + size])

    return calibrate.calibrate(manifest.encoding, manifest.geometry, head, batches())


def at_temperatures(reader: CacheReader, temperatures: tuple[float, ...]) -> dict[str, Array]:
    """The tables of a cache at some of its temperatures."""
    tables = {}
    for part in reader.manifest.encoding.tables(reader.manifest.geometry):
        values = reader.table(part.name)
        if "temperature" in part.dims:
            at = [reader.manifest.temperatures.index(t) for t in temperatures]
            values = np.ascontiguousarray(values.take(at, part.dims.index("temperature")))
        tables[part.name] = values
    return tables


def _sample(manifest: Manifest, encoding: Prototype) -> list[int]:
    """Blocks to learn prototypes from, ascending: drawn without replacement, one at least."""
    blocks = manifest.blocks
    block_rows = blocks.block_tokens
    if manifest.masking is not None and manifest.masking.positions == "masked":
        block_rows = max(1, int(manifest.masking.num_selected(np.array([block_rows]))[0]))
    count = min(blocks.num_blocks, max(1, encoding.calibration_tokens // block_rows))
    chosen: list[int] = np.random.default_rng(encoding.seed).permutation(blocks.num_blocks)[:count].tolist()
    return sorted(chosen)
