"""What a cache's teacher says, as targets of the head loss: stored tensors of a batch come in, one of three forms out.

Tables that a cache holds once (shared tail distributions, the teacher's output head) live here, beside the student.

Legend: B batch, T time, N rows (B x T), V vocabulary, C prototypes, D teacher width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cache_spec.encodings.prototype import Prototype
from cache_spec.encodings.topk import LEAST_LEVEL, Head
from cache_spec.errors import BadInputError
from cache_spec.manifest import Manifest
from cache_spec.reader import CacheReader
from cache_spec.targets import Tail
from train.distil_batch import HeadTensors, PointTensors, StoredTensors, from_numpy
from train.loss_divergences import FORWARD_KL, Divergence, DivergenceKind
from train.loss_targets import (
    DenseTargets,
    HeadLossTargets,
    HeadRows,
    SharedTails,
    bucket,
    gold,
    points,
    renormalised,
    shared_tails,
    spread,
    uniform_tail,
)


class TeacherTargets(nn.Module):
    """Turns stored targets into those of the loss, at one temperature and with one treatment of the tail.

    A module, so that its tables move with the student; they are no parameters and in no checkpoint.

    Args:
        temperature: of the loss.
        vocab_size: V, the teacher's real vocabulary.
        tail: what becomes of the mass outside a head; None where the cache has no heads.
        divergence: of the loss.
        prototypes_CV: the shared tail distributions at the temperature, for ``tail="prototype"``.
        output_head: the teacher's weight [V, D] and bias [V] or None, for hidden states.
    """

    def __init__(
        self,
        *,
        temperature: float,
        vocab_size: int,
        tail: Tail | None,
        divergence: Divergence = FORWARD_KL,
        prototypes_CV: Tensor | None = None,
        output_head: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.vocab_size, self.tail = temperature, vocab_size, tail
        self.divergence = divergence
        tails = uniform_tail(vocab_size) if tail == "uniform" else None
        if prototypes_CV is not None:
            tails = shared_tails(prototypes_CV)
        self.tails_CV: Tensor | None
        self.tail_nats_C: Tensor | None
        self.head_weight_VD: Tensor | None
        self.head_bias_V: Tensor | None
        tables = {
            "tails_CV": None if tails is None else tails.probs_CV,
            "tail_nats_C": None if tails is None else tails.self_nats_C,
            "head_weight_VD": None if output_head is None else output_head[0],
            "head_bias_V": None if output_head is None else output_head[1],
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    @classmethod
    def of_cache(
        cls, reader: CacheReader, *, temperature: float, tail: Tail | None, divergence: Divergence = FORWARD_KL
    ) -> TeacherTargets:
        """Load what the cache holds for this temperature; a ``tail`` of None is the best that the cache has.

        Raises BadInputError for a temperature, tail or divergence that it does not serve.
        """
        manifest = reader.manifest
        manifest.temperature_index(temperature)
        tail = pick_tail(tail, manifest)
        divergence.check()
        check_divergence(divergence.kind, tail, manifest)
        head: tuple[Tensor, Tensor | None] | None = None
        if "output_head" in manifest.tables:
            weight_VD, bias_V = reader.output_head()
            head = from_numpy(weight_VD), None if bias_V is None else from_numpy(bias_V)
        return cls(
            temperature=temperature,
            vocab_size=manifest.teacher.vocab_size,
            tail=tail,
            divergence=divergence,
            prototypes_CV=from_numpy(reader.prototypes(temperature)) if tail == "prototype" else None,
            output_head=head,
        )

    def forward(self, stored: StoredTensors, labels_N: Tensor) -> HeadLossTargets:
        """Targets of the N = B x T rows; labels matter where the tail goes to the gold token."""
        # Probabilities are made in full precision whatever the student computes in.
        with torch.autocast(device_type=labels_N.device.type, enabled=False):
            if isinstance(stored, PointTensors):
                return points(stored.ids_BTJ.flatten(0, 1).long(), stored.probs_BTJ.flatten(0, 1))
            if isinstance(stored, HeadTensors):
                return self._of_head(stored, labels_N)
            assert self.head_weight_VD is not None
            return DenseTargets(
                hidden_ND=stored.hidden_BTD.flatten(0, 1), weight_VD=self.head_weight_VD, bias_V=self.head_bias_V
            )

    def _of_head(self, stored: HeadTensors, labels_N: Tensor) -> HeadLossTargets:
        head = HeadRows(
            stored.ids_BTK.flatten(0, 1).long(), stored.logprobs_BTK.flatten(0, 1), stored.tail_log_odds_BT.flatten()
        )
        if self.tail == "bucket":
            if self.divergence.kind != "forward":
                # Such tokens are not that unlikely, only not worth a level: they belong to the others.
                rounded_away_NK = head.logprobs_NK <= 2 * math.log(LEAST_LEVEL)
                head = head._replace(logprobs_NK=head.logprobs_NK.masked_fill(rounded_away_NK, -torch.inf))
            return bucket(head, self.temperature)
        if self.tail == "renormalise":
            return renormalised(head, self.temperature)
        if self.tail == "gold":
            return gold(head, self.temperature, labels_N)
        assert self.tails_CV is not None
        assert self.tail_nats_C is not None
        tails = SharedTails(probs_CV=self.tails_CV, self_nats_C=self.tail_nats_C)
        if self.tail == "uniform":
            return spread(head, self.temperature, tails, torch.zeros_like(labels_N))
        assert stored.prototype_BT is not None
        residual: tuple[Tensor, Tensor] | None = None
        if stored.residual_ids_BTS is not None and stored.residual_weights_BTS is not None:
            residual = stored.residual_ids_BTS.flatten(0, 1).long(), stored.residual_weights_BTS.flatten(0, 1)
        return spread(head, self.temperature, tails, stored.prototype_BT.flatten().long(), residual)


def check_divergence(kind: DivergenceKind, tail: Tail | None, manifest: Manifest) -> None:
    """Refuse, with BadInputError ``unsupported-divergence``, one that the cache's targets have no right value for.

    Forward KL is linear in the teacher's probabilities, so targets that are right on average teach the right thing;
    the others are not. Reverse KL needs a probability above zero of every outcome, and a good one: it is ruled by
    what the teacher finds unlikely, where shared tails and a head's rounded last tokens know least.
    """
    if kind == "forward":
        return
    encoding = manifest.encoding
    reason: str | None = None
    if tail is None and encoding.name != "hidden":
        reason = f"encoding {encoding.name} draws its tokens at random, which is right on average in forward KL alone"
    elif tail == "prototype" and isinstance(encoding, Prototype) and encoding.residual_draws:
        reason = "residual draws are right on average in forward KL alone"
    elif tail == "gold":
        reason = "a tail on the next token is right on average in forward KL alone"
    elif kind == "reverse" and tail == "renormalise":
        reason = "tokens outside the head have probability 0, of which reverse KL is infinite"
    elif kind == "reverse" and tail in ("prototype", "uniform"):
        reason = "reverse KL needs the probability of each unlikely token, which a spread tail does not know"
    if reason is not None:
        raise BadInputError(
            "unsupported-divergence",
            f"divergence {kind} with " + (f"tail {tail}" if tail else f"encoding {encoding.name}"),
            found=reason,
            hint="use divergence forward" + (", or tail bucket" if tail else ""),
        )


def pick_tail(asked: Tail | None, manifest: Manifest) -> Tail | None:
    """Return how tails are treated: what was asked for, or the best that the cache has; None where there are none.

    Raises BadInputError ``no-tail`` where a treatment was asked for that the cache's encoding does not have, or that
    imported log-probabilities do not tell.
    """
    if (imported := manifest.imported) is not None:
        if asked is not None and asked not in imported.tails:
            expected = " or ".join(imported.tails)
            found, hint = f"{imported.logprobs} log-probabilities, imported without a normaliser", "leave tail out"
            raise BadInputError("no-tail", f"tail {asked}", expected=expected, found=found, hint=hint)
        return asked or imported.tails[0]
    has_head, has_prototypes = isinstance(manifest.encoding, Head), "prototypes" in manifest.tables
    if asked is None:
        return "prototype" if has_prototypes else "bucket" if has_head else None
    if not has_head or (asked == "prototype" and not has_prototypes):
        raise BadInputError(
            "no-tail",
            f"tail {asked}",
            expected="a cache with prototypes" if has_head else "a cache that keeps heads",
            found=f"encoding {manifest.encoding.name}",
            hint="leave tail out" + ("" if not has_head else ", or choose another treatment"),
        )
    return asked
