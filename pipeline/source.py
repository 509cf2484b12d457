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

from cache_spec.errors import BadInputError, CacheError, WouldLoseDataError
from cache_spec.layout import array_specs
from cache_spec.manifest import (
    BlocksInfo,
    ComputeInfo,
    CorpusInfo,
    EncodingInfo,
    HiddenInfo,
    Manifest,
    TeacherInfo,
    TokenizerInfo,
    differences,
)
from cache_spec.topk import DEFAULT_STEP_NATS
from pipeline.blocks import StagedBlocks
from pipeline.config import CaptureConfig
from pipeline.corpus import Corpus, resolve
from pipeline.teacher import pick_device, pick_dtype
from pipeline.teacher_files import TeacherFiles, check_block_tokens, describe_teacher, resolve_teacher


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything a capture starts from, before any text is tokenised."""

    config: CaptureConfig
    files: TeacherFiles
    teacher: TeacherInfo
    tokenizer: TokenizerInfo
    corpus: Corpus
    compute: ComputeInfo


def resolve_source(config: CaptureConfig) -> Source:
    """Find and check teacher and text; nothing is written and no weights are loaded."""
    files = resolve_teacher(config.teacher, revision=config.revision, gguf_file=config.gguf_file)
    teacher, tokenizer = describe_teacher(files)
    check_block_tokens(teacher, config.block_tokens)
    if config.k > teacher.vocab_size:
        raise BadInputError("k-too-large", f"k {config.k}", expected=f"at most the vocabulary of {teacher.vocab_size}")
    device = pick_device(config.device)
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    source = Source(
        config=config,
        files=files,
        teacher=teacher,
        tokenizer=tokenizer,
        corpus=resolve(config.text, text_field=config.text_field, split=config.split),
        compute=ComputeInfo(device_type=device.type, dtype=dtype, batch_blocks=config.batch_blocks),
    )
    try:
        array_specs(draft_manifest(source, num_blocks=config.shard_blocks))
    except CacheError as error:
        hint = "give a smaller --shard-blocks, --block-tokens or --k"
        raise BadInputError(
            "chunk-too-large", error.place, expected=error.expected, found=error.found, hint=hint
        ) from None
    return source


def refuse_differences(existing: Manifest, source: Source) -> None:
    """Refuse to go on in a cache made with settings that would change its bytes."""
    # The text is not tokenised yet: equal sources and settings give equal tokens, so the old counts stand in.
    corpus = existing.corpus.model_copy(update={"sources": source.corpus.sources})
    wanted = existing.model_copy(update=_content(source, corpus, existing.blocks.num_blocks))
    found = differences(existing, wanted)
    if found:
        raise WouldLoseDataError(
            "other-settings",
            source.config.out,
            found="; ".join(found),
            hint="choose another --out, or the old settings",
        )


def _content(source: Source, corpus: CorpusInfo, num_blocks: int) -> dict[str, Any]:
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
        "encoding": EncodingInfo(name="topk", k=config.k, step_nats=DEFAULT_STEP_NATS),
        "temperatures": config.temperatures,
        "hidden": HiddenInfo(window=config.hidden_window) if config.hidden_window else None,
        "compute": source.compute,
    }


def _manifest(source: Source, corpus: CorpusInfo, num_blocks: int) -> Manifest:
    libraries = ("kdpipe", "torch", "transformers", "tokenizers", "zarr", "numcodecs")
    provenance = {
        **{name: version(name) for name in libraries},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return Manifest(**_content(source, corpus, num_blocks), files={}, provenance=provenance)


def draft_manifest(source: Source, *, num_blocks: int) -> Manifest:
    """A manifest for ``num_blocks`` full blocks of text that is not tokenised: right in everything but the corpus."""
    num_tokens = num_blocks * source.config.block_tokens
    corpus = CorpusInfo(
        sources=(), text_field=source.config.text_field, num_documents=1, num_tokens=num_tokens, tokens_sha256="0" * 64
    )
    return _manifest(source, corpus, num_blocks)


def staged_manifest(source: Source, staged: StagedBlocks) -> Manifest:
    corpus = CorpusInfo(
        sources=source.corpus.sources,
        text_field=source.config.text_field,
        num_documents=staged.num_documents,
        num_tokens=staged.num_tokens,
        tokens_sha256=staged.tokens_sha256,
    )
    return _manifest(source, corpus, staged.num_blocks)
