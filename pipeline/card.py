"""The card of a pushed cache: what a dataset's page on the Hub says of it.

In: a cache's manifest and size. Out: ``README.md``.
"""

from __future__ import annotations

from cache_spec.manifest import Manifest
from pipeline.inspect import describe_encoding

_CARD = """---
pretty_name: {title}
tags:
- knowledge-distillation
- teacher-logits
- kdpipe
viewer: false
---

# {title}

What a teacher language model says about each token of a text, for students to be trained from without it. It was made
by kdpipe, and is a kdpipe cache: `manifest.json` says everything about it.

| | |
|---|---|
| teacher | {teacher}: {sizes}vocabulary {vocab_size:,} |
| teacher's weights | {weights} |
| text | {sources} |
| size of the text | {num_documents:,} documents, {num_tokens:,} tokens in {num_blocks:,} blocks of {block_tokens:,} |
| targets | {encoding}; temperatures {temperatures} |
| size | {num_bytes:,} bytes, {bytes_per_token:.2f} bytes a token |
| fingerprint | {fingerprint} |

## Licence

None is given here. The targets come from the teacher, and the token ids are the text itself: the licences of both
apply, and what they say of derived works. Add `license:` to this page when that is settled.

## Use

    kdpipe pull {url} my-cache
    kdpipe train-student --cache my-cache ...

Files lie in plain zip archives (`packs/`), and `packs.json` says where: any zip program unpacks them side by side into
the folder that the cache was.
"""


def dataset_card(manifest: Manifest, num_bytes: int, url: str) -> str:
    """The text of a card, for a cache of ``num_bytes`` that is pulled from ``url``."""
    teacher, corpus, blocks = manifest.teacher, manifest.corpus, manifest.blocks
    names = [plain_name(source.name) for source in corpus.sources[:8]]
    rest = len(corpus.sources) - len(names)
    known = [] if teacher.model_type is None else [teacher.model_type]
    known += [] if teacher.num_parameters is None else [f"{teacher.num_parameters:,} parameters"]
    return _CARD.format(
        title=f"What {plain_name(teacher.name)} says",
        teacher=plain_name(teacher.name) + (f" at {plain_name(teacher.revision)}" if teacher.revision else ""),
        sizes="".join(f"{plain_name(part)}, " for part in known),
        vocab_size=teacher.vocab_size,
        weights="not known" if teacher.weights_sha256 is None else f"SHA-256 {teacher.weights_sha256}",
        sources=", ".join(names) + (f" and {rest:,} more" if rest else ""),
        num_documents=corpus.num_documents,
        num_tokens=corpus.num_tokens,
        num_blocks=blocks.num_blocks,
        block_tokens=blocks.block_tokens,
        encoding=describe_encoding(manifest.encoding.model_dump(mode="json")),
        temperatures=", ".join(f"{t:g}" for t in manifest.temperatures),
        num_bytes=num_bytes,
        bytes_per_token=num_bytes / corpus.num_tokens,
        fingerprint=manifest.fingerprint,
        url=url,
    )


def plain_name(text: str) -> str:
    """A name without what would end a table's cell, and without the folders above a local one."""
    name = text.rstrip("/").split("/")[-1] if text.startswith(("/", "~", ".")) else text
    return "".join(" " if char in '|\n\r`:"<>#' else char for char in name).strip() or "unnamed"
