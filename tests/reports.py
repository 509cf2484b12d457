"""What a report is made of, with hostile text in every place that takes text, and a page taken apart.

In: a folder. Out: a cache, a run, a family, an evaluation and a plan there; the tags, attributes and texts of a page.
"""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cache_spec.encodings import Encoding
from cache_spec.manifest import Manifest, SourceInfo, sha256_hex
from tests.synthetic import make_manifest, make_rows, write_cache
from train.report.config import ReportConfig

VOCABULARY = 50
ATTACKS = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=2</script>",
    "</style></title></svg><img src=x onerror=window.hacked=3>",
    "\" onmouseover=window.hacked=4 x='",
    "\u202egnp.exe\u2066\u200f",
    "nul \x00 bell \x07 escape \x1b[31m",
    "שלום עולם",
    "$\\frac{1}{0}$ ${x} {{ 7*7 }} {% raw %}",
    "&lt;b&gt; <!-- --> ]]> &#x202e;",
    "x" * 300,
)
HOSTILE = " ".join(ATTACKS[:-1])


def hostile_words() -> dict[str, int]:
    """A vocabulary of attacks and plain words."""
    words = [*(f"{attack} {number}" for number, attack in enumerate(ATTACKS)), "w"]
    return {word if at < len(words) else f"w{at}": at for at, word in enumerate([*words, *("" for _ in range(39))])}


def save_cache(
    folder: Path, *, encoding: Encoding | None = None, seal: bool = True, tokenizer: bool = True, **changes: Any
) -> Manifest:
    """A cache of random targets, of a teacher and a text with hostile names."""
    if tokenizer:
        core = Tokenizer(models.WordLevel(hostile_words(), unk_token="w"))
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w").save_pretrained(folder / "tokenizer")
    files = {str(path.relative_to(folder)): sha256_hex(path.read_bytes()) for path in folder.rglob("*.json")}
    manifest = make_manifest(vocab_size=VOCABULARY, teacher_name=HOSTILE, encoding=encoding, **changes)
    source = SourceInfo(name=HOSTILE, num_bytes=10, sha256="3" * 64)
    corpus = manifest.corpus.model_copy(update={"sources": (source,)})
    manifest = manifest.model_copy(update={"files": files, "corpus": corpus, "provenance": {HOSTILE: HOSTILE}})
    return write_cache(folder, manifest, make_rows(manifest), seal=seal)


def save_run(folder: Path, *, num_lines: int = 12, finished: bool = True, parameters: int = 1000) -> Path:
    """What a run of so many lines of metrics leaves."""
    folder.mkdir(parents=True)
    run = {
        "format": "kdpipe-run",
        "format_version": 1,
        "fingerprint": "ab" * 32,
        "settings": {"temperature": 1.0, "student": HOSTILE, "seed": None},
        "config": {"cache": HOSTILE},
        "student": {"init": "config", "num_parameters": parameters, "layers": [0, 3]},
        "total_steps": num_lines + (0 if finished else 5),
        "versions": {"kdpipe": "test"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    lines: list[dict[str, Any]] = []
    for step in range(1, num_lines + 1):
        line = {"step": step, "epoch": 0, "tokens": 100 * step, "lr": 0.1 / step, "loss": 5 / step, "kl": 4 / step}
        lines.append(line | {"ce": 6 / step, "grad_norm": 1.0, "tokens_per_s": 50.0 + step})
        if step % 4 == 0:
            lines.append({"step": step, "evaluate/loss": 6 / step, "evaluate/kl": 1 / step})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    # A run that goes on may have written half of a line.
    (folder / "metrics.jsonl").write_text(text + ("" if finished else '{"step": 99, "lo'))
    position = {"step": 8, "epoch": 0, "samples": 8, "tokens": 800, "seconds": 10.0}
    checkpoint = folder / "checkpoints" / "step-00000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"position": position}))
    if finished:
        result = {"steps": num_lines, "tokens": 100 * num_lines, "seconds": 36.0, "tokens_per_s": 33.3}
        (folder / "result.json").write_text(json.dumps(result | {"parameters": parameters, "stopped_by": "epochs"}))
    return folder


def cache_figures(loss: float) -> dict[str, Any]:
    """Figures of a model on a held-out cache."""
    return {
        "cache": f"/some/{HOSTILE}",
        "temperature": 1.0,
        "num_tokens": 800,
        "num_positions": 810,
        "loss_nats": loss,
        "perplexity": 9.5,
        "ece": 0.1,
        "kl_is": "lower-bound",
        "kl_to_teacher": loss - 2,
        "agreement": 0.5,
        "overlap": 0.625,
        "teacher_loss": 2.0,
        "teacher_perplexity": 7.4,
        "tokens_per_s": 100.0,
        "intervals": {"loss_nats": [loss - 0.25, loss + 0.25]},
    }


def model_figures(name: str, parameters: int, loss: float) -> dict[str, Any]:
    """A row of an evaluation with all its parts."""
    corpus = {
        "corpus": "wikitext-103",
        "source": HOSTILE,
        "protocol": f"WikiText, detokenised {HOSTILE}",
        "mode": "strided",
        "window_tokens": 1024,
        "stride": 512,
        "num_tokens": 5000,
        "num_words": 4000,
        "num_bytes": 20000,
        "num_examples": None,
        "loss_nats": loss,
        "perplexity": 9.75,
        "word_perplexity": 31.5,
        "bits_per_byte": 1.5,
        "accuracy": None,
        "intervals": {"word_perplexity": [30.5, 32.5]},
        "interval_unit": "document",
        "num_units": 60,
        "sampled": True,
        "difference": {"to": "/m/teacher", "loss_nats": 1.0, "intervals": {"loss_nats": [0.5, 1.5]}},
    }
    speed = {
        "prompt_tokens": 128,
        "prefill_tokens_per_s": 3000.0,
        "decode_tokens_per_s": 60.0,
        "first_token_s": 0.04,
        "token_s": 0.016,
        "peak_bytes": 5_000_000,
    }
    text = {"text": f"/t/{HOSTILE}", "num_tokens": 9, "num_bytes": 40, "loss_nats": loss, "perplexity": None}
    return {
        "name": name,
        "parameters": parameters,
        "dtype": "float32",
        "device": "cpu",
        "file_bytes": 4 * parameters,
        "texts": [{**text, "bits_per_byte": 1.25, "ece": 0.2, "tokens_per_s": 10.0}],
        "cache": cache_figures(loss),
        "corpora": [corpus],
        "speed": speed,
        "samples": [{"prompt": HOSTILE, "text": f"{name} {HOSTILE}"}],
    }


def save_evaluation(path: Path) -> Path:
    """An evaluation of a teacher and a student."""
    models = [model_figures("/m/teacher", 4000, 2.0), model_figures(f"/m/{HOSTILE}/student", 1000, 3.0)]
    path.write_text(json.dumps({"models": models, "bootstrap": {"resamples": 100, "confidence": 0.95}}))
    return path


def save_family(folder: Path) -> Path:
    """A family of one student with its control, and one that failed."""
    folder.mkdir()
    common = {
        "error": None,
        "training_tokens": 1200,
        "training_hours": 0.01,
        "speed": model_figures("", 1, 1.0)["speed"],
    }
    students: list[dict[str, Any]] = []
    for name, control_of, loss in (("small", None, 3.0), ("small-control", "small", 3.5)):
        save_run(folder / name)
        evaluation = model_figures(str(folder / name / "student"), 1000, loss)
        students.append({"name": name, "control_of": control_of, "status": "done", "parameters": 1000} | common)
        students[-1]["evaluation"] = evaluation
    students.append({"name": HOSTILE, "control_of": None, "status": "failed", "error": HOSTILE, "parameters": None})
    family = {"format": "kdpipe-family", "format_version": 1, "cache": HOSTILE, "evaluate": None, "students": students}
    (folder / "family.json").write_text(json.dumps(family))
    return folder


def save_plan(path: Path) -> Path:
    """A plan of the family above and of a student that was never trained."""
    hours = {"online": {"hours": 0.05}, "cross_entropy": {"hours": 0.004}}
    student = {
        "parameters": 1000,
        "tokens": 1200,
        "hours_per_epoch": 0.02,
        "tokens_per_s": 30.0,
        "peak_bytes": 1e9,
        **hours,
    }
    plan = {
        "assumptions": [{"name": HOSTILE, "value": 0.35, "unit": "of peak", "source": HOSTILE}],
        "calibrated": True,
        "device": {"name": HOSTILE},
        "num_devices": 1,
        "teacher": {"name": HOSTILE},
        "cache": {"tokens": 56, "bytes": 1000.0, "bytes_by_array": {"head_ids": 500, HOSTILE: 5}, "table_bytes": 7},
        "capture": {"hours": 0.5, "tokens_per_s": 150.0, "peak_bytes": 2e9},
        "students": [student | {"name": "small", "hours": 0.008}, student | {"name": HOSTILE, "hours": 0.1}],
        "totals": {
            "cached_hours": 0.2,
            "online_hours": 0.5,
            "cross_entropy_hours": 0.1,
            "money": None,
            "kwh": {"cached": 1.25, "online": 2.0, "cross_entropy": 0.5},
            "co2_kg": None,
        },
        "break_even": {"students": 2, "epochs": None, "words": {"students": "from 2", "epochs": "never"}},
        "fits_in_memory": False,
        "loss_by_hours": [
            {"students": n, "hours": hours, "ways": {"cached": {"tokens": 9, "loss": 5.0 - hours}}}
            for n in (1, 2)
            for hours in (0.25, 0.5, 1.0)
        ],
        "budget": {"hours": 30, HOSTILE: HOSTILE},
        "curve": [
            {"students": n, "ways": {"cached": {"hours": 0.1 + 0.05 * n, "loss": 5.0 - n}, HOSTILE: {"hours": n}}}
            for n in (1, 2, 3)
        ],
    }
    path.write_text(json.dumps(plan))
    return path


class Page(HTMLParser):
    """A page taken apart by the standard library's parser."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        """Of all elements but styles and scripts."""
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag in self.raw:
            self._inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.raw:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        (self.raw[self._inside[-1]] if self._inside else self.texts).append(data)

    @property
    def text(self) -> str:
        """All that is shown, in a row."""
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str]]:
        """The attributes of all elements of a name."""
        return [attributes for name, attributes in self.tags if name == tag]


def save_everything(folder: Path, title: str | None = None) -> ReportConfig:
    """A cache, a run, a family, an evaluation and a plan, all hostile, and the settings of a report on them."""
    save_cache(folder / "cache")
    return ReportConfig(
        out=folder / "report.html",
        cache=folder / "cache",
        run=(save_run(folder / "alone", finished=False),),
        family=save_family(folder / "family"),
        evaluation=(save_evaluation(folder / "evaluation.json"),),
        plan=save_plan(folder / "plan.json"),
        title=title,
        plots=True,
    )
