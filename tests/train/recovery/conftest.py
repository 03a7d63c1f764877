"""A tiny random Llama, quantized coarsely, and windows of text for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.rows import stored_matrix
from pennyweight.schemes import QuantizedWeight, parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest
from tests.pipeline import tiny


@dataclass(frozen=True)
class Case:
    path: Path
    model: StreamedModel
    windows: Tensor

    def weights(self, name: str) -> dict[str, QuantizedWeight]:
        """Every site rounded to nearest."""
        found = {}
        scheme = parse_scheme(name)
        for site in self.model.sites:
            w = stored_matrix(self.model.checkpoint, site).float().contiguous()
            found[site.name] = Nearest("minmax").solve(w, scheme, Statistics()).weight
        return found


def case(path: Path, *, windows: int = 80, length: int = 24) -> Case:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, tiny.VOCABULARY, (windows, length), generator=generator)
    return Case(path, StreamedModel(path), ids)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tiny.llama(tmp_path_factory.mktemp("original") / "model", num_hidden_layers=2))
