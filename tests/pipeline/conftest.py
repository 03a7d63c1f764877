"""One tiny model and one artefact of it for all tests of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pennyweight.pipeline.records import RunReport
from tests.pipeline import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunReport]:
    """An uninterrupted run of `model` with the usual options."""
    out = tmp_path_factory.mktemp("done") / "out"
    return out, tiny.run(model, out)
