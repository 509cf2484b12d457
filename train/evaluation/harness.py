"""The corpora by lm-evaluation-harness: a loaded model and its corpora come in, the harness's own figures go out.

Our task files in ``harness_tasks/`` read local files that are written here, so nothing is downloaded. The harness
reads passages in windows of which each scores all that is new to it, as ours at ``--stride`` equal to ``--window``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from cache_spec.durable import make_folder, replace_file
from cache_spec.errors import BadInputError
from train.evaluation.corpora import Corpus, Example
from train.evaluation.windows import WindowPlan

TASKS = Path(__file__).parent / "harness_tasks"


def require_harness() -> None:
    """Raise BadInputError ``missing-extra`` where lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        hint = "pip install 'kdpipe[harness]'"
        raise BadInputError("missing-extra", "--harness", expected="lm-evaluation-harness", found="none", hint=hint)


def write_task(corpus: Corpus, folder: Path, *, examples: Sequence[Example] | None = None) -> str:
    """Write a task and its data into a folder for ``lm_eval --include_path``; returns the task's name.

    ``examples``: those of the corpus to keep, all by default. The folder holds one task of each corpus's name.
    """
    task = f"kdpipe_{corpus.name}"
    make_folder(folder)
    kept = corpus.examples if examples is None else examples
    data = folder / f"{task}.jsonl"
    rows = _passages(corpus) if corpus.passages else _examples(kept)
    replace_file(data, "".join(json.dumps(row) + "\n" for row in rows).encode())
    settings = {
        "include": str(TASKS / f"{corpus.name}.yaml"),
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}, "cache_dir": str(folder.resolve() / "arrow")},
    }
    replace_file(folder / f"{task}.yaml", yaml.safe_dump(settings).encode())
    return task


def run_harness(model: Any, tokenizer: Any, plans: Sequence[WindowPlan], batch_size: int) -> list[dict[str, Any]]:
    """Measure whole corpora of text, and the examples of the others that ``plans`` keep.

    For each plan ``corpus``, ``task``, ``version`` (the harness's) and ``figures``: ``word_perplexity``,
    ``bits_per_byte``, ``perplexity`` and ``accuracy`` where the task gives them, as ``corpus_figures`` has them.
    """
    require_harness()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = []
    for plan in plans:
        with tempfile.TemporaryDirectory(prefix="kdpipe-harness-") as temporary:
            folder = Path(temporary)
            task = write_task(plan.corpus, folder, examples=plan.examples or None)
            subject = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                max_length=plan.window,
                batch_size=batch_size,
                add_bos_token=False,
            )
            results = lm_eval.simple_evaluate(
                model=subject,
                tasks=[task],
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                bootstrap_iters=0,
                log_samples=False,
            )
        figures = results["results"][task]
        found.append(
            {
                "corpus": plan.corpus.name,
                "task": task,
                "version": lm_eval.__version__,
                "figures": {
                    {"acc": "accuracy"}.get(name, name): float(value)
                    for key, value in figures.items()
                    if (name := key.partition(",")[0]) in ("word_perplexity", "bits_per_byte", "perplexity", "acc")
                },
            }
        )
    return found


def _passages(corpus: Corpus) -> Iterable[dict[str, Any]]:
    for passage in corpus.passages:
        words, num_bytes = int(passage.words.sum()), int(passage.num_bytes.sum())
        yield {"text": passage.text, "num_words": words, "num_bytes": num_bytes}


def _examples(examples: Sequence[Example]) -> Iterable[dict[str, Any]]:
    for example in examples:
        yield {"context": example.context, "target": example.target, "num_bytes": len(example.target.encode())}
