"""What a capture starts from, teacher and text and settings, and the manifest that follows from it.

In: capture settings. Out: a checked ``Source``, and manifests: of a cache to be, of one that is planned, and the
refusal of one that was made from something else.
"""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.errors import BadInputError, CacheError, WouldLoseDataError
from cache_spec.layout import array_specs
from cache_spec.manifest import (
    BlocksInfo,
    ComputeInfo,
    CorpusInfo,
    HiddenInfo,
    Manifest,
    TeacherInfo,
    TokenizerInfo,
    differences,
)
from cache_spec.masking import MIN_BLOCK_TOKENS, MaskingInfo
from cache_spec.reader import CacheReader
from cache_spec.tables import draft_digests
from cache_spec.targets import Geometry
from pipeline.blocks import StagedBlocks
from pipeline.config import CaptureConfig
from pipeline.corpus import Corpus, resolve
from pipeline.encoding_config import encoding_record
from pipeline.tables import open_prototypes, refuse_other_prototypes
from pipeline.teacher import pick_device, pick_dtype
from pipeline.teacher_files import (
    TeacherFiles,
    check_block_tokens,
    describe_teacher,
    load_config,
    load_tokenizer,
    resolve_teacher,
)
from pipeline.teacher_kind import is_masked_lm, masking_tokens

TRANSCODED_FROM = "transcoded_from"
"""In a manifest's provenance: fingerprint of the cache that it was made from without a teacher."""
TRANSCODED_STATES = "transcoded_states"
"""In a manifest's provenance: type of the hidden states that its targets were made from."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything a capture starts from, before any text is tokenised."""

    config: CaptureConfig
    files: TeacherFiles
    teacher: TeacherInfo
    tokenizer: TokenizerInfo
    corpus: Corpus
    compute: ComputeInfo
    encoding: Encoding
    """What follows from the teacher's weights (the type of a stored output head) is still open."""
    prototypes: CacheReader | None
    """Cache whose prototypes are taken over."""
    masking: MaskingInfo | None
    """How blocks are masked, for a teacher that finds out masked tokens."""


def resolve_source(config: CaptureConfig) -> Source:
    """Find and check teacher and text; nothing is written and no weights are loaded."""
    files = resolve_teacher(config.teacher, revision=config.revision, gguf_file=config.gguf_file)
    teacher, tokenizer = describe_teacher(files)
    check_block_tokens(teacher, config.block_tokens)
    masking = _masking(config, files)
    device = pick_device(config.device)
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    prototypes = open_prototypes(config.prototypes_from) if config.prototypes_from else None
    record = encoding_record(config, config.encoding, prototypes=prototypes)
    if prototypes is not None:
        assert isinstance(record, Prototype)
        refuse_other_prototypes(prototypes, teacher, record, config.temperatures)
    geometry = Geometry(config.block_tokens, config.temperatures, teacher.vocab_size, teacher.width)
    if reason := record.refuse(geometry):
        raise BadInputError("bad-encoding", f"encoding {config.encoding}", found=reason)
    corpus = resolve(config.text, text_field=config.text_field, split=config.split)
    corpus.refuse_other_tokenizer(tokenizer.sha256)
    source = Source(
        config=config,
        files=files,
        teacher=teacher,
        tokenizer=tokenizer,
        corpus=corpus,
        compute=ComputeInfo(
            device_type=device.type, dtype=dtype, batch_blocks=config.batch_blocks, compiled=config.compile
        ),
        encoding=record,
        prototypes=prototypes,
        masking=masking,
    )
    try:
        array_specs(draft_manifest(source, num_blocks=config.shard_blocks))
    except CacheError as error:
        hint = "give a smaller --shard-blocks or --block-tokens, or keep less for each token"
        raise BadInputError(
            "chunk-too-large", error.place, expected=error.expected, found=error.found, hint=hint
        ) from None
    return source


def _masking(config: CaptureConfig, files: TeacherFiles) -> MaskingInfo | None:
    """How blocks are masked; BadInputError ``unused-setting`` where nothing is, ``block-too-short``."""
    place = f"teacher {files.name}"
    if not is_masked_lm(load_config(files)):
        for name in sorted(config.model_fields_set):
            if name.startswith("mask_"):
                found = f"{name}, which means nothing to a model that predicts the next token"
                raise BadInputError("unused-setting", place, found=found)
        return None
    if config.block_tokens < MIN_BLOCK_TOKENS:
        expected = f"at least {MIN_BLOCK_TOKENS} tokens, as two of them frame a block"
        raise BadInputError("block-too-short", f"blocks for {place}", expected=expected, found=config.block_tokens)
    tokens = masking_tokens(load_tokenizer(files), place)
    return MaskingInfo(
        probability=config.mask_probability,
        mask_share=max(0.0, 1.0 - config.mask_keep - config.mask_random),
        keep_share=config.mask_keep,
        random_share=config.mask_random,
        smoothing=config.mask_smoothing,
        seed=config.mask_seed,
        positions=config.mask_positions,
        mask_token_id=tokens.mask,
        cls_token_id=tokens.cls,
        sep_token_id=tokens.sep,
        special_ids=tokens.special,
    )


def refuse_differences(existing: Manifest, source: Source) -> None:
    """Refuse to go on in a cache made with settings that would change its bytes."""
    # The text is not tokenised yet: equal sources and settings give equal tokens, so the old counts stand in.
    corpus = existing.corpus.model_copy(update={"sources": source.corpus.sources})
    encoding = as_settled(source.encoding, existing.encoding)
    wanted = existing.model_copy(update=_content(source, corpus, existing.blocks.num_blocks, encoding))
    found = differences(existing, wanted)
    if TRANSCODED_FROM in existing.provenance:
        found.append(f"{TRANSCODED_FROM}: {existing.provenance[TRANSCODED_FROM][:16]}, now a teacher")
    if found:
        raise WouldLoseDataError(
            "other-settings",
            source.config.out,
            found="; ".join(found),
            hint="choose another --out, or the old settings",
        )


def as_settled(encoding: Encoding, existing: Encoding) -> Encoding:
    """``encoding`` with what follows from the teacher's weights taken from a cache of the same teacher."""
    if not (isinstance(encoding, Hidden) and isinstance(existing, Hidden)):
        return encoding
    return encoding.model_copy(update={"head_dtype": existing.head_dtype, "bias": existing.bias})


def _content(source: Source, corpus: CorpusInfo, num_blocks: int, encoding: Encoding) -> dict[str, Any]:
    """The parts of a manifest that its fingerprint covers."""
    config = source.config
    return {
        "teacher": source.teacher,
        "tokenizer": source.tokenizer,
        "corpus": corpus.model_copy(update={"text_field": config.text_field}),
        "blocks": BlocksInfo(
            num_blocks=num_blocks,
            block_tokens=config.block_tokens,
            shard_blocks=config.shard_blocks,
            last_block=config.last_block,
            limit_tokens=config.limit_tokens,
        ),
        "encoding": encoding,
        "temperatures": config.temperatures,
        "hidden": HiddenInfo(window=config.hidden_window, dtype=config.hidden_dtype) if config.hidden_window else None,
        "masking": source.masking,
        "compute": source.compute,
    }


def provenance() -> dict[str, str]:
    """Versions, machine and time."""
    libraries = ("kdpipe", "torch", "transformers", "tokenizers", "zarr", "numcodecs")
    return {
        **{name: version(name) for name in libraries},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def draft_manifest(source: Source, *, num_blocks: int) -> Manifest:
    """A manifest for ``num_blocks`` full blocks of text that is not tokenised: right in everything but the corpus."""
    num_tokens = num_blocks * source.config.block_tokens
    corpus = CorpusInfo(
        sources=(), text_field=source.config.text_field, num_documents=1, num_tokens=num_tokens, tokens_sha256="0" * 64
    )
    return _manifest(source, corpus, num_blocks, source.encoding)


def staged_manifest(source: Source, staged: StagedBlocks, encoding: Encoding) -> Manifest:
    """The manifest of a cache of these blocks; its tables are still to be made."""
    corpus = CorpusInfo(
        sources=source.corpus.sources,
        text_field=source.config.text_field,
        num_documents=staged.num_documents,
        num_tokens=staged.num_tokens,
        tokens_sha256=staged.tokens_sha256,
    )
    return _manifest(source, corpus, staged.num_blocks, encoding)


def _manifest(source: Source, corpus: CorpusInfo, num_blocks: int, encoding: Encoding) -> Manifest:
    config = source.config
    geometry = Geometry(config.block_tokens, config.temperatures, source.teacher.vocab_size, source.teacher.width)
    return Manifest(
        **_content(source, corpus, num_blocks, encoding),
        tables=draft_digests(encoding.tables(geometry)),
        files={},
        provenance=provenance(),
    )
