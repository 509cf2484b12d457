"""``kdpipe transcode``: a cache from a richer one, without the teacher, shard by shard as a capture would write it.

In: a finished cache and settings. Out: another cache of the same blocks. From encoding ``hidden`` everything can be
made, by the encoders that a capture runs; from the others, what is a part of them. Anything else is refused.

Legend of axes: B blocks, T tokens, D teacher width, W windows, K kept in the old head, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cache_spec.commit import commit_shard
from cache_spec.encodings import Encoding
from cache_spec.encodings.hidden import Hidden, encode_int8
from cache_spec.encodings.prototype import Prototype, encode_ranks, encode_residual, token_order
from cache_spec.encodings.topk import EMPTY_TAIL, Head, TopK, encode_gaps, encode_odds
from cache_spec.errors import BadInputError, WouldLoseDataError
from cache_spec.imported import refuse_import
from cache_spec.manifest import HiddenInfo, Manifest, differences
from cache_spec.masking import REPLACEMENTS, SELECTED
from cache_spec.reader import CacheReader
from cache_spec.tables import draft_digests
from cache_spec.targets import Array, Geometry, HeadTargets, HiddenTargets
from pipeline import folder
from pipeline.config import TranscodeConfig
from pipeline.encoders.spectrum import Encoder
from pipeline.encoding_config import encoding_record, refuse_unused
from pipeline.masking import Masks, kept_first
from pipeline.shard import batches, encode_hidden, encoder_of, joined, padded, pooled_arrays
from pipeline.source import TRANSCODED_FROM, TRANSCODED_STATES, provenance
from pipeline.tables import at_temperatures, make_tables, open_prototypes, refuse_other_prototypes
from pipeline.targets import pool_hidden
from pipeline.teacher import OutputHead, States, pick_device

logger = logging.getLogger("kdpipe")

_FROM_HIDDEN = "a cache of encoding hidden"


def transcode(config: TranscodeConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Make, or finish, the cache that ``config`` describes; returns its summary.

    Raises BadInputError ``cannot-transcode`` where the old cache does not hold enough, and WouldLoseDataError if the
    folder holds another cache or one that is being written.
    """
    work, out = Transcoding(config), config.out
    with folder.exclusive(out) as existing:
        if existing is not None:
            _refuse_differences(existing, work.manifest, out)
            folder.restore(out, existing, work.files)
            if folder.is_finished(out, existing):
                logger.info("%s is finished already: %d blocks", out, existing.blocks.num_blocks)
                folder.drop_staging(out)
                return folder.summary(out, existing, captured=0)
            folder.restore_tables(out, existing, lambda: work.tables(quiet))
        manifest = existing or folder.create(out, work.manifest, work.files(), work.tables(quiet))
        todo, blocks = folder.reopen(out, manifest), manifest.blocks
        tables = folder.read_tables(out, manifest)
        total = blocks.num_blocks * blocks.block_tokens
        left = sum(blocks.shard_range(shard)[1] for shard in todo) * blocks.block_tokens
        with tqdm(
            total=total, initial=total - left, unit="tok", unit_scale=True, desc="transcode", disable=quiet or None
        ) as bar:
            for shard in todo:
                parts = []
                for first, count in batches(manifest, shard):
                    parts.append(work.arrays(range(first, first + count), tables))
                    bar.update(count * blocks.block_tokens)
                commit_shard(out, manifest, shard, joined(parts))
        folder.seal(out, manifest)
        return folder.summary(out, manifest, captured=len(todo))


class Transcoding:
    """A cache, and what another one made of it holds."""

    def __init__(self, config: TranscodeConfig) -> None:
        self.reader = CacheReader.open(config.cache)
        self.source = self.reader.manifest
        self.prototypes = open_prototypes(config.prototypes_from) if config.prototypes_from else None
        self.manifest = _manifest(config, self.source, self.prototypes)
        self.device = pick_device(config.device)
        self._encoder: Encoder | None = None

    @property
    def learns(self) -> bool:
        """Whether prototypes have to be learnt first."""
        given = self.prototypes is not None or isinstance(self.source.encoding, Prototype)
        return isinstance(self.manifest.encoding, Prototype) and not given

    def files(self) -> dict[str, bytes]:
        """The old cache's small files that are not about its arrays."""
        names = [name for name in self.source.files if Path(name).name != "zarr.json"]
        return {name: (self.reader.path / name).read_bytes() for name in names}

    def tables(self, quiet: bool) -> dict[str, Array]:
        """What the new cache stores once; prototypes that are not there yet are learnt."""
        if type(self.manifest.encoding) is type(self.source.encoding):
            return at_temperatures(self.reader, self.manifest.temperatures)
        if not self.manifest.tables:
            return {}
        with tqdm(unit="tok", unit_scale=True, desc="calibration", disable=quiet or None) as bar:

            def hidden_of(blocks: Sequence[int]) -> tuple[torch.Tensor, Array]:
                hidden_BTD = torch.from_numpy(self.hidden(blocks)).to(self.device)
                bar.update(hidden_BTD.shape[0] * hidden_BTD.shape[1])
                masked = self.reader.masked(blocks)
                if masked is None:
                    return hidden_BTD, self.reader.lengths(blocks)
                return kept_first(hidden_BTD, masked.kept_BT)

            return make_tables(self.manifest, self.head, hidden_of, self.prototypes)

    def arrays(self, blocks: Sequence[int], tables: dict[str, Array]) -> dict[str, Array]:
        """Every array of at most one batch of blocks."""
        pooled = self.manifest.hidden
        ids_BT, lengths_B = self.reader.read("input_ids", blocks), self.reader.lengths(blocks)
        from_hidden = isinstance(self.source.encoding, Hidden) and not isinstance(self.manifest.encoding, Hidden)
        if from_hidden:
            if self._encoder is None:
                self._encoder = encoder_of(self.manifest, tables, self.device)
            hidden_BTD = padded(self.hidden(blocks), self.manifest.batch_blocks)
            states_BTD = torch.from_numpy(hidden_BTD).to(self.device)
            arrays = encode_hidden(
                self.manifest,
                self.head,
                self._encoder,
                States(states_BTD, states_BTD),
                ids_BT,
                lengths_B,
                blocks[0],
                self.masks(blocks),
            )
        else:
            arrays = {**self._kept(blocks, tables), "input_ids": ids_BT, "block_lengths": lengths_B}
            if pooled is not None and not _widens(self.source.hidden, pooled):
                lengths = torch.from_numpy(lengths_B.astype(np.int64))
                pooled_BWD = pool_hidden(torch.from_numpy(self.hidden(blocks)), lengths, pooled.window)
                arrays |= pooled_arrays(pooled, pooled_BWD.numpy())
        if pooled is not None and _widens(self.source.hidden, pooled):
            arrays |= self._pooled(blocks, lengths_B, pooled)
        # What the teacher read, and said of it, does not depend on what is kept of it.
        same = [name for name in ("block_loss", "block_entropy", SELECTED, REPLACEMENTS) if name in self.reader.specs]
        return arrays | {name: self.reader.read(name, blocks) for name in same}

    def masks(self, blocks: Sequence[int]) -> Masks | None:
        """How the old cache's blocks were masked, if they were."""
        if self.source.masking is None:
            return None
        return Masks(self.reader.read(SELECTED, blocks), self.reader.read(REPLACEMENTS, blocks))

    def hidden(self, blocks: Sequence[int]) -> Array:
        """float32 [B, T, D]: the old cache's last hidden states."""
        targets = self.reader.batch(blocks, self.source.temperatures[0], with_hidden=False).targets
        assert isinstance(targets, HiddenTargets)
        return targets.hidden_BTD.astype(np.float32)

    @cached_property
    def head(self) -> OutputHead:
        """The teacher's output head, from the old cache."""
        weight_VD, bias_V = self.reader.output_head()
        return OutputHead(
            weight_VD=torch.from_numpy(weight_VD).to(self.device),
            bias_V=None if bias_V is None else torch.from_numpy(bias_V).to(self.device),
        )

    def _kept(self, blocks: Sequence[int], tables: dict[str, Array]) -> dict[str, Array]:
        """The target arrays, from the old ones."""
        old, new = self.source.encoding, self.manifest.encoding
        stored = {part.name: self.reader.read(part.name, blocks) for part in old.arrays(self.source.geometry)}
        if isinstance(old, Hidden) and isinstance(new, Hidden) and old.dtype != new.dtype:
            states = old.decode(stored, self.source.geometry, 0, self.reader.place)
            codes_BTD, scale_BT = encode_int8(states.hidden_BTD.astype(np.float32))
            return {"last_hidden": codes_BTD, "last_hidden_scale": scale_BT}
        if isinstance(old, Head) and isinstance(new, Head) and (old != new or isinstance(new, Prototype)):
            return self._head_arrays(old, new, stored, tables)
        at = self._temperatures_at
        for part in old.arrays(self.source.geometry):
            if "temperature" in part.dims:
                stored[part.name] = np.ascontiguousarray(stored[part.name].take(at, 1 + part.dims.index("temperature")))
        return stored

    def _head_arrays(
        self, old: Head, new: Head, stored: dict[str, Array], tables: dict[str, Array]
    ) -> dict[str, Array]:
        """A smaller or coarser head: what it loses goes to the tail at every temperature."""
        g, at = self.source.geometry, self._temperatures_at
        decoded: list[HeadTargets] = [old.decode(stored, g, i, self.reader.place, self.reader.prepared) for i in at]
        ids_BTK, logprobs_BTK = decoded[0].ids_BTK[..., : new.k], decoded[0].logprobs_BTK
        odds = [_smaller_head(d, new.k, t) for d, t in zip(decoded, self.manifest.temperatures, strict=True)]
        arrays = {
            "head_gaps": encode_gaps(logprobs_BTK[..., : new.k], new.levels),
            "tail_log_odds": encode_odds(np.stack(odds, 1), new.odds_step_nats),
        }
        if not isinstance(new, Prototype):
            return {**arrays, "head_ids": np.ascontiguousarray(ids_BTK.astype(g.id_dtype))}
        rows_BT = stored["tail_prototype"]
        arrays["tail_prototype"] = rows_BT
        # Ranks are places in the order at the first temperature, which may be another one now.
        order_CV = token_order(tables["prototypes"])
        arrays["head_ranks"] = encode_ranks(ids_BTK, rows_BT, order_CV)
        if new.residual_draws:
            masses_BMT = np.ascontiguousarray(stored["residual_log_mass"][:, at])
            draws = [d.residual_ids_BTS for d in decoded if d.residual_ids_BTS is not None]
            ranks_BTMS = np.stack([encode_ranks(ids_BTS, rows_BT, order_CV) for ids_BTS in draws], 2)
            arrays["residual_log_mass"] = masses_BMT
            arrays["residual_ranks"] = encode_residual(ranks_BTMS, masses_BMT.swapaxes(1, 2) != EMPTY_TAIL)
        return arrays

    @cached_property
    def _temperatures_at(self) -> list[int]:
        """Places of the new cache's temperatures among the old one's."""
        if self.source.encoding.any_temperature:
            return []
        return [self.source.temperatures.index(t) for t in self.manifest.temperatures]

    def _pooled(self, blocks: Sequence[int], lengths_B: Array, info: HiddenInfo) -> dict[str, Array]:
        """Pooled hidden states over windows that the old ones fill: means, weighted by real tokens."""
        old = self.source.hidden
        assert old is not None
        if old == info:
            names = ("hidden",) if info.dtype == "float16" else ("hidden", "hidden_scale")
            return {name: self.reader.read(name, blocks) for name in names}
        hidden_BWD = self.reader.read("hidden", blocks).astype(np.float32)
        if old.dtype == "int8":
            hidden_BWD *= self.reader.read("hidden_scale", blocks)[:, None]
        starts_W = np.arange(hidden_BWD.shape[1]) * old.window
        counts_BW = (lengths_B.astype(np.int64)[:, None] - starts_W).clip(0, old.window)
        wide = (len(hidden_BWD), -1, info.window // old.window)
        sums_BWD = (hidden_BWD * counts_BW[..., None]).reshape(*wide, hidden_BWD.shape[2]).sum(2)
        means_BWD = sums_BWD / counts_BW.reshape(wide).sum(2).clip(1)[..., None]
        return pooled_arrays(info, means_BWD.astype(np.float32))


def _smaller_head(targets: HeadTargets, k: int, temperature: float) -> Array:
    """Log odds of the tail [B, T] once only the first k tokens of the head are left in it."""
    if k == targets.ids_BTK.shape[-1]:
        return targets.tail_log_odds_BT
    scaled_BTK = targets.logprobs_BTK.astype(np.float64) / temperature
    powers_BTK = np.exp(scaled_BTK - scaled_BTK[..., :1])
    kept_BT, dropped_BT = powers_BTK[..., :k].sum(-1), powers_BTK[..., k:].sum(-1)
    # m' = m + (1 - m) * dropped, and 1 - m' = (1 - m) * kept, where dropped + kept = 1.
    with np.errstate(divide="ignore"):
        log_dropped_BT = np.log(dropped_BT) - np.log(kept_BT + dropped_BT)
        log_kept_BT = np.log(kept_BT) - np.log(kept_BT + dropped_BT)
        odds_BT: Array = np.logaddexp(targets.tail_log_odds_BT.astype(np.float64), log_dropped_BT) - log_kept_BT
    return odds_BT


def _manifest(config: TranscodeConfig, source: Manifest, prototypes: CacheReader | None) -> Manifest:
    """The manifest of the new cache but for its files and tables; BadInputError for what the old one cannot give."""
    old, name = source.encoding, config.encoding or source.encoding.name
    temperatures = config.temperatures or source.temperatures
    try:
        refuse_unused(name, config.model_fields_set)
    except ValueError as error:
        raise BadInputError("unused-setting", config.cache, found=error) from None
    for temperature in temperatures:
        if not old.any_temperature and temperature not in source.temperatures:
            known = ", ".join(f"{t:g}" for t in source.temperatures)
            raise _refusal(config.cache, f"temperature {temperature:g}", f"one of {known}, or {_FROM_HIDDEN}")
    head = {"head_dtype": old.head_dtype, "bias": old.bias} if isinstance(old, Hidden) else {}
    record = encoding_record(config, name, inherited=old, prototypes=prototypes, **head)
    needed = _needed(old, record)
    if needed or (prototypes is not None and not isinstance(old, Hidden)):
        raise _refusal(config.cache, f"{old.name} to {name}", needed or _FROM_HIDDEN)
    if isinstance(record, Prototype) and prototypes is not None:
        refuse_other_prototypes(prototypes, source.teacher, record, temperatures)
    if source.imported is not None and source.imported.logprobs == "renormalised" and record != old:
        # A smaller head would leave a mass outside it that is not the teacher's.
        refuse_import(source.imported, f"{config.cache}: {old.name} to {name}", "log-probabilities of all tokens")
    geometry = source.geometry._replace(temperatures=temperatures)
    if reason := record.refuse(geometry):
        raise BadInputError("bad-encoding", f"encoding {name}", found=reason)
    states = old.dtype if isinstance(old, Hidden) else source.provenance.get(TRANSCODED_STATES)
    made_from = {TRANSCODED_FROM: source.fingerprint} | ({TRANSCODED_STATES: states} if states else {})
    return Manifest(
        **{
            **dict(source),
            "encoding": record,
            "temperatures": temperatures,
            "hidden": _hidden_info(config, source, geometry),
            "tables": draft_digests(record.tables(geometry)),
            "files": {},
            "provenance": provenance() | made_from,
        }
    )


def _needed(old: Encoding, new: Encoding) -> str | None:
    """What a cache of ``new`` would have to be made from, where ``old`` is not enough."""
    if isinstance(old, Hidden):
        less = isinstance(new, Hidden) and (old.dtype, new.dtype) == ("int8", "float16")
        return f"{_FROM_HIDDEN} in float16" if less else None
    if isinstance(old, Head) and isinstance(new, Head):
        if new.k > old.k:
            return f"a head of at least {new.k} tokens, or {_FROM_HIDDEN}"
        if new.levels > old.levels:
            return f"at least {new.levels} levels, or {_FROM_HIDDEN}"
        if new.odds_step_nats < old.odds_step_nats:
            return f"odds_step_nats of at most {new.odds_step_nats:g}, or {_FROM_HIDDEN}"
        if isinstance(new, TopK):
            return None
        # Prototypes are those of one k: another head leaves another tail.
        free = {"levels", "odds_step_nats"} | ({"residual_draws"} if new.residual_draws == 0 else set())
        same = type(old) is type(new) and old.model_dump(exclude=free) == new.model_dump(exclude=free)
        return None if same else _FROM_HIDDEN
    return None if old == new else _FROM_HIDDEN


def _hidden_info(config: TranscodeConfig, source: Manifest, geometry: Geometry) -> HiddenInfo | None:
    """How the new cache pools hidden states; BadInputError where the old one does not hold them so fine."""
    old = source.hidden
    window = (old.window if old else 0) if config.hidden_window is None else config.hidden_window
    if not window:
        if config.hidden_dtype is not None:
            found = "hidden_dtype means nothing without hidden_window"
            raise BadInputError("unused-setting", config.cache, found=found)
        return None
    if geometry.block_tokens % window:
        expected = f"a divisor of {geometry.block_tokens} tokens"
        raise BadInputError("bad-window", f"hidden window {window}", expected=expected)
    info = HiddenInfo(window=window, dtype=config.hidden_dtype or (old.dtype if old else "float16"))
    # What a masked language model's output head reads is not its last hidden state.
    if not _widens(old, info) and not (isinstance(source.encoding, Hidden) and source.masking is None):
        needed = f"hidden states of a window that divides {window}, in {info.dtype} or finer"
        needed += f", or {_FROM_HIDDEN}" if source.masking is None else ""
        raise _refusal(config.cache, f"hidden states of window {window} in {info.dtype}", needed)
    return info


def _widens(old: HiddenInfo | None, new: HiddenInfo) -> bool:
    """Whether pooled hidden states can be made of the old ones."""
    return old is not None and new.window % old.window == 0 and (old.dtype, new.dtype) != ("int8", "float16")


def _refusal(cache: Path | str, what: str, needed: str) -> BadInputError:
    hint = "or run cache-teacher with the teacher"
    return BadInputError("cannot-transcode", f"{cache}: {what}", expected=needed, hint=hint)


def _refuse_differences(existing: Manifest, wanted: Manifest, out: Path) -> None:
    """Refuse to go on in a cache that is not of these settings, or not made from this one."""
    found = differences(existing, wanted.model_copy(update={"tables": existing.tables}))
    made_from = [manifest.provenance.get(TRANSCODED_FROM, "a teacher")[:16] for manifest in (existing, wanted)]
    if made_from[0] != made_from[1]:
        found.append(f"{TRANSCODED_FROM}: {made_from[0]}, now {made_from[1]}")
    if found:
        hint = "choose another --out, or the old settings"
        raise WouldLoseDataError("other-settings", out, found="; ".join(found), hint=hint)
