"""What the manual says of each command beside its options: what it reads and writes, examples, what to read next.

In: nothing; this is data. Out: one ``Manual`` a command, for ``--help`` and for the documentation's pages. The tests
run the examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Need = Literal["cluster", "hub", "minutes", "ranks", "store"]

EXIT_CODES = {
    0: "done, or nothing was left to do",
    1: "failed",
    2: "wrong usage",
    3: "bad input: text, model, recipe, cache, or a disk that cannot be written",
    4: "going on would lose or mix up data",
    130: "interrupted; the same command goes on",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One command as a user would type it."""

    says: str
    """What it does, without a full stop."""
    command: str
    """The line; further lines after a backslash."""
    needs: Need | None = None
    """What a machine without a network has not, or has not the time for; None: it runs in the tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manual:
    """What the options do not say."""

    reads: str
    writes: str
    examples: tuple[Example, ...]
    exit_codes: dict[int, str] = field(default_factory=dict)
    """Where a code means something more precise."""
    see_also: tuple[str, ...]


MANUALS: dict[str, Manual] = {
    "demo": Manual(
        reads="Nothing: teacher and text come with kdpipe.",
        writes="Two caches, three students and their evaluation below --out; run again, it goes on.",
        examples=(
            Example(says="About two minutes on two cores", command="kdpipe demo", needs="minutes"),
            Example(says="For a script", command="kdpipe demo --out results --json", needs="minutes"),
        ),
        see_also=("cache-teacher", "train-student", "evaluate"),
    ),
    "plan": Manual(
        reads="The configs of teacher and students: of shipped models by name, of folders, or of the hub. With"
        " --calibrate also their weights and some text. With --runs what trained families measured.",
        writes="Nothing. The probe of --calibrate works in a folder of its own below --probe-folder, and removes it.",
        examples=(
            Example(
                says="A published recipe on one GPU, from configs alone",
                command="kdpipe plan --teacher gpt2 --student 6 --tokens 1000000000 --epochs 4 --device rtx4090"
                " --budget-hours 30",
            ),
            Example(
                says="Two students of a 7B teacher, two GPUs to choose from",
                command="kdpipe plan --teacher llama-7b --student 8 --student 16 --tokens 100000000 \\\n"
                "    --device a100 --device h100 --watts 700 --price-per-hour 3",
            ),
            Example(
                says="This machine, measured for about a minute",
                command="kdpipe plan --teacher my-teacher --student 2 --text my-text.txt --calibrate",
                needs="minutes",
            ),
        ),
        see_also=("cache-teacher", "train-student"),
    ),
    "cache-teacher": Manual(
        reads="A teacher, from a folder, a GGUF file or the Hugging Face hub, and text. Nothing is downloaded that was"
        " not named.",
        writes="A cache: a folder, or objects in a store. Shards are committed one by one; the same command goes on"
        " after an interruption.",
        examples=(
            Example(
                says="What it would cost",
                command="kdpipe cache-teacher --teacher my-teacher --text my-text.txt --out caches/mine --dry-run",
            ),
            Example(
                says="The default encoding, for students at temperature 1 or 2",
                command="kdpipe cache-teacher --teacher my-teacher --text my-text.txt --out caches/mine",
            ),
            Example(
                says="Held-out text with the exact distribution, to measure students on",
                command="kdpipe cache-teacher --encoding hidden --hidden-window 0 --teacher my-teacher"
                " --text held-out.txt \\\n    --out caches/held-out",
            ),
            Example(
                says="A shipped recipe, a hub model and a hub data set",
                command="kdpipe cache-teacher --config distilgpt2 --limit-tokens 2000000 --out caches/owt",
                needs="hub",
            ),
            Example(
                says="On a dask cluster, into a store",
                command="kdpipe cache-teacher --teacher gpt2 --text my-text.txt --out /shared/gpt2 \\\n"
                "    --store s3://bucket/gpt2 --scheduler tcp://10.0.0.1:8786",
                needs="cluster",
            ),
        ),
        see_also=("verify", "inspect", "train-student", "transcode"),
    ),
    "import-pickle": Manual(
        reads="A pickle of token ids, as the recipes of the DistilBERT kind make it, and the tokenizer's files. Nothing"
        " of the pickle is run.",
        writes="A folder of ids, which is text for cache-teacher.",
        examples=(
            Example(
                says="Once, and then a capture of it",
                command="kdpipe import-pickle binarized.pickle --tokenizer my-teacher --out ids",
            ),
        ),
        see_also=("cache-teacher",),
    ),
    "transcode": Manual(
        reads="CACHE: a cache's folder, or its address in a store. From encoding hidden it makes all others; from"
        " others what is a part of them.",
        writes="Another cache of the same blocks, in the folder --out.",
        examples=(
            Example(
                says="Smaller heads, and temperature 1 alone",
                command="kdpipe transcode caches/mine --encoding topk --k 8 --temperatures 1 --out caches/small",
            ),
            Example(
                says="How large it would be",
                command="kdpipe transcode caches/held-out --encoding prototype --out caches/as-prototype --dry-run",
            ),
        ),
        see_also=("cache-teacher", "inspect"),
    ),
    "verify": Manual(
        reads="CACHE: a cache's folder, or its address in a store. Every byte of it, unless --shallow.",
        writes="Nothing. Each problem is one line, or an entry of the JSON.",
        examples=(
            Example(says="Every byte", command="kdpipe verify caches/mine"),
            Example(says="Missing and stray files alone", command="kdpipe verify caches/mine --shallow"),
            Example(
                says="And two random batches by the teacher again",
                command="kdpipe verify caches/mine --deep --teacher my-teacher --batches 2",
            ),
        ),
        exit_codes={0: "no problem", 3: "a problem, or no cache"},
        see_also=("repair", "inspect"),
    ),
    "repair": Manual(
        reads="CACHE: a cache's folder, and the teacher where --teacher says that it lies.",
        writes="The shards of CACHE that verify finds bad, and nothing else.",
        examples=(
            Example(
                says="What would be done",
                command="kdpipe repair caches/mine --teacher my-teacher --dry-run",
            ),
            Example(says="Do it", command="kdpipe repair caches/mine --teacher my-teacher"),
        ),
        exit_codes={0: "nothing is bad any more", 3: "something is left to do"},
        see_also=("verify", "cache-teacher"),
    ),
    "push": Manual(
        reads="CACHE: the folder of a finished cache.",
        writes="The same files below URL: s3://BUCKET/NAME, gs://BUCKET/NAME, az://ACCOUNT/NAME or"
        " hf://datasets/ORG/NAME.",
        examples=(
            Example(
                says="What would be sent",
                command="kdpipe push caches/mine s3://bucket/mine --dry-run",
                needs="store",
            ),
            Example(
                says="To a private data set of the Hub",
                command="kdpipe push caches/mine hf://datasets/me/mine --private",
                needs="hub",
            ),
        ),
        see_also=("pull", "cache-teacher"),
    ),
    "pull": Manual(
        reads="A finished cache at URL: s3://, gs://, az:// or hf://datasets/ORG/NAME.",
        writes="The cache in FOLDER; every file is compared with its digest before it counts.",
        examples=(
            Example(says="From a store", command="kdpipe pull s3://bucket/mine caches/mine", needs="store"),
            Example(says="From the Hub", command="kdpipe pull hf://datasets/me/mine caches/mine", needs="hub"),
        ),
        see_also=("push", "verify"),
    ),
    "export": Manual(
        reads="CACHE: a finished cache's folder, or its address in a store.",
        writes="A folder of Parquet or safetensors files, with an index; the same command goes on.",
        examples=(
            Example(
                says="As Hugging Face datasets open it, and axolotl's KD plugin takes it",
                command="kdpipe export caches/mine --to parquet --out exports/parquet",
            ),
            Example(
                says="As plain arrays, a file for each shard",
                command="kdpipe export caches/mine --to safetensors --out exports/safetensors",
            ),
        ),
        see_also=("import", "transcode", "push"),
    ),
    "import": Manual(
        reads="Parquet files: in each row a text's ids and, for each token, lists of kept ids and log-probabilities.",
        writes="A cache that says that it has no normaliser: students of it are trained at temperature 1.",
        examples=(
            Example(
                says="What export wrote",
                command="kdpipe import --from exports/parquet --tokenizer my-teacher --logprobs renormalised"
                " --out caches/imported",
            ),
        ),
        see_also=("export", "train-student", "verify"),
    ),
    "inspect": Manual(
        reads="CACHE: a cache's folder, finished or not, or the address of a finished one in a store.",
        writes="Nothing.",
        examples=(
            Example(says="For people", command="kdpipe inspect caches/mine"),
            Example(says="For a script", command="kdpipe inspect caches/mine --json"),
        ),
        see_also=("verify", "cache-teacher"),
    ),
    "train-student": Manual(
        reads="A finished cache. Of the teacher, only the layers that are copied, once, at the start; with --student"
        " config or checkpoint, nothing of it.",
        writes="A run folder: checkpoints, metrics, and at the end student/, which from_pretrained opens. With"
        " --students one such folder for each, and a report on all.",
        examples=(
            Example(
                says="Two of the teacher's layers",
                command="kdpipe train-student --cache caches/mine --teacher my-teacher --num-layers 2 --out runs/two",
            ),
            Example(
                says="What a run would take",
                command="kdpipe train-student --cache caches/mine --teacher my-teacher --num-layers 2 --out runs/two"
                " --dry-run",
            ),
            Example(
                says="A fresh model, at temperature 2, with the hidden states too",
                command="kdpipe train-student --cache caches/mine --student config"
                " --student-config '{\"n_layer\": 1}' \\\n    --temperature 2 --cosine-weight 0.1 --out runs/fresh",
            ),
            Example(
                says="Many students of one cache, each beside its twin that saw the text alone",
                command="kdpipe train-student --students sizes --cache caches/owt --evaluate-cache caches/held-out"
                " --control \\\n    --out runs/family",
                needs="hub",
            ),
            Example(
                says="Two devices",
                command="torchrun --nproc-per-node 2 --no-python kdpipe train-student --cache caches/mine"
                " --num-layers 2 --out runs/two",
                needs="ranks",
            ),
        ),
        see_also=("cache-teacher", "evaluate"),
    ),
    "evaluate": Manual(
        reads="Models in safetensors, from folders or the hub; corpora from the hub or files, text, or a finished cache"
        " of held-out text. The first model is the one that others are compared with.",
        writes="Nothing but --out, a file of the figures, which replaces one that is there.",
        examples=(
            Example(
                says="Two corpora and speed, teacher first, as published tables have them",
                command="kdpipe evaluate --models gpt2 --models runs/two/student --mode blocks \\\n"
                "    --corpus wikitext103 --corpus enwik8=enwik8 --speed --out figures.json",
                needs="hub",
            ),
            Example(
                says="On text, beside the teacher",
                command="kdpipe evaluate --models runs/two/student --models my-teacher --text held-out.txt",
            ),
            Example(
                says="Against what the teacher said",
                command="kdpipe evaluate --models runs/two/student --cache caches/held-out",
            ),
            Example(
                says="What both write",
                command="kdpipe evaluate --models my-teacher --models runs/two/student --sample 'w5 w6' \\\n"
                "    --sample-tokens 8",
            ),
        ),
        see_also=("train-student", "cache-teacher"),
    ),
    "report": Manual(
        reads="A cache, run folders, a family's folder, and JSON files of evaluate and plan: any of them.",
        writes="One HTML file, --out, which holds all that it shows; it replaces an older report and nothing else.",
        examples=(
            Example(says="A cache", command="kdpipe report --cache caches/mine --out report.html"),
            Example(
                says="Students beside each other, with what they were trained from",
                command="kdpipe report --cache caches/mine --run runs/two --out report.html",
            ),
        ),
        see_also=("inspect", "train-student", "evaluate", "plan"),
    ),
    "completion": Manual(
        reads="Nothing.",
        writes="A script for the shell, on standard output.",
        examples=(
            Example(says="bash, for this session", command='eval "$(kdpipe completion bash)"'),
            Example(says="zsh, in ~/.zshrc", command='eval "$(kdpipe completion zsh)"'),
            Example(says="fish, in config.fish", command="kdpipe completion fish | source"),
        ),
        see_also=("demo",),
    ),
}
