"""A tiny model and artefacts of it for all tests of the folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.pipeline import tiny


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture(scope="session")
def artefact(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefact") / "int3"
    tiny.run(original, out, replace(tiny.OPTIONS, scheme="int3-g16"))
    return out


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.text_file(tmp_path_factory.mktemp("text"), count=60, seed=3)
