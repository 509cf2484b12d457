"""The half of a published recipe that is about masked language models: its keys where ``mlm`` is true.

In: a checked file. Out: what its masking keys become in ``cache-teacher`` and ``train-student``, or the key that cannot
be meant. Which losses there are follows from ``mlm`` too: ``alpha_mlm`` where it is true, ``alpha_clm`` where not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cache_spec.masking import MaskingInfo
from train.paper_keys import MASKED_TYPES

if TYPE_CHECKING:
    from train.paper import Mapped, Paper

_STUDENTS_OF = {("distilbert", "bert")}
"""Students of another type than their teacher's."""
_WITHOUT_TOKEN_TYPES = "distilbert"


def refuse_masked_conflicts(paper: Paper) -> None:
    """Raise ``conflicting-keys`` for keys that ``mlm``, or its being false, leaves no meaning."""
    masked = paper["mlm"]

    def refuse(name: str, expected: str) -> None:
        raise paper.refusal("conflicting-keys", name, expected=expected, found=paper[name])

    because = f"as mlm is {'true' if masked else 'false'}"
    if masked != (paper["teacher_type"] in MASKED_TYPES):
        kind = f"one of {', '.join(MASKED_TYPES)}" if masked else "a model that predicts next tokens, no masked one"
        refuse("teacher_type", f"{kind}, {because}")
    types = (paper["student_type"], paper["teacher_type"])
    if types[0] != types[1] and types not in _STUDENTS_OF:
        also = " or distilbert" if types[1] == "bert" else ""
        refuse("student_type", f"{types[1]}, the teacher_type{also}")
    if paper["alpha_clm" if masked else "alpha_mlm"] > 0:
        refuse("alpha_clm" if masked else "alpha_mlm", f"0, {because}")
    if not masked:
        return
    if not paper["mlm_mask_prop"]:
        refuse("mlm_mask_prop", f"above 0, {because}")
    if paper["freeze_token_type_embds"] and paper["student_type"] == _WITHOUT_TOKEN_TYPES:
        refuse("freeze_token_type_embds", f"false, as {_WITHOUT_TOKEN_TYPES} has no token types")


def masked_capture_settings(paper: Paper) -> Mapped:
    """What ``cache-teacher`` takes from the keys about masking; nothing where ``mlm`` is false."""
    if not paper["mlm"]:
        return {}
    return {
        "mlm_mask_prop": {"mask_probability": paper["mlm_mask_prop"]},
        "word_keep": {"mask_keep": paper["word_keep"]},
        "word_rand": {"mask_random": paper["word_rand"]},
        "mlm_smoothing": {"mask_smoothing": paper["mlm_smoothing"]},
        "restrict_ce_to_mask": {"mask_positions": "masked" if paper["restrict_ce_to_mask"] else "all"},
        "seed": {"mask_seed": paper["seed"]},
    }


def masked_train_settings(paper: Paper) -> Mapped:
    """What ``train-student`` takes from them; nothing where ``mlm`` is false."""
    if not paper["mlm"]:
        return {}
    return {
        "alpha_clm": {},
        "alpha_mlm": {"ce_weight": paper["alpha_mlm"]},
        "restrict_ce_to_mask": {"kl_positions": "masked" if paper["restrict_ce_to_mask"] else "kept"},
        "freeze_token_type_embds": {"freeze_token_type_embeddings": paper["freeze_token_type_embds"]},
    }


def refuse_other_masking(paper: Paper, masking: MaskingInfo | None, flags: Any) -> None:
    """Raise ``other-masking`` for a cache that was masked in another way, or keeps less, than the file says."""
    if not paper["mlm"] or masking is None:
        return  # its teacher is of another type, which is said elsewhere
    cached = {
        "mlm_mask_prop": masking.probability,
        "word_mask": masking.mask_share,
        "word_keep": masking.keep_share,
        "word_rand": masking.random_share,
        "mlm_smoothing": masking.smoothing,
    }
    hint = "give the cache of this recipe, or capture again"
    for name, found in cached.items():
        if abs(found - paper[name]) > 1e-6:
            expected = f"{found:g}, as in the cache"
            raise paper.refusal("other-masking", name, expected=expected, found=paper[name], hint=hint)
    if masking.positions == "masked" and not paper["restrict_ce_to_mask"] and "kl_positions" not in flags:
        expected, hint = "a cache of all positions", "capture with --mask-positions all"
        raise paper.refusal("other-masking", "restrict_ce_to_mask", expected=expected, found="masked ones", hint=hint)
