"""The registry of target encodings: what the manifest may name, and which arrays and meaning each has.

A new encoding is a file here, with a record that has the same methods as these, and a file in ``pipeline.encoders``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.encodings.topk import TopK

Encoding = Annotated[TopK | Prototype | Sampled | Sparsified | Hidden, Field(discriminator="name")]
ENCODINGS: dict[str, type[TopK | Prototype | Sampled | Sparsified | Hidden]] = {
    "topk": TopK,
    "prototype": Prototype,
    "sampled": Sampled,
    "sparsified": Sparsified,
    "hidden": Hidden,
}
