"""The page of an export: what the files hold, how they are opened, and what they do not hold.

In: settings, and the cache that was exported. Out: ``README.md`` with the front matter of a dataset's page.
"""

from __future__ import annotations

from cache_spec.encodings.hidden import Hidden
from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.sampled import Sampled
from cache_spec.encodings.sparsified import Sparsified
from cache_spec.reader import CacheReader
from pipeline.card import plain_name
from pipeline.interop.arrays_out import MEANING, shard_arrays
from pipeline.interop.config import ExportConfig
from pipeline.interop.decoded import kept_tokens

_PARQUET_FRONT = """configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
"""

_CARD = """---
pretty_name: {title}
tags:
- knowledge-distillation
- teacher-logits
- kdpipe
{front}---

# {title}

Exported from a kdpipe cache; `manifest.json` is that cache's, `export.json` lists the files with their SHA-256.

| | |
|---|---|
| teacher | {teacher}, vocabulary {vocab_size:,} |
| text | {num_documents:,} documents, {num_tokens:,} tokens in {num_blocks:,} blocks of at most {block_tokens:,} |
| cache | {encoding}, fingerprint {fingerprint} |
| size | {num_bytes:,} bytes, {bytes_per_token:.2f} bytes a token |

{body}
## What is lost

{lost}
## Licence

None is given here. The targets come from the teacher, and the token ids are the text itself: the licences of both
apply, and what they say of derived works.
"""

_ROWS = """## Rows

A row is a block of the cache: the text that the teacher read at once, without padding. Lists have an entry for each
token.

| column | meaning |
|---|---|
| input_ids | token ids |
| attention_mask | 1 |
| labels | input_ids, not shifted |
"""

_TOP_K = """| target_token_ids | the {k} most probable tokens after token j, most probable first |
| target_logprobs | their log-probabilities at temperature {temperature:g}, {sums} |
| target_mask | 1; 0 at a row's last token, whose next one is not in the row |
"""

_TAILS = "| log_tail_mass_tX | log of the probability of all other tokens at temperature X |\n"

_POINTS = """| point_token_ids | tokens drawn after token j, each once |
| point_probs | their probabilities at temperature {temperature:g}, which sum to one and are right on average |

These are no top-k: a loss that renormalises the student over them is wrong. Use cross-entropy against them.
"""

_USE = """
    datasets.load_dataset("parquet", data_files="data/*.parquet")
"""

_ARRAYS = """## Files

`shards/*.safetensors` hold the blocks in order{tables}. N blocks, T tokens, M temperatures ({temperatures}).

| array | meaning |
|---|---|
{rows}"""


def export_card(config: ExportConfig, reader: CacheReader, num_bytes: int) -> str:
    """The text of the page, for files of ``num_bytes``."""
    manifest = reader.manifest
    teacher, corpus, blocks = manifest.teacher, manifest.corpus, manifest.blocks
    return _CARD.format(
        title=f"What {plain_name(teacher.name)} says",
        front=_PARQUET_FRONT if config.to == "parquet" else "viewer: false\n",
        teacher=plain_name(teacher.name) + (f" at {plain_name(teacher.revision)}" if teacher.revision else ""),
        vocab_size=teacher.vocab_size,
        num_documents=corpus.num_documents,
        num_tokens=corpus.num_tokens,
        num_blocks=blocks.num_blocks,
        block_tokens=blocks.block_tokens,
        encoding=manifest.encoding.name,
        fingerprint=manifest.fingerprint,
        num_bytes=num_bytes,
        bytes_per_token=num_bytes / corpus.num_tokens,
        body=_parquet_body(config, reader) if config.to == "parquet" else _arrays_body(reader),
        lost="".join(f"- {line}\n" for line in lost(config, reader)) or "Nothing.\n",
    )


def lost(config: ExportConfig, reader: CacheReader) -> list[str]:
    """What the cache tells and the export does not, a sentence each."""
    encoding, manifest = reader.manifest.encoding, reader.manifest
    lines = []
    if config.dtype == "float16":
        lines.append("Log-probabilities are rounded to float16: 11 significant bits.")
    if config.to == "safetensors":
        return lines
    if isinstance(encoding, Sampled | Sparsified):
        lines.append(f"Every temperature but {config.temperature:g}.")
    else:
        if config.logprobs == "renormalised" and not config.tail:
            lines.append("The mass outside the kept tokens: values sum to one without it (--tail keeps it).")
        if not config.tail or encoding.any_temperature:
            lines.append(
                f"Every temperature but {config.temperature:g}: truncated values cannot be brought to another."
            )
        if isinstance(encoding, Prototype):
            lines.append("The shared distributions that the cache spreads the tail by, and draws from what they leave.")
        if isinstance(encoding, Hidden):
            lines.append("The distribution outside the kept tokens, which the cache's hidden states tell exactly.")
    if manifest.hidden is not None:
        lines.append("Pooled hidden states.")
    if manifest.imported is None:
        lines.append("The teacher's loss and entropy of each block.")
    return lines


def _parquet_body(config: ExportConfig, reader: CacheReader) -> str:
    if isinstance(reader.manifest.encoding, Sampled | Sparsified):
        return _ROWS + _POINTS.format(temperature=config.temperature) + _USE
    k = kept_tokens(reader, config.k)
    sums = (
        "renormalised: they sum to one, as axolotl's KD plugin takes them with this kd_temperature"
        if config.logprobs == "renormalised"
        else "of the whole vocabulary: what their sum is short of one is the mass of all others"
    )
    rows = _TOP_K.format(k=k, temperature=config.temperature, sums=sums)
    return _ROWS + rows + (_TAILS if config.tail else "") + _USE


def _arrays_body(reader: CacheReader) -> str:
    names = {*shard_arrays(reader, [0], "float32"), *reader.manifest.tables}
    rows = "".join(f"| {name} | {meaning} |\n" for name, meaning in MEANING.items() if name in names)
    return _ARRAYS.format(
        tables=", `tables.safetensors` what is there once" if reader.manifest.tables else "",
        temperatures=", ".join(f"{t:g}" for t in reader.manifest.temperatures),
        rows=rows,
    )
