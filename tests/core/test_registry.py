"""Plug-ins are found by scanning a folder, and through entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pennyweight
from pennyweight.core import registry
from pennyweight.core.errors import UsageError
from pennyweight.core.registry import find, provided

ONE = "from types import SimpleNamespace\nPROVIDES = (SimpleNamespace(name='{a}'), SimpleNamespace(name='{b}'))\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder `things` of plug-ins: two modules that provide, one that does not."""
    things = tmp_path / "things"
    things.mkdir()
    (things / "__init__.py").write_text("")
    (things / "first.py").write_text(ONE.format(a="walnut", b="apple"))
    (things / "second.py").write_text(ONE.format(a="pear", b="date"))
    (things / "base.py").write_text("class Thing: ...\n")
    monkeypatch.setattr(pennyweight, "__path__", [*pennyweight.__path__, str(tmp_path)])
    yield "things"
    provided.cache_clear()
    for name in [name for name in sys.modules if name.startswith("pennyweight.things")]:
        del sys.modules[name]


def test_every_module_that_provides_is_found_in_order_of_name(folder: str) -> None:
    assert list(provided(folder)) == ["apple", "date", "pear", "walnut"]
    assert find(folder, "pear").name == "pear"


def test_folders_in_the_folder_are_not_imported(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder / "deeper").mkdir()
    (tmp_path / folder / "deeper" / "__init__.py").write_text(ONE.format(a="fig", b="plum"))
    provided.cache_clear()
    assert "fig" not in provided(folder)
    assert f"pennyweight.{folder}.deeper" not in sys.modules


def test_entry_points_bring_the_same_objects(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Thing:
        name: str = "quince"

    class Point:
        def load(self) -> Thing:
            return Thing()

    def points(*, group: str) -> list[Point]:
        return [Point()] if group == f"pennyweight.{folder}" else []

    provided.cache_clear()
    monkeypatch.setattr(registry, "entry_points", points)
    assert find(folder, "quince") == Thing()


def test_an_unknown_name_is_answered_with_those_there_are(folder: str) -> None:
    with pytest.raises(UsageError, match="'plum' is not one of the things: apple, date, pear, walnut"):
        find(folder, "plum")


def test_the_scan_is_made_once() -> None:
    assert provided("solvers") is provided("solvers")
    assert {"nearest", "gptq"} <= set(provided("solvers"))
