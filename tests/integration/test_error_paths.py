"""Every command's ways to be refused: the exit code, exactly one line on standard error, no traceback.

In: a table of commands that must fail, in a folder of things that are wrong. A command without rows for wrong usage and
for bad input fails a test.
"""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.settings import COMMANDS
from tests.models import make_folder, write_words

CAPTURE = "cache-teacher --block-tokens 16 --hidden-window 0 --encoding topk --k 4 --device cpu"
TRAIN = "train-student --device cpu --num-layers 1"
PATHS = "--teacher teacher --text text.jsonl --out new"

ROWS: list[tuple[str, int, str]] = [
    # wrong usage of each command
    *(
        (f"{name} --nonsense", 2, f"^error: usage: No such option '--nonsense'.*; see kdpipe {name} --help$")
        for name in COMMANDS
    ),
    ("", 2, ""),
    ("nonsense", 2, "No such command 'nonsense'"),
    ("--nonsense", 2, "No such option '--nonsense'"),
    ("demo --out", 2, "'--out' requires an argument"),
    ("cache-teacher", 2, "--teacher is required"),
    ("cache-teacher --teacher teacher --out new", 2, "--text is required"),
    (f"{CAPTURE} {PATHS} --k many", 2, "--k: Input should be a valid integer"),
    (f"{CAPTURE} {PATHS} --k 0", 2, "--k: Input should be greater than or equal to 1"),
    (f"{CAPTURE} {PATHS} --temperatures 2,1", 2, "distinct and ascending"),
    (f"{CAPTURE} {PATHS} --last-block maybe", 2, "'maybe' is not one of"),
    (f"{CAPTURE} {PATHS} --draws 9", 2, "draws means nothing to encoding topk"),
    (f"{CAPTURE} {PATHS} --limit-tokens 3", 2, "less than one block"),
    (f"{CAPTURE} {PATHS} --config demo --paper-config paper.json", 2, "not both"),
    ("import-pickle", 2, "Missing"),
    ("import-pickle ids.pickle --out new", 2, "Missing option '--tokenizer'"),
    ("transcode", 2, "is required"),
    ("transcode cache", 2, "--out is required"),
    ("transcode cache --out new --temperatures x", 2, "--temperatures: Input should be a valid number"),
    ("verify", 2, "Missing argument 'CACHE'"),
    ("verify cache other", 2, "unexpected extra argument"),
    ("verify cache --shallow --deep", 2, "--shallow or --deep, not both"),
    ("verify cache --batches 2", 2, "--batches needs --deep"),
    ("verify cache --copy-gb x", 2, "--copy-gb: Input should be a valid number"),
    ("repair", 2, "Missing argument 'CACHE'"),
    ("push cache", 2, "Missing argument 'URL'"),
    ("pull s3://bucket/name", 2, "Missing argument 'FOLDER'"),
    ("inspect", 2, "Missing argument 'CACHE'"),
    ("train-student", 2, "--cache is required"),
    ("train-student --cache cache", 2, "--out is required"),
    (f"{TRAIN} --cache cache --out new --student-config {{", 2, "--student-config: not JSON"),
    (f"{TRAIN} --cache cache --out new --layer-indices 0", 2, "num_layers or layer_indices, not both"),
    (f"{TRAIN} --cache cache --out new --control", 2, "--control needs --students"),
    ("evaluate --text text.jsonl", 2, "--models is required"),
    ("evaluate --models teacher", 2, "^error: usage: give "),
    ("plan", 2, "--teacher is required"),
    ("plan --teacher gpt2", 2, "--student is required"),
    ("plan --teacher gpt2 --student 2 --tokens many", 2, "--tokens: Input should be a valid integer"),
    ("plan --teacher gpt2 --student 2", 2, "^error: usage: "),
    ("export cache --out new", 2, "--to is required"),
    ("export cache --to csv --out new", 2, "'csv' is not one of"),
    ("export cache --to safetensors --k 2 --out new", 2, "k means nothing to safetensors"),
    ("import --out new --tokenizer teacher", 2, "is required"),
    ("import --from rows.parquet --out new --tokenizer teacher --shift 2", 2, "--shift: Input should be"),
    ("report", 2, "--out is required"),
    ("report --out new", 2, "^error: usage: "),
    ("completion", 2, "Missing argument"),
    ("completion cmd", 2, "'cmd' is not one of"),
    # what is not there, or is something else
    ("demo --out file/below", 3, "^error: cannot-write: "),
    (f"{CAPTURE} --teacher nobody --text text.jsonl --out new", 3, "^error: unknown-teacher: "),
    (f"{CAPTURE} --teacher no-tokenizer --text text.jsonl --out new", 3, "^error: no-tokenizer: "),
    (f"{CAPTURE} --teacher teacher --text nothing.txt --out new", 3, "^error: unknown-text: "),
    (f"{CAPTURE} --teacher teacher --text blank.txt --out new", 3, "^error: no-text: "),
    (f"{CAPTURE} --teacher teacher --text latin.txt --out new", 3, "^error: invalid-utf8: "),
    (f"{CAPTURE} --teacher teacher --text text.jsonl --text-field body --out new", 3, "^error: "),
    (f"{CAPTURE} --teacher teacher --text text.jsonl --out file/below", 3, "^error: "),
    (f"{CAPTURE} {PATHS} --config nobody", 3, "^error: unknown-recipe: nobody, expected a YAML file or one of .*demo"),
    (f"{CAPTURE} {PATHS} --config wrong-key.yaml", 3, "^error: unknown-key: wrong-key.yaml: cache-teacher: teecher"),
    (f"{CAPTURE} {PATHS} --config wrong-section.yaml", 3, "^error: unknown-key: wrong-section.yaml: capture"),
    (f"{CAPTURE} {PATHS} --config wrong-value.yaml", 3, "^error: bad-recipe: wrong-value.yaml: cache-teacher: levels"),
    (f"{CAPTURE} {PATHS} --config broken.yaml", 3, "^error: bad-recipe: broken.yaml"),
    (f"{CAPTURE} {PATHS} --paper-config nobody.json", 3, "^error: "),
    ("import-pickle nobody.pickle --tokenizer teacher --out new", 3, "^error: "),
    ("import-pickle text.jsonl --tokenizer teacher --out new", 3, "^error: "),
    ("import-pickle hostile.pickle --tokenizer teacher --out new", 3, "^error: "),
    ("import-pickle ids.pickle --tokenizer nobody --out new", 3, "^error: unknown-teacher: "),
    ("transcode nobody --out new", 3, "^error: not-a-cache: "),
    ("transcode unfinished --out new", 3, "^error: unfinished-cache: "),
    ("transcode damaged --out new", 3, "^error: digest-mismatch: "),
    ("transcode cache --out new --encoding hidden", 3, "^error: "),
    ("transcode cache --out new --encoding topk --k 64", 3, "^error: "),
    ("verify nobody", 3, ""),
    ("verify damaged", 3, ""),
    ("verify unfinished --shallow", 3, ""),
    ("verify s3://", 3, ""),
    ("verify cache --deep --teacher nobody", 3, "^error: unknown-teacher: "),
    ("repair nobody", 3, "^error: not-a-cache: "),
    ("repair s3://bucket/name", 3, "^error: not-a-folder: "),
    ("repair cut --teacher nobody", 3, "^error: unknown-teacher: "),
    ("push nobody s3://bucket/name", 3, "^error: not-a-cache: "),
    ("push unfinished s3://bucket/name", 3, "^error: unfinished-cache: "),
    ("push cache folder", 3, "^error: "),
    ("push s3://bucket/a s3://bucket/b", 3, "^error: not-a-folder: "),
    ("pull folder new", 3, "^error: "),
    ("inspect nobody", 3, "^error: not-a-cache: "),
    ("inspect damaged", 3, "^error: digest-mismatch: "),
    (f"{TRAIN} --cache nobody --out new", 3, "^error: not-a-cache: "),
    (f"{TRAIN} --cache unfinished --out new", 3, "^error: unfinished-cache: "),
    (f"{TRAIN} --cache cache --out new --temperature 3", 3, "^error: undeclared-temperature: "),
    (f"{TRAIN} --cache cache --out new --teacher nobody", 3, "^error: unknown-teacher: |^error: "),
    (f"{TRAIN} --cache cache --out new --config nobody", 3, "^error: unknown-recipe: "),
    (f"{TRAIN} --cache cache --out new --students nobody", 3, "^error: unknown-recipe: "),
    ("evaluate --models nobody --text held-out.txt --device cpu", 3, "^error: "),
    ("evaluate --models teacher --text nobody.txt --device cpu", 3, "^error: "),
    ("evaluate --models no-tokenizer --text held-out.txt --device cpu", 3, "^error: "),
    ("evaluate --models teacher --cache unfinished --device cpu", 3, "^error: unfinished-cache: "),
    ("plan --teacher nobody --student 2 --tokens 4096 --device a100", 3, "^error: "),
    ("plan --teacher gpt2 --student 2 --tokens 4096 --device abacus", 3, "^error: "),
    ("plan --teacher gpt2 --student 2 --tokens 4096 --device a100 --runs nobody", 3, "^error: "),
    ("export nobody --to parquet --out new", 3, "^error: not-a-cache: "),
    ("export unfinished --to parquet --out new", 3, "^error: unfinished-cache: "),
    ("export cache --to parquet --temperature 3 --out new", 3, "^error: undeclared-temperature: "),
    ("import --from nobody.parquet --out new --tokenizer teacher", 3, "^error: "),
    ("import --from text.jsonl --out new --tokenizer teacher", 3, "^error: "),
    ("import --from rows.parquet --out new --tokenizer nobody", 3, "^error: "),
    ("import --from exported --out new --tokenizer teacher", 3, "^error: other-logprobs: "),
    ("report --cache nobody --out new", 3, "^error: not-a-cache: "),
    ("report --cache damaged --out new", 3, "^error: digest-mismatch: "),
    ("report --run nobody --out new", 3, "^error: "),
    ("report --plan text.jsonl --out new", 3, "^error: "),
    # what going on would lose
    ("export cache --to parquet --out foreign", 4, "^error: "),
    ("import --from exported --logprobs renormalised --out foreign --tokenizer teacher", 4, "^error: not-a-cache: "),
    ("demo --out foreign", 4, "^error: not-a-demo: "),
    (f"{CAPTURE} --teacher teacher --text text.jsonl --out foreign", 4, "^error: not-a-cache: "),
    (f"{CAPTURE} --teacher teacher --text text.jsonl --out file", 4, "^error: not-a-folder: "),
    (f"{CAPTURE} --teacher teacher --text text.jsonl --out cache --k 5", 4, "^error: "),
    ("import-pickle ids.pickle --tokenizer teacher --out foreign", 4, "^error: "),
    ("transcode cache --out foreign", 4, "^error: not-a-cache: "),
    (f"{TRAIN} --cache cache --teacher teacher --out foreign", 4, "^error: "),
]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what users have: things that are right, and many that are wrong."""
    folder = tmp_path_factory.mktemp("errors")
    make_folder(folder / "teacher")
    make_folder(folder / "no-tokenizer")
    for path in (folder / "no-tokenizer").glob("tokenizer*"):
        path.unlink()
    write_words(folder / "text.jsonl")
    (folder / "held-out.txt").write_text("w2 w3 w4 w5 w6 w7")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "file").write_text("mine")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "diary.txt").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.run(f"{CAPTURE} --teacher teacher --text text.jsonl --out cache".split()) == 0
        assert cli.run(["export", "cache", "--to", "parquet", "--out", "exported"]) == 0
    for name in ("unfinished", "damaged", "cut"):
        shutil.copytree(folder / "cache", folder / name)
    (folder / "unfinished" / "seal.json").unlink()
    with next((folder / "cut").glob("*/c.*.0.0")).open("r+b") as shard:
        shard.truncate(3)
    sealed = folder / "damaged" / "manifest.json"
    sealed.write_bytes(sealed.read_bytes().replace(b'"num_blocks":', b'"num_blocks": '))
    (folder / "rows.parquet").write_bytes(next((folder / "exported").rglob("*.parquet")).read_bytes())
    (folder / "ids.pickle").write_bytes(pickle.dumps([[1, 2, 3]]))
    (folder / "hostile.pickle").write_bytes(pickle.dumps(shutil.rmtree))
    for name, body in {
        "wrong-key": "cache-teacher: {teecher: x}",
        "wrong-section": "capture: {teacher: x}",
        "wrong-value": "cache-teacher: {levels: many}",
        "broken": "cache-teacher: [",
    }.items():
        (folder / f"{name}.yaml").write_text(body)
    return folder


@pytest.mark.parametrize(("line", "code", "message"), ROWS, ids=[line or "nothing" for line, _, _ in ROWS])
def test_a_refusal_is_one_line_and_a_stable_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    things: Path,
    line: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(things)
    before = visible(things)
    assert cli.run(line.split()) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if message:
        assert re.search(message, err), err
        assert err.count("\n") == 1, err
    shutil.rmtree(things / "new", ignore_errors=True)
    assert visible(things) == before


def visible(folder: Path) -> set[str]:
    """Names of all files below a folder but locks and notes of our own."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if "/." not in name and not name.startswith(("new/", "."))}


def test_every_command_has_rows_for_wrong_usage_and_for_bad_input() -> None:
    codes: dict[str, set[int]] = {name: set() for name in COMMANDS}
    for line, code, _ in ROWS:
        name = line.split()[0] if line else ""
        if name in codes:
            codes[name].add(code)
    without_input = {"completion"}
    assert {name: found for name, found in codes.items() if not {2, 3} <= found} == {
        name: {2} for name in without_input
    }
