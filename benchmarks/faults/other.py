"""What goes with another cache: tokenizer, teacher, temperature, order, vocabulary, corpus, settings.

In: how many cases, or all. Out: counts. Every case is a command of ``kdpipe`` on a cache that it does not go with. It
must end in one line that names what differs, with the exit code of bad input or of data that would be lost.
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.small import SmallCaptures, digests, said_by
from benchmarks.faults.tally import Tally
from cache_spec.errors import EXIT_BAD_INPUT, EXIT_WOULD_LOSE_DATA
from tests.models import ROWS, make_folder, make_model, make_tokenizer, write_words


class Case(NamedTuple):
    """A command that must be refused, and words that its error must hold."""

    command: list[str]
    named: tuple[str, ...]


class _Others:
    """Caches, teachers, texts and runs that do not go with each other."""

    def __init__(self, small: SmallCaptures) -> None:
        self.small, home = small, small.folder
        self.cache = small.clean()
        self.unfinished = Path(shutil.copytree(self.cache, home / "unfinished"))
        (self.unfinished / "seal.json").unlink()
        (self.unfinished / "receipts" / "00000001.json").unlink()
        make_folder(home / "weights", spread=3.0, n_layer=1)
        make_model("gpt2", n_layer=1, vocab_size=ROWS + 8).save_pretrained(home / "padded")
        make_tokenizer(100).save_pretrained(home / "padded")
        make_folder(home / "layers", spread=4.0, n_layer=2)
        shutil.copytree(home / "teacher", home / "tokenizer")
        make_tokenizer(100, backwards=True).save_pretrained(home / "tokenizer")
        write_words(home / "other.jsonl", num_documents=small.num_documents, seed=1)
        self.twice = self._captured("twice", text=str(home / "other.jsonl"))
        self.of_others = {
            name: self._captured(f"cache-{name}", teacher=str(home / name)) for name in ("weights", "tokenizer")
        }
        self.prototypes = {
            name: self._captured(f"prototypes-{name}", encoding="prototype", teacher=str(home / name))
            for name in ("teacher", "weights")
        }
        self.run = home / "run"
        self._well(self._training(self.cache, self.run))
        self.transcoded = home / "transcoded"
        self._well(["transcode", str(self.cache), "--out", str(self.transcoded), "--device", "cpu"])

    def _captured(self, name: str, encoding: str = "topk", **changes: Any) -> Path:
        self._well(self.small.command(name, encoding, **changes))
        return self.small.folder / name

    def _well(self, command: list[str]) -> None:
        code, said = said_by(command)
        assert code == 0, said

    def _training(self, cache: Path, out: Path, *more: str) -> list[str]:
        options = ["--teacher", str(self.small.folder / "teacher"), "--num-layers", "1", "--max-steps", "1"]
        fixed = ["--cosine-weight", "0", "--batch-blocks", "2", "--device", "cpu", "--precision", "fp32"]
        return ["train-student", "--cache", str(cache), "--out", str(out), *options, *fixed, "--no-tensorboard", *more]

    def cases(self) -> dict[str, Case]:
        home, found = self.small.folder, dict[str, Case]()
        teachers = {"weights": "weights_sha256", "padded": "padded_vocab_size", "layers": "num_layers",
                    "tokenizer": "tokenizer.sha256"}  # fmt: skip
        changes: dict[str, tuple[dict[str, Any], str]] = {
            **{f"teacher with other {name}": ({"teacher": home / name}, word) for name, word in teachers.items()},
            "corpus": ({"text": home / "other.jsonl"}, "corpus.sources"),
            "blocks": ({"block_tokens": 32}, "block_tokens"),
            "shards": ({"shard_blocks": 4}, "shard_blocks"),
            "limit": ({"limit_tokens": 64}, "limit_tokens"),
            "last block": ({"last_block": "keep"}, "last_block"),
            "k": ({"k": 5}, "encoding.k"),
            "encoding": ({"encoding": "sparsified"}, "encoding"),
            "pooling": ({"hidden_window": 16}, "hidden.window"),
            "type of pooled states": ({"hidden_dtype": "float16"}, "hidden.dtype"),
            "batch": ({"batch_blocks": 1}, "batch_blocks"),
            "type of the teacher": ({"dtype": "bfloat16"}, "compute.dtype"),
        }
        for name, (change, word) in changes.items():
            for cache in (self.cache, self.unfinished):
                found[f"capture on {cache.name}: {name}"] = Case(self.small.command(cache.name, **change), (word,))
        for name, options, word in (
            ("temperatures", ["--temperatures", "1.0", "--temperatures", "3.0"], "temperatures"),
            ("another text more", ["--text", str(home / "other.jsonl")], "corpus.sources"),
        ):
            found[f"capture: {name}"] = Case([*self.small.command(self.cache.name), *options], (word,))
        both = [str(home / "text.jsonl"), str(home / "other.jsonl")]
        ordered = self.small.folder / "ordered"
        command = self.small.command(ordered.name)
        command[command.index("--text") + 1] = both[0]
        self._well([*command, "--text", both[1]])
        command[command.index("--text") + 1] = both[1]
        found["capture: the same texts in another order"] = Case([*command, "--text", both[0]], ("corpus.sources",))
        for what in ("verify", "repair"):
            deep = ["--deep"] if what == "verify" else []
            bad = self.unfinished_copy() if what == "repair" else self.cache
            for name in ("weights", "padded"):
                found[f"{what} with other {name}"] = Case(
                    [what, str(bad), *deep, "--teacher", str(home / name)], ("other-teacher", "weights")
                )
        out = str(self.transcoded)
        prototypes = [*self.small.command("new"), "--encoding", "prototype", "--prototypes-from"]
        found |= {
            "transcode of another cache": Case(["transcode", str(self.twice), "--out", out], ("corpus",)),
            "transcode to other temperatures": Case(
                ["transcode", str(self.cache), "--out", out, "--temperatures", "1.0"], ("temperatures",)
            ),
            "transcode at an unknown temperature": Case(
                ["transcode", str(self.cache), "--out", f"{out}-2", "--temperatures", "3.0"], ("temperature 3", "1, 2")
            ),
            "capture into what was transcoded": Case(self.small.command(self.transcoded.name), ("transcoded_from",)),
            "capture with another teacher's prototypes": Case(
                [*prototypes, str(self.prototypes["weights"])], ("teacher",)
            ),
            "capture with prototypes of other temperatures": Case(
                [*prototypes, str(self.prototypes["teacher"]), "--temperatures", "3.0"], ("temperature",)
            ),
        }  # fmt: skip
        train = self._training
        new = self.small.folder / "new-run"
        found |= {
            "training at an unknown temperature": Case(train(self.cache, new, "--temperature", "3"), ("3", "1, 2")),
            "a run goes on with another cache": Case(train(self.twice, self.run), ("another-cache", "cache")),
            "a run goes on in another order": Case(train(self.cache, self.run, "--seed", "1"), ("seed",)),
            "a run goes on without shuffling": Case(train(self.cache, self.run, "--no-shuffle"), ("shuffle",)),
            "a run goes on at another temperature": Case(
                train(self.cache, self.run, "--temperature", "2"), ("temperature",)
            ),
            **{
                f"held-out text with other {name}": Case(
                    train(self.cache, new, "--evaluate-cache", str(cache), "--evaluate-every", "1"),
                    ("evaluate-cache", word),
                )
                for (name, cache), word in zip(self.of_others.items(), ("teacher", "tokenizer"), strict=True)
            },
            "a student of another tokenizer": Case(
                ["evaluate", "--models", str(home / "tokenizer"), "--cache", str(self.cache)], ("vocabulary",)
            ),
        }
        return found

    def unfinished_copy(self) -> Path:
        """A cache with something to recompute."""
        copy = self.small.folder / "damaged"
        if not copy.exists():
            shutil.copytree(self.cache, copy)
            path = next(iter(sorted((copy / "head_ids").glob("c.*"))))
            path.write_bytes(path.read_bytes()[:-1])
        return copy


def other_campaign(small: SmallCaptures, num_cases: int, rng: random.Random) -> dict[str, Any]:
    """Run ``num_cases`` of these commands, or all."""
    tally = Tally()
    cases = _Others(small).cases()
    for name in rng.sample(sorted(cases), min(num_cases, len(cases))):
        command, named = cases[name]
        before = digests(small.folder)
        code, said = said_by(command)
        is_refused = code in (EXIT_BAD_INPUT, EXIT_WOULD_LOSE_DATA) and re.fullmatch(
            r"(?s)(.*\n)?error: [^\n]+\n", said
        )
        tally.counts["refused"] += bool(is_refused)
        tally.check(is_refused, f"{name}: exit code {code}: {said[-300:]}")
        missing = [word for word in named if word not in said]
        tally.check(not missing, f"{name}: {missing} not named: {said[-300:]}")
        after = digests(small.folder)
        changed = [path for path, digest in before.items() if after.get(path) != digest]
        tally.check(not changed, f"{name}: changed {changed[:3]}")
        tally.counts["cases"] += 1
    return tally.report()
