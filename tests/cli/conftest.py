"""A tiny model, text, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pennyweight.cli.main import app
from tests.pipeline import tiny

Command = Callable[..., Result]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.text_file(tmp_path_factory.mktemp("cli-text"))


@pytest.fixture(scope="session")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli-artefact") / "out"
    tiny.run(model, out)
    return out


@pytest.fixture
def pennyweight() -> Command:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run
