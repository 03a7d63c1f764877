"""Rows of an embedding, as they are read back from what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.pipeline.output import Output
from pennyweight.pipeline.prepare import prepare
from pennyweight.pipeline.rows import stored_matrix
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest
from tests.pipeline.gguf_files import BLIND, tiny_model

# Neighbours, repetitions, the first row and the last; in an order of their own.
IDS = torch.tensor([[7, 257, 3, 4, 5], [0, 4, 256, 0, 9]])


@pytest.mark.parametrize("scheme", ["q6_k", "iq4_xs"])
def test_rows_of_an_embedding_are_those_of_the_whole_and_no_others_are_read(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model(tmp_path / "model", hidden_size=256)
    job = prepare(str(source), replace(BLIND, at=(f"*embed*={scheme}",)), None)
    embedding = job.model.embedding
    assert embedding is not None
    w = stored_matrix(job.model.checkpoint, embedding).float()
    weight = Nearest().solve(w, job.plan.schemes[embedding.name], Statistics()).weight
    (tmp_path / "out").mkdir()
    with job.layout.create(tmp_path / "out") as files:
        output = Output(files, job.container, job.plan, job.model.checkpoint)
        output.write(embedding, weight)
        read: list[slice | None] = []
        original = type(files).read

        def noted(self: object, name: str, rows: slice | None = None) -> Tensor:
            read.append(rows)
            return original(files, name, rows)

        monkeypatch.setattr(type(files), "read", noted)
        found = output.embedding_rows(embedding, IDS)
        assert read == [slice(0, 1), slice(3, 6), slice(7, 8), slice(9, 10), slice(256, 258)]
        assert torch.equal(found, weight.dequantize()[IDS])
        assert torch.equal(output.embedding_rows(embedding, IDS[:, :1]), weight.dequantize()[IDS[:, :1]])
        assert torch.equal(output.read_rows(embedding, slice(3, 200)).dequantize(), weight.dequantize()[3:200])
        assert torch.equal(output.read_rows(embedding, slice(None)).dequantize(), weight.dequantize())
