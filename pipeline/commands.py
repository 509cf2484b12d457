"""The commands of ``kdpipe``: flags to settings, settings to a body that is imported only when it runs.

In: checked settings from ``pipeline.settings``. Out: the body's result, printed for people or as one JSON object. This
is the place where capture and training meet; the layers below do not know each other.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cache_spec.address import CopySettings, as_address
from cache_spec.errors import EXIT_BAD_INPUT, EXIT_DONE, BadInputError
from pipeline.completion import SHELLS, files, shell_script
from pipeline.config import CaptureConfig, TranscodeConfig
from pipeline.family_command import FamilyOptions, family_options, run_family
from pipeline.help_page import command
from pipeline.interop.config import ExportConfig, ImportConfig
from pipeline.plan.config import PlanConfig
from pipeline.settings import emit, flags_of, settings
from train.config import TrainConfig
from train.evaluation.config import EvaluateConfig
from train.report.config import ReportConfig

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and no progress bars.")
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done and what it would cost; write nothing.")
PaperRows = list[dict[str, Any]]
cache_argument = click.argument("cache", type=as_address, shell_complete=files)
copy_options = flags_of(CopySettings, "copy")


@command("plan")
@settings(PlanConfig, "plan")
@as_json
def plan(config: PlanConfig, as_json: bool) -> None:
    """Say what a cache and students from it would cost, before anything is spent.

    By formula, from the models' configs alone; or, with --calibrate, from a probe of the real teacher, students and
    disk on this machine.
    """
    from pipeline.plan_command import lines
    from pipeline.plan_command import plan as planned

    facts = planned(config)
    emit(as_json, facts, [] if as_json else lines(facts))


def _paper_capture(path: Path, flags: dict[str, Any]) -> tuple[dict[str, Any], PaperRows]:
    from train.paper import capture_settings, merged, read_paper

    paper = read_paper(path)
    mapped = capture_settings(paper, flags)
    return merged(mapped), paper.table(mapped, flags)


@command("cache-teacher")
@settings(CaptureConfig, "cache-teacher", paper=_paper_capture)
@dry_run
@as_json
def cache_teacher(config: CaptureConfig, dry_run: bool, as_json: bool, paper: PaperRows | None = None) -> None:
    """Run a teacher once over text and keep what students need.

    Run the same command again to go on after an interruption.
    """
    mapping = _said(paper, as_json)
    if dry_run:
        from pipeline.estimate import describe_estimate, estimate

        facts = estimate(config)
        emit(as_json, facts | mapping, describe_estimate(facts))
        return
    from pipeline.capture import capture

    result = capture(config, quiet=as_json, events=as_json)
    emit(as_json, result | mapping, [_made(result)])


@command("import-pickle")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the imported ids.")
@click.option("--tokenizer", metavar="TEXT", required=True, help="Tokenizer of the ids: the teacher's folder or name.")
@as_json
def import_pickle(file: Path, out: Path, tokenizer: str, as_json: bool) -> None:
    """Convert a pickle of token ids, once, to text of ids.

    Only lists of one-dimensional integer arrays, or of lists of integers, are read; nothing in FILE is ever run. The
    folder is text for cache-teacher.
    """
    from pipeline.import_pickle import import_ids

    result = import_ids(file, out, tokenizer=tokenizer, quiet=as_json)
    line = f"{out}: {result['num_documents']:,} documents, {result['num_tokens']:,} tokens"
    emit(as_json, result, [line])


@command("transcode")
@settings(TranscodeConfig, "transcode", argument="cache")
@dry_run
@as_json
def transcode(config: TranscodeConfig, dry_run: bool, as_json: bool) -> None:
    """Make a smaller cache from a richer one, without the teacher.

    What is not given is as in CACHE, or else the default. Run the same command again to go on after an interruption.
    """
    if dry_run:
        from pipeline.estimate import describe_estimate, estimate_transcoding

        facts = estimate_transcoding(config)
        emit(as_json, facts, describe_estimate(facts))
        return
    from pipeline.transcode import transcode

    result = transcode(config, quiet=as_json)
    emit(as_json, result, [_made(result)])


@command()
@cache_argument
@click.option("--shallow", is_flag=True, help="Look for missing and stray files alone: opens no file of a shard.")
@click.option("--deep", is_flag=True, help="Also run the teacher again on a few random batches and compare.")
@click.option("--teacher", metavar="TEXT", help="Where the teacher lies now, for --deep.  [default: the cache's name]")
@click.option("--gguf-file", metavar="TEXT", help="GGUF file inside the teacher's folder, for --deep.")
@click.option("--batches", type=click.IntRange(1), help="Batches to compare, for --deep.  [default: 4]")
@copy_options
@as_json
def verify(
    cache: Path | str,
    shallow: bool,
    deep: bool,
    teacher: str | None,
    gguf_file: str | None,
    batches: int | None,
    copy: CopySettings,
    as_json: bool,
) -> int:
    """Report every problem of a cache, in a folder or a store.

    Reads every byte, unless --shallow; exits with 3 if anything is wrong.
    """
    if shallow and deep:
        raise click.UsageError("--shallow or --deep, not both")
    for flag, value in (("--teacher", teacher), ("--gguf-file", gguf_file), ("--batches", batches)):
        if value is not None and not deep:
            raise click.UsageError(f"{flag} needs --deep")
    from tqdm import tqdm

    from cache_spec.validate import verify_cache, verify_names
    from cache_spec.verify_stored import verify_stored

    if shallow and not isinstance(cache, Path):
        raise click.UsageError("--shallow is for folders")
    with tqdm(unit="shard", desc="verify", disable=as_json or None) as bar:
        if isinstance(cache, Path):
            problems = verify_names(cache) if shallow else verify_cache(cache, lambda shard: bar.update())
        else:
            problems = verify_stored(cache, copy.copies, lambda shard: bar.update())
    if deep and not problems:
        from pipeline.recompute import compare_with_teacher

        problems = compare_with_teacher(cache, teacher, gguf_file=gguf_file, num_batches=batches or 4, copy=copy)
    facts: dict[str, Any] = {"cache": str(cache), "problems": [problem._asdict() for problem in problems]}
    emit(as_json, facts, [*map(str, problems), f"{cache}: {len(problems)} problem(s)"])
    return EXIT_BAD_INPUT if problems else 0


@command()
@cache_argument
@click.option("--teacher", metavar="TEXT", help="Where the teacher lies now.  [default: the cache's name]")
@click.option("--gguf-file", metavar="TEXT", help="GGUF file inside the teacher's folder.")
@dry_run
@as_json
def repair(cache: Path | str, teacher: str | None, gguf_file: str | None, dry_run: bool, as_json: bool) -> int:
    """Recompute what is bad in a cache, and nothing else.

    A shard is made again from its own tokens. One whose tokens are damaged is taken out, and the command that made the
    cache makes it again. Exits with 3 if something is left to do.
    """
    if isinstance(cache, str):
        hint = "kdpipe pull it, repair the folder, and push that"
        raise BadInputError("not-a-folder", cache, expected="a cache's folder", found="a store", hint=hint)
    from pipeline.repair import describe_repair, repair_cache

    facts = repair_cache(cache, teacher, gguf_file=gguf_file, dry_run=dry_run, quiet=as_json)
    emit(as_json, facts, describe_repair(facts))
    return EXIT_BAD_INPUT if facts.get("problems") else EXIT_DONE


@command()
@cache_argument
@click.argument("url")
@click.option("--private", is_flag=True, help="Make the dataset on the Hub private, if it is made now.")
@dry_run
@as_json
def push(cache: Path | str, url: str, private: bool, dry_run: bool, as_json: bool) -> None:
    """Send a finished cache to a store, or to the Hugging Face Hub.

    URL is s3://BUCKET/…, gs://…, az://…, or hf://datasets/ORG/NAME. Run the same command again to go on after an
    interruption.
    """
    if isinstance(cache, str):
        hint = "kdpipe pull it, and push the folder"
        raise BadInputError("not-a-folder", cache, expected="a cache's folder", found="a store", hint=hint)
    from pipeline.push import describe_push
    from pipeline.push import push as send

    facts = send(cache, url, private=private, dry_run=dry_run, quiet=as_json)
    emit(as_json, facts, describe_push(facts))


@command()
@click.argument("url")
@click.argument("folder", type=click.Path(path_type=Path))
@as_json
def pull(url: str, folder: Path, as_json: bool) -> None:
    """Bring a finished cache from a store, or from the Hugging Face Hub.

    Every file is compared with its digest. Run the same command again to go on after an interruption.
    """
    from pipeline.pull import describe_pull
    from pipeline.pull import pull as bring

    facts = bring(url, folder, quiet=as_json)
    emit(as_json, facts, describe_pull(facts))


@command("export")
@settings(ExportConfig, "export", argument="cache")
@as_json
def export(config: ExportConfig, as_json: bool) -> None:
    """Write a cache's targets as Parquet or safetensors, for programs that do not read caches.

    Run the same command again to go on after an interruption.
    """
    from pipeline.interop.export import describe_export
    from pipeline.interop.export import export as write

    facts = write(config, quiet=as_json)
    emit(as_json, facts, describe_export(facts))


@command("import")
@settings(ImportConfig, "import")
@as_json
def import_(config: ImportConfig, as_json: bool) -> None:
    """Make a cache of Parquet files with token ids and top-k log-probabilities.

    The values have no normaliser: students are trained at temperature 1. Run the same command again to go on after
    an interruption.
    """
    from pipeline.interop.importing import import_logprobs

    result = import_logprobs(config, quiet=as_json)
    emit(as_json, result, [_made(result)])


@command("inspect")
@cache_argument
@copy_options
@as_json
def inspect(cache: Path | str, copy: CopySettings, as_json: bool) -> None:
    """Show what is in a cache, in a folder or a store, and what it costs."""
    from pipeline.inspect import describe, inspect_cache

    facts = inspect_cache(cache, copy)
    emit(as_json, facts, describe(facts))


def _paper_train(path: Path, flags: dict[str, Any]) -> tuple[dict[str, Any], PaperRows]:
    from train.paper import merged, read_paper, train_settings
    from train.paper_cache import cache_settings

    paper = read_paper(path)
    mapped = train_settings(paper, flags, num_ranks=int(os.environ.get("WORLD_SIZE", "1")))
    mapped |= cache_settings(paper, flags)
    return merged(mapped, always=True), paper.table(mapped, flags)


@command("train-student")
@settings(TrainConfig, "train-student", paper=_paper_train)
@family_options
@dry_run
@as_json
def train_student(
    config: TrainConfig, family: FamilyOptions, dry_run: bool, as_json: bool, paper: PaperRows | None = None
) -> int:
    """Train a student from a cache, without the teacher; or, with --students, many of them.

    Only copied layers are read from the teacher's files, once, at the start. Run the same command again to go on
    after an interruption.
    """
    if family.students is not None and paper is not None:
        raise click.UsageError("--paper-config is one student's: leave out --students")
    if family.students is not None:
        return run_family(config, family, dry_run=dry_run, as_json=as_json)
    family.refuse_alone()
    from train.loop import train
    from train.planning import plan
    from train.ranks import ranks_of_environment

    mapping = _said(paper, as_json)
    if dry_run:
        result = plan(config)
    elif paper is not None and any(row["key"] == "force" and row["value"] for row in paper):
        from train.set_aside import train_with_force

        result = train_with_force(config, quiet=as_json)
    else:
        result = train(config, quiet=as_json)
    if as_json:
        result = result | mapping
    if ranks_of_environment().is_first:
        emit(as_json, result, [f"{name:<18}{_shown(value)}" for name, value in result.items()])
    return EXIT_DONE


@command()
@settings(EvaluateConfig, "evaluate")
@as_json
def evaluate(config: EvaluateConfig, as_json: bool) -> None:
    """Measure models on corpora, on text and against a cache, and how fast they are."""
    from train.evaluation.evaluate import evaluate_models, report, write_report
    from train.evaluation.tables import table

    facts = report(config, evaluate_models(config, quiet=as_json))
    if config.out is not None:
        write_report(config.out, facts)
    emit(as_json, facts, table(facts))


@command("report")
@settings(ReportConfig, "report")
@as_json
def report(config: ReportConfig, as_json: bool) -> None:
    """Make one HTML page about a cache, runs, students, evaluations and a plan.

    The file holds all that it shows, and asks for nothing. With --json its facts are printed too.
    """
    from train.report.write import write_report

    facts = write_report(config)
    emit(as_json, facts, [f"{facts['out']}: {facts['bytes']:,} bytes"])


@command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Folder for all results.",
)
@as_json
def demo(out: Path, as_json: bool) -> None:
    """Run the whole pipeline offline on an embedded teacher and text."""
    from pipeline.demo import run_demo

    facts, lines = run_demo(out, quiet=as_json)
    emit(as_json, facts, lines)


@command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes kdpipe in a shell: commands, options, values and paths."""
    click.echo(shell_script(ctx.find_root().command, shell))


def _said(paper: PaperRows | None, as_json: bool) -> dict[str, Any]:
    """How a recipe's file was understood: printed for people before anything is done, returned for machines."""
    if paper is None:
        return {}
    if not as_json and os.environ.get("RANK", "0") == "0":
        from train.paper import describe

        click.echo("\n".join(describe(paper)), err=True)
    return {"paper": paper}


def _made(result: dict[str, Any]) -> str:
    return (
        f"{result['cache']}: {result['tokens']:,} tokens in {result['shards']:,} shards, {result['bytes']:,} bytes,"
        f" {result['bytes_per_token']:.2f} bytes/token"
    )


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
