"""The manifest: what a cache is made of, and the fingerprint of everything that changes its bytes.

In: facts about the teacher, the text and the settings. Out: one immutable model, its canonical JSON and its
fingerprint. Two captures with equal fingerprints may share shards; with different ones they may not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from cache_spec.encodings import Encoding
from cache_spec.errors import BadInputError, CacheError
from cache_spec.imported import TEMPERATURE, UNKNOWN_OF_TEACHER, ImportedInfo, refuse_import
from cache_spec.masking import MIN_BLOCK_TOKENS, MaskingInfo
from cache_spec.record import Record
from cache_spec.targets import Geometry

FORMAT = "kdpipe-cache"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"

# A teacher is its weights, wherever they lie; small files may differ between library versions; neither changes arrays.
_NOT_CONTENT: dict[str, Any] = {"files": True, "provenance": True, "teacher": {"name", "revision"}}
_MAX_JSON_PARTS = 1 << 17
MAX_TEMPERATURES = 1000
Sha256 = Field(pattern=r"^[0-9a-f]{64}$")


def canonical_json(value: object) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8, a final newline."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def sha256_hex(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class TeacherInfo(Record):
    """Which model the targets come from."""

    name: str
    """Hub name or folder name, as the user gave it."""
    revision: str | None
    """Commit of the hub repository; None for a local folder."""
    model_type: str | None
    """Architecture family of the Hugging Face configuration, such as ``gpt2``; None only of imported targets."""
    weights_sha256: Annotated[str, Sha256] | None
    """Digest of the weight files; this and what follows of the model is None of imported targets, else never."""
    vocab_size: int = Field(ge=1)
    """V: the real vocabulary; padded rows of the output head are cut off."""
    padded_vocab_size: int = Field(ge=1)
    """Rows of the output head; at least V."""
    hidden_size: int | None = Field(ge=1)
    """D: width of the last hidden state."""
    num_layers: int | None = Field(ge=1)
    num_parameters: int | None = Field(ge=1)
    max_positions: int | None = Field(ge=1)
    """Longest block the teacher can read; None where it has no limit."""

    @property
    def width(self) -> int:
        """D, or 0 where it is not known, and no hidden states are kept."""
        return self.hidden_size or 0


class TokenizerInfo(Record):
    """Which tokenizer turned text into ids."""

    sha256: str = Sha256
    """Digest of vocabulary, merges and special tokens."""
    eos_token_id: int = Field(ge=0)
    """The token that ends each document."""


class SourceInfo(Record):
    """One file or data set of the corpus."""

    name: str
    num_bytes: int = Field(ge=0)
    sha256: str = Sha256


class CorpusInfo(Record):
    """The text, by its sources and by the tokens that came of it."""

    sources: tuple[SourceInfo, ...]
    text_field: str
    num_documents: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    """Real tokens in the blocks, document ends included."""
    tokens_sha256: str = Sha256
    """Digest of every id of every block as little-endian uint32."""


class BlocksInfo(Record):
    """How tokens are cut into blocks and blocks into shards."""

    num_blocks: int = Field(ge=1)
    """N"""
    block_tokens: int = Field(ge=2)
    """T"""
    shard_blocks: int = Field(ge=1)
    """S: blocks in a shard; the last shard may hold fewer."""
    last_block: Literal["drop", "keep", "each"]
    """What was done with partial blocks: the last one dropped or kept, or each document's last one kept."""
    limit_tokens: int | None = Field(ge=1)
    """The corpus was cut after this many tokens; None if all of it was taken."""

    @property
    def num_shards(self) -> int:
        return -(-self.num_blocks // self.shard_blocks)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First block and number of blocks of a shard."""
        first = shard * self.shard_blocks
        return first, min(self.shard_blocks, self.num_blocks - first)


class HiddenInfo(Record):
    """How last hidden states are pooled."""

    window: int = Field(ge=1)
    """w: tokens averaged into one stored vector; 1 keeps each."""
    dtype: Literal["float16", "int8"]
    """float16, or int8 with one scale for each dimension of a block."""


class ComputeInfo(Record):
    """How the teacher ran, as far as it changes low bits of the result."""

    device_type: str
    dtype: str
    batch_blocks: int = Field(ge=1)
    compiled: bool = False
    """Whether torch.compile made its kernels; absent where it did not."""

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body: dict[str, Any] = handler(self)
        if not self.compiled:
            body.pop("compiled", None)
        return body


class Manifest(Record):
    """Everything about a cache but its arrays."""

    format: Literal["kdpipe-cache"] = "kdpipe-cache"
    format_version: Literal[2] = 2
    teacher: TeacherInfo
    tokenizer: TokenizerInfo
    corpus: CorpusInfo
    blocks: BlocksInfo
    encoding: Encoding
    temperatures: tuple[float, ...] = Field(max_length=MAX_TEMPERATURES)
    hidden: HiddenInfo | None
    masking: MaskingInfo | None = None
    """Of a masked language model; absent where the teacher predicts the next token."""
    imported: ImportedInfo | None = None
    """Of targets that came as log-probabilities from elsewhere; absent where a teacher ran for the cache."""
    compute: ComputeInfo | None
    """None of imported targets, else never."""
    tables: dict[str, Annotated[str, Sha256]]
    """Name to SHA-256 of the values of each array that the encoding stores once: little-endian, in C order."""
    files: dict[str, str]
    """Path to SHA-256 of each small file beside the shards: array metadata, tokenizer, teacher configuration."""
    provenance: dict[str, str]
    """Versions, hardware and time: recorded, but not part of the fingerprint."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        teacher, blocks = self.teacher, self.blocks
        if teacher.padded_vocab_size < teacher.vocab_size:
            raise ValueError("padded_vocab_size is below vocab_size")
        if reason := self.encoding.refuse(self.geometry):
            raise ValueError(f"encoding: {reason}")
        if self.tokenizer.eos_token_id >= teacher.vocab_size:
            raise ValueError("eos_token_id is outside the vocabulary")
        if not self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            raise ValueError("temperatures must be ascending, distinct and at least one")
        if not all(0 < t < float("inf") for t in self.temperatures):
            raise ValueError("temperatures must be positive and finite")
        if self.hidden is not None and blocks.block_tokens % self.hidden.window:
            raise ValueError("hidden.window does not divide block_tokens")
        if self.corpus.num_tokens > blocks.num_blocks * blocks.block_tokens:
            raise ValueError("corpus.num_tokens is above what the blocks hold")
        if set(self.tables) != {table.name for table in self.encoding.tables(self.geometry)}:
            raise ValueError("tables are not those of the encoding")
        if self.masking is not None:
            if blocks.block_tokens < MIN_BLOCK_TOKENS:
                raise ValueError("block_tokens leave no room between the tokens that frame a block")
            if self.masking.special_ids[-1] >= teacher.vocab_size:
                raise ValueError("special_ids are outside the vocabulary")
        self._check_origin()
        return self

    def _check_origin(self) -> None:
        """What is known of a teacher that ran for the cache, and what cannot be known of imported targets."""
        unknown = [name for name in UNKNOWN_OF_TEACHER if getattr(self.teacher, name) is None]
        unknown += ["compute"] if self.compute is None else []
        if self.imported is None:
            if unknown or self.teacher.model_type is None:
                raise ValueError(f"{[*unknown, 'model_type'][0]} is null, but nothing is imported")
            return
        if len(unknown) <= len(UNKNOWN_OF_TEACHER):
            raise ValueError("imported: weights, sizes and compute of the teacher are not known")
        if self.encoding.name != "topk" or self.hidden is not None or self.masking is not None:
            raise ValueError("imported: there is a head for each next token, and nothing else")
        if self.temperatures != (TEMPERATURE,):
            raise ValueError("imported: without a normaliser there is no temperature but 1")

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body: dict[str, Any] = handler(self)
        for name in ("masking", "imported"):
            if getattr(self, name) is None:
                body.pop(name, None)
        return body

    @property
    def geometry(self) -> Geometry:
        """What the encoding's shapes follow from."""
        return Geometry(self.blocks.block_tokens, self.temperatures, self.teacher.vocab_size, self.teacher.width)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that changes the cache's bytes."""
        return sha256_hex(canonical_json(self.model_dump(mode="json", exclude=_NOT_CONTENT)))

    @property
    def run(self) -> ComputeInfo:
        """How the teacher ran; BadInputError ``imported-cache`` where none ran for the cache."""
        if self.compute is None:
            refuse_import(self.imported, f"cache {self.fingerprint[:16]}", "targets that a teacher was run for")
        assert self.compute is not None
        return self.compute

    @property
    def batch_blocks(self) -> int:
        """Blocks that are made together."""
        return self.compute.batch_blocks if self.compute else 1

    @property
    def num_windows(self) -> int:
        """W: pooled vectors in a block; 0 where no hidden state is kept."""
        return self.blocks.block_tokens // self.hidden.window if self.hidden else 0

    def temperature_index(self, temperature: float) -> int:
        """Position of ``temperature`` in the declared grid; refuses any other, unless the encoding serves all (0)."""
        if self.encoding.any_temperature and 0 < temperature < float("inf"):
            return 0
        if temperature not in self.temperatures:
            raise BadInputError(
                "undeclared-temperature",
                f"temperature {temperature:g}",
                expected="one of " + ", ".join(f"{t:g}" for t in self.temperatures),
                hint="capture again with this temperature in --temperatures",
            )
        return self.temperatures.index(temperature)

    def to_json(self) -> bytes:
        """Canonical bytes of ``manifest.json``; ``digest`` guards them all, ``fingerprint`` names the cache."""
        body: dict[str, object] = self.model_dump(mode="json")
        body["fingerprint"] = self.fingerprint
        return seal_json(body)

    @classmethod
    def from_json(cls, data: bytes, place: object) -> Manifest:
        """Read ``manifest.json`` strictly: known version, exact bytes, known fields, plausible values."""
        body = load_sealed(data, place)
        fingerprint = body.pop("fingerprint", None)
        version = body.get("format_version")
        if body.get("format") != FORMAT:
            raise CacheError("not-a-cache", place, expected=f"format {FORMAT}", found=body.get("format"))
        if type(version) is not int or version != FORMAT_VERSION:
            raise CacheError("unknown-version", place, expected=f"format_version {FORMAT_VERSION}", found=version)
        try:
            manifest = cls.model_validate_json(json.dumps(body))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CacheError("bad-manifest", f"{place}: {where or 'manifest'}", found=first["msg"]) from None
        if fingerprint != manifest.fingerprint:
            raise CacheError("fingerprint-mismatch", place, expected=manifest.fingerprint, found=fingerprint)
        if manifest.to_json() != data:
            raise CacheError("bad-manifest", place, expected="numbers in their canonical form")
        return manifest


def seal_json(body: Mapping[str, object]) -> bytes:
    """Canonical JSON of ``body`` with a ``digest`` over the rest of it."""
    return canonical_json({**body, "digest": sha256_hex(canonical_json(dict(body)))})


def load_sealed(data: bytes, place: object) -> dict[str, Any]:
    """The object of a sealed JSON file, without its digest; any changed byte is refused."""
    if sum(map(data.count, (b"[", b"{", b","))) > _MAX_JSON_PARTS:
        # Each takes many times its own bytes of memory once it is parsed.
        raise CacheError("broken-json", place, expected=f"at most {_MAX_JSON_PARTS} values")
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or "digest" not in body:
            raise CacheError("broken-json", place, expected="an object with a digest")
        same_bytes = data == canonical_json(body)
        digest = body.pop("digest")
        found = sha256_hex(canonical_json(body))
    except (ValueError, RecursionError) as error:
        # Python also parses what JSON does not have, or what has no canonical form: NaN, half characters, 1e400.
        raise CacheError("broken-json", place, found=str(error)) from None
    if digest != found or not same_bytes:
        raise CacheError("digest-mismatch", place, expected=digest, found=found)
    return body


def differences(old: Manifest, new: Manifest) -> list[str]:
    """Readable ``setting: old, now new`` lines for all that differs between two fingerprints."""

    def flat(value: object, prefix: str = "") -> dict[str, object]:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
        return {prefix[:-1]: value}

    left, right = (flat(m.model_dump(mode="json", exclude=_NOT_CONTENT)) for m in (old, new))
    return [f"{key}: {left.get(key)}, now {right.get(key)}" for key in left | right if left.get(key) != right.get(key)]
