"""What the documentation shows is so: every block runs or says what it needs, examples run, the site is whole."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import cli
from pipeline.help_page import ManualCommand
from pipeline.manual import MANUALS, Example
from pipeline.settings import COMMANDS
from tests.documented import NEEDS, SHOWN, blocks, commands, parse, run_block, run_notebook
from tests.models import make_folder
from tools import draw_pictures
from tools.check_site import problems
from tools.site_text import with_links_to_pages

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "reference" / "commands"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cache_spec/SPEC.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if GENERATED not in page.parents),
]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
"""A machine may have fewer cores than there are workers."""
EXAMPLES = [(name, example) for name in COMMANDS for example in MANUALS[name].examples]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def reader_s_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: a teacher by the names that they use, small enough for seconds, and text."""
    folder = tmp_path_factory.mktemp("documentation")
    make_folder(folder / "my-teacher", num_hidden_layers=12, max_position_embeddings=1024, spread=4.0)
    (folder / "gpt2").symlink_to("my-teacher")
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "demo_teacher").symlink_to(ROOT / "pipeline" / "demo_teacher")
    words = np.random.default_rng(0).integers(2, 100, size=9_500)
    for name, part in (("my-text.txt", words[:6500]), ("held-out.txt", words[6500:])):
        (folder / name).write_text(" ".join(f"w{word}" for word in part))
    ids = [words[start : start + 50].astype(np.uint16) for start in range(0, 500, 50)]
    (folder / "binarized.pickle").write_bytes(pickle.dumps(ids))
    return folder


@pytest.fixture(scope="module")
def examples_run(reader_s_folder: Path) -> dict[str, int]:
    """The exit code of each example of the manual, run one after the other; what they made stays for the pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(reader_s_folder)
        codes = {
            example.command: cli.run(next(commands(example.command))[1:])
            for _, example in EXAMPLES
            if example.needs is None
        }
        for name, of in (("cache", "caches/mine"), ("student", "runs/two/student")):
            Path(name).symlink_to(of)
    return codes


@pytest.fixture
def there(reader_s_folder: Path, examples_run: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(reader_s_folder)
    return reader_s_folder


def test_every_command_has_a_manual_with_examples() -> None:
    assert list(MANUALS) == [name for name in MANUALS if name in COMMANDS]
    for name in COMMANDS:
        command = cli.cli.get_command(cli.cli.make_context("kdpipe", [name], resilient_parsing=True), name)
        assert isinstance(command, ManualCommand), name
        assert command.manual.examples, name
        assert set(command.manual.see_also) <= set(COMMANDS), name


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[f"{name}: {example.says}" for name, example in EXAMPLES])
def test_every_example_is_of_its_command_and_parses(name: str, example: Example) -> None:
    (words,) = commands(example.command)
    assert words[words.index("kdpipe") + 1] == name
    parse(words)


def test_examples_that_need_nothing_run(examples_run: dict[str, int]) -> None:
    assert {command: code for command, code in examples_run.items() if code} == {}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_runs_or_is_marked(page: Path, there: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.needs is None and block.language not in SHOWN:
            run_block(block, namespace)
        elif block.needs is not None:
            assert block.needs in NEEDS, block


def test_the_notebook_runs_and_stores_nothing_of_a_machine(there: Path) -> None:
    notebook = ROOT / "examples" / "cache_and_train.ipynb"
    stored = json.loads(notebook.read_text(encoding="utf-8"))
    assert [cell["outputs"] for cell in stored["cells"] if cell.get("outputs")] == []
    assert not re.search(r"/(home|root|tmp|work|Users)/", notebook.read_text(encoding="utf-8"))
    run_notebook(notebook)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_of_marked_blocks_have_flags_that_exist(page: Path) -> None:
    for block in blocks(page):
        if block.needs is not None and block.language in ("bash", ""):
            for words in commands(block.text):
                if "kdpipe" in words and words[0] != "python":
                    parse(words)


def test_a_block_that_is_neither_run_nor_marked_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- needs: hub -->\n```bash\nls\n```\n\n```bash\nls\n```\n\n    kdpipe verify\n")
    marked, *rest = blocks(page)
    assert marked.needs == "hub"
    assert [block.needs for block in rest] == [None, None]
    for block in rest:
        with pytest.raises(AssertionError, match="mark"):
            run_block(block, {})


def test_pictures_are_as_their_script_draws_them() -> None:
    assert {path.stem for path in draw_pictures.FOLDER.iterdir()} == set(draw_pictures.PICTURES)
    for name, draw in draw_pictures.PICTURES.items():
        assert (draw_pictures.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == draw()


def test_a_broken_link_and_a_foreign_script_are_found(tmp_path: Path) -> None:
    good = '<a href="b.html#there">b</a><a href="https://example.org">out</a><img src="data:,">'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1>')
    assert list(problems(tmp_path)) == []
    bad = '<a href="c.html">c</a><a href="b.html#gone">b</a><script src="https://example.org/x.js"></script>'
    (tmp_path / "a.html").write_text(bad)
    assert len(list(problems(tmp_path))) == 3


@pytest.mark.parametrize(
    "loads",
    [
        """<style>a { background: url("https://example.org/x.png") }</style>""",
        "<p style='background: URL( //example.org/x.png )'></p>",
        """<img src="data:," srcset="data:,x 1x, https://example.org/x.png 2x">""",
        *(f'<{tag} src="https://example.org/x"></{tag}>' for tag in ("video", "audio", "track", "iframe")),
        """<video poster="//example.org/x.png"></video>""",
        """<svg><image href="https://example.org/x.png"/></svg>""",
    ],
)
def test_whatever_a_page_loads_from_elsewhere_is_found(tmp_path: Path, loads: str) -> None:
    (tmp_path / "a.html").write_text(f"<style>a {{ color: red }}</style>{loads}<p>url(https://example.org/text)</p>")
    assert len(list(problems(tmp_path))) == 1


@pytest.mark.parametrize(
    ("style", "number"),
    [
        ("a { background: url(https://example.org/a) } b { background: url('//example.org/b') }", 2),
        ("""@import "https://example.org/c.css"; a { background: url("https://example.org/a") }""", 2),
        ("/* url(https://example.org) */ a { background: url(data:,x), url('d.png'), url(#e) }", 0),
    ],
)
def test_whatever_a_style_sheet_loads_from_elsewhere_is_found(tmp_path: Path, style: str, number: int) -> None:
    (tmp_path / "a.html").write_text("<p>a</p>")
    (tmp_path / "a.css").write_text(style)
    assert len(list(problems(tmp_path))) == number


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_of_a_page_lead_to_files_of_a_bare_clone(page: Path) -> None:
    text = re.sub(r"^(```+).*?^\1|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for address in re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", text):
        target = (page.parent / address).resolve()
        assert target.exists(), address
        assert GENERATED not in (target, *target.parents), address


def test_help_of_a_command_becomes_a_link_to_its_page() -> None:
    text = "`kdpipe verify --help`, `kdpipe --help`, `kdpipe COMMAND --help`, [`kdpipe verify --help`](x.md)"
    assert with_links_to_pages(text) == (
        "[`kdpipe verify --help`](/reference/commands/verify.md), [`kdpipe --help`](/reference/commands/index.md),"
        " `kdpipe COMMAND --help`, [`kdpipe verify --help`](x.md)"
    )
