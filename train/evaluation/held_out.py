"""How good the student is while it learns: a held-out cache comes in, its loss and distance from the teacher go out.

In float32, in evaluation mode, without drawing a random number: what is trained does not change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cache_spec.errors import BadInputError
from cache_spec.reader import CacheReader
from train.config import TrainConfig
from train.distiller import output_head
from train.evaluation.on_cache import cache_figures
from train.evaluation.scorer import Scorer

_NAMES = {"loss_nats": "loss", "kl_to_teacher": "kl", "agreement": "agreement", "ece": "ece"}


class HeldOut:
    """A cache that is not trained on; BadInputError ``evaluate-cache`` for one whose teacher has another vocabulary."""

    def __init__(self, address: Path | str, *, reader: CacheReader, config: TrainConfig) -> None:
        self._reader = CacheReader.open(address, config)
        self._temperature = config.temperature
        self._batch_blocks = config.batch_blocks
        ours, theirs = reader.manifest, self._reader.manifest
        theirs.temperature_index(config.temperature)
        for what, expected, found in (
            ("tokenizer", ours.tokenizer, theirs.tokenizer),
            ("teacher", *(manifest.teacher.weights_sha256 or manifest.teacher.name for manifest in (ours, theirs))),
            ("kind of log-probabilities", *(m.imported and m.imported.logprobs for m in (ours, theirs))),
            ("kind of text, masked or not", ours.masking is None, theirs.masking is None),
        ):
            if expected != found:
                hint = "capture held-out text with the teacher of the cache that is trained on"
                raise BadInputError("evaluate-cache", address, expected=f"the same {what}", found="another", hint=hint)

    def figures(self, student: PreTrainedModel) -> dict[str, float]:
        """Return ``loss`` (nats), ``kl`` (nats, from the teacher), ``agreement`` and ``ece``; those the cache tells."""
        weight_VD, bias_V = output_head(student)
        vocab_size = self._reader.manifest.teacher.vocab_size
        head = weight_VD[:vocab_size].float(), None if bias_V is None else bias_V[:vocab_size].float()
        scorer = Scorer(name="the student", model=student, head=head, vocab_size=vocab_size, device=weight_VD.device)
        was_training = student.training
        student.eval()
        try:
            found: dict[str, Any] = cache_figures(
                scorer, self._reader, self._temperature, self._batch_blocks, lambda _: None
            )
        finally:
            student.train(was_training)
        return {name: float(found[key]) for key, name in _NAMES.items() if found[key] is not None}
