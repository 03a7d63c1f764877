"""The habits of the house that no linter checks."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pennyweight
from pennyweight.core.registry import provided

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "pennyweight"
MODULES = sorted(SOURCE.rglob("*.py"))
NATIVE = sorted((ROOT / "csrc").glob("*.cc")) + sorted((ROOT / "csrc").glob("*.h"))
FILE_LINES, FUNCTION_LINES = 400, 60


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _plug_ins(path: Path) -> bool:
    return any(
        isinstance(node, ast.Assign | ast.AnnAssign)
        and any(isinstance(name, ast.Name) and name.id == "PROVIDES" for name in ast.walk(node))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


PROVIDING = [path for path in MODULES if _plug_ins(path)]


def _modules_after(code: str) -> set[str]:
    """The names of the modules that a fresh interpreter has loaded after running `code`."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=SOURCE.parent,
    )
    return set(shown.stdout.split())


def test_importing_pennyweight_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "rich"}
    assert not heavy & _modules_after("import pennyweight\nassert pennyweight.__version__\ndir(pennyweight)")


def test_an_unknown_attribute_is_named_in_the_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = pennyweight.quantise


@pytest.mark.parametrize("name", sorted(pennyweight._LAZY))
def test_every_lazy_attribute_can_be_had(name: str) -> None:
    assert name in pennyweight.__all__
    assert name in dir(pennyweight)
    assert getattr(pennyweight, name).__module__ == pennyweight._LAZY[name]


def test_there_are_plug_ins() -> None:
    assert {path.parent.name for path in PROVIDING} >= {"formats", "solvers"}


@pytest.mark.parametrize("path", PROVIDING, ids=_named)
def test_every_plug_in_is_found_by_its_name(path: Path) -> None:
    folder = ".".join(path.parent.relative_to(SOURCE).parts)
    module = importlib.import_module(f"pennyweight.{folder}.{path.stem}")
    found = provided(folder)
    assert module.PROVIDES
    for thing in module.PROVIDES:
        assert found[thing.name] is thing


@pytest.mark.parametrize("path", MODULES + NATIVE, ids=_named)
def test_a_file_holds_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


@pytest.mark.parametrize("path", MODULES, ids=_named)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", MODULES, ids=_named)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_file_is_a_drawer_for_everything() -> None:
    assert not [path for path in MODULES if path.stem in {"utils", "util", "helpers", "misc", "common"}]
