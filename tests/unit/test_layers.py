"""Imports point one way: pipeline and train to cache_spec, never to each other, and cache_spec to neither.

In: the sources of the three packages. Out: a failure that names the file and the reversed arrow.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "cache_spec": {"pipeline", "train", "torch", "dask", "distributed", "transformers", "datasets"},
    "train": {"pipeline", "dask", "distributed"},
    "pipeline": {"train"},
}
# The composition root: here, inside functions only, commands put pipeline and train together. The settings, which
# import nothing heavy, are needed for the flags and may stand at the top.
MAY_IMPORT_INSIDE_FUNCTIONS = {
    "pipeline/commands.py": {"train"},
    "pipeline/family_command.py": {"train"},
    "pipeline/plan_command.py": {"train"},
    "pipeline/demo.py": {"train"},
}
MAY_IMPORT_AT_TOP = {
    "pipeline/commands.py": {"train.config", "train.evaluation.config", "train.report.config"},
    "pipeline/family_command.py": {"train.config"},
}


def imports(tree: ast.AST, path: str, inside_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Module, line, and whether it is inside a function, of each import in a syntax tree."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            for name in imported_names(node, path):
                yield name, node.lineno, inside_function
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, path, inside_function or is_function)


def imported_names(node: ast.Import | ast.ImportFrom | ast.Call, path: str) -> list[str]:
    """Full names of the modules that a statement, or a call of ``import_module``, imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        # ``from ..x import y`` climbs one folder for each dot after the first.
        above = path.split("/")[: -node.level] if node.level else []
        return [".".join([*above, name]) for name in ([node.module] if node.module else [a.name for a in node.names])]
    if ast.unparse(node.func).endswith(("import_module", "__import__")):
        return [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def reversed_arrows(root: Path) -> list[str]:
    """Every forbidden import below ``root``, as ``file:line: package``."""
    found = []
    for package, forbidden in FORBIDDEN.items():
        for source in sorted((root / package).rglob("*.py")):
            path = source.relative_to(root).as_posix()
            inside, at_top = (may.get(path, set()) for may in (MAY_IMPORT_INSIDE_FUNCTIONS, MAY_IMPORT_AT_TOP))
            for module, line, inside_function in imports(ast.parse(source.read_text(encoding="utf-8")), path):
                name = module.split(".")[0]
                if name in forbidden and module not in at_top and not (inside_function and name in inside):
                    found.append(f"{path}:{line}: {name}")
    return found


def test_no_layer_imports_against_the_flow_of_data() -> None:
    assert all(list((ROOT / package).rglob("*.py")) for package in FORBIDDEN)
    assert reversed_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "package"),
    [
        ("cache_spec/a.py", "import torch", "torch"),
        ("cache_spec/a.py", "import torch.nn as nn", "torch"),
        ("cache_spec/deep/a.py", "def f():\n    from datasets import Dataset", "datasets"),
        (
            "cache_spec/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from train.loop import x",
            "train",
        ),
        ("cache_spec/a.py", "try:\n    import dask\nexcept ImportError:\n    pass", "dask"),
        ("train/a.py", "from pipeline.teacher import Teacher", "pipeline"),
        ("train/a.py", "from ..pipeline import teacher", "pipeline"),
        ("train/a.py", "from .. import pipeline", "pipeline"),
        ("train/a.py", "import importlib\nimportlib.import_module('pipeline.teacher')", "pipeline"),
        ("train/a.py", "import distributed", "distributed"),
        ("pipeline/a.py", "def f():\n    import train.loop", "train"),
        ("pipeline/commands.py", "import train.loop", "train"),
        ("pipeline/demo.py", "class A:\n    import train.loop", "train"),
    ],
)
def test_a_reversed_arrow_is_found(tmp_path: Path, path: str, source: str, package: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    line = source.count("\n") + 1 if "except" not in source else 2
    assert reversed_arrows(tmp_path) == [f"{path}:{line}: {package}"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cache_spec/a.py", "import numpy\nfrom cache_spec.manifest import Manifest\nfrom . import layout"),
        ("train/a.py", "import torch.distributed\nfrom torch import distributed\nfrom .order import x"),
        ("pipeline/a.py", "import dask, distributed, torch\nfrom cache_spec import reader"),
        ("pipeline/commands.py", "from train.config import TrainConfig\ndef f():\n    from train.loop import x"),
        ("pipeline/demo.py", "async def f():\n    import train.loop"),
    ],
)
def test_arrows_to_the_right_are_let_pass(tmp_path: Path, path: str, source: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert reversed_arrows(tmp_path) == []


READ_WITHOUT_HEAVY_PACKAGES = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("the hook does not refuse")
from cache_spec.reader import CacheReader
from cache_spec.validate import verify_cache
import cache_spec.commit
batch = CacheReader.open({cache!r}).batch([3, 0], 2.0)
assert batch.targets.logprobs_BTK.shape == (2, 8, 5)
assert verify_cache({cache!r}) == []
"""


def test_a_cache_is_read_and_verified_with_torch_and_dask_not_importable() -> None:
    cache = ROOT / "tests" / "conformance" / "valid" / "prototype"
    script = READ_WITHOUT_HEAVY_PACKAGES.replace("{forbidden}", repr(FORBIDDEN["cache_spec"])).replace(
        "{cache!r}", f"__import__('pathlib').Path({str(cache)!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
