"""The registry of encoders: how each encoding of ``cache_spec.encodings`` is made from a teacher's distributions.

In: an encoding's record, the geometry and its tables. Out: an ``Encoder``. A new encoding is one file here and one in
``cache_spec.encodings``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cache_spec.targets import Array, Geometry
from pipeline.encoders.hidden import HiddenEncoder
from pipeline.encoders.prototype import PrototypeEncoder
from pipeline.encoders.sampled import SampledEncoder
from pipeline.encoders.sparsified import SparsifiedEncoder
from pipeline.encoders.spectrum import Encoder
from pipeline.encoders.topk import TopKEncoder

ENCODERS: dict[str, Any] = {
    "topk": TopKEncoder,
    "sampled": SampledEncoder,
    "sparsified": SparsifiedEncoder,
    "prototype": PrototypeEncoder,
    "hidden": HiddenEncoder,
}


def make_encoder(
    encoding: Any, geometry: Geometry, *, tables: Mapping[str, Array] | None = None, device: torch.device | None = None
) -> Encoder:
    """The encoder of a record; ``tables`` are the cache's, as stored, for encodings that are made with them."""
    encoder: Encoder = ENCODERS[encoding.name](
        encoding, geometry, {} if tables is None else tables, device or torch.device("cpu")
    )
    return encoder
