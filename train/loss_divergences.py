"""Divergences other than KL(teacher || student): two distributions come in, values and pulls on the student go out.

Of a divergence D(p, q) the gradient on the logits of q = softmax(s) is q * (g - sum(q * g)), where g = dD/dq. The pull
is q * g, which stays finite where q vanishes and g does not.

Legend: C rows of a chunk, M outcomes: the vocabulary, or K tokens and a bucket; 1 a trailing axis of one.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cache_spec.errors import BadInputError

DivergenceKind = Literal["forward", "reverse", "js"]


class Divergence(NamedTuple):
    """How far a student's distribution q is from a teacher's p, in nats."""

    kind: DivergenceKind = "forward"
    """``forward``: KL(p || q). ``reverse``: KL(q || p). ``js``: the generalised Jensen-Shannon divergence,
    beta * KL(p || m) + (1 - beta) * KL(q || m) with the mixture m = beta * p + (1 - beta) * q."""
    beta: float = 0.5
    """Share of the teacher in the mixture, above 0 and below 1; only ``js`` has one."""

    def check(self) -> None:
        """Raise BadInputError ``bad-divergence`` for what is none."""
        if self.kind not in ("forward", "reverse", "js"):
            expected = "forward, reverse or js"
            raise BadInputError("bad-divergence", "divergence", expected=expected, found=self.kind)
        if not 0 < self.beta < 1:
            raise BadInputError("bad-divergence", "js beta", expected="above 0 and below 1", found=self.beta)


FORWARD_KL = Divergence()


class Pulls(NamedTuple):
    """A divergence, row by row, and the student's probabilities times its derivative by them."""

    value_C: Tensor
    pull_CM: Tensor


def reverse_kl(log_p_CM: Tensor, log_q_CM: Tensor, q_CM: Tensor) -> Pulls:
    """KL(q || p) = sum(q * log(q / p)); a p of 0 counts as the smallest float."""
    least = math.log(torch.finfo(log_p_CM.dtype).tiny)
    pull_CM = (log_q_CM - log_p_CM.clamp(min=least)).mul_(q_CM)
    return Pulls(pull_CM.sum(dim=1), pull_CM)


def jensen_shannon(p_CM: Tensor, q_CM: Tensor, beta: float) -> Pulls:
    """The generalised Jensen-Shannon divergence; its derivative by q is (1 - beta) * log(q / m)."""
    mixture_CM = torch.lerp(q_CM, p_CM, beta).clamp_(min=torch.finfo(q_CM.dtype).tiny)
    ratio_CM = p_CM / mixture_CM
    of_teacher_C = torch.xlogy(p_CM, ratio_CM, out=ratio_CM).sum(dim=1)
    torch.div(q_CM, mixture_CM, out=ratio_CM)
    pull_CM = torch.xlogy(q_CM, ratio_CM, out=ratio_CM).mul_(1 - beta)
    return Pulls(beta * of_teacher_C + pull_CM.sum(dim=1), pull_CM)
