"""The cost of an embedding against transformers' own logits of the changed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.costs import embedding
from pennyweight.pipeline.costs.embedding import EmbeddingCost
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest
from tests.models.families import FAMILIES, build, save, token_batches
from tests.pipeline.costs.originals import whole

# Divergences of 1e-3 from logits in float32.
TOLERANCE = 1e-2
SCHEMES = (parse_scheme("int3-channel-f32"), None, parse_scheme("int4-channel-f32"))


@pytest.mark.parametrize("is_tied", [False, True])
def test_it_is_the_divergence_of_the_model_with_that_embedding(
    is_tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAMILIES["llama"].config | {"tie_word_embeddings": is_tied}
    directory = save(build("LlamaForCausalLM", config), tmp_path / "model")
    model = StreamedModel(directory)
    assert model.embedding is not None
    told: list[tuple[int, int]] = []
    read: list[str] = []
    original = embedding.stored_matrix
    monkeypatch.setattr(
        embedding, "stored_matrix", lambda checkpoint, site: read.append(site.name) or original(checkpoint, site)
    )
    [found] = EmbeddingCost().measure(
        model,
        token_batches(),
        [Candidates((model.embedding.name,), SCHEMES)],
        solver=Nearest(),
        seed=0,
        scratch=tmp_path,
        tell=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert read == [model.embedding.name]
    reference = whole(directory)
    for scheme, cost in zip(SCHEMES, found, strict=True):
        changed = whole(directory)
        table = changed.get_input_embeddings().weight
        assert (table is changed.get_output_embeddings().weight) == is_tied
        if scheme is not None:
            weight = Nearest().solve(table.detach().float(), scheme, Statistics()).weight
            table.data.copy_(weight.dequantize())
        total = 0.0
        for batch in token_batches():
            with torch.no_grad():
                p, q = (one(batch).logits.log_softmax(-1) for one in (reference, changed))
            total += float((p.exp() * (p - q)).sum())
        expected = total / sum(batch.numel() for batch in token_batches())
        assert cost == pytest.approx(expected, rel=TOLERANCE)
        assert (cost == 0) == (scheme is None)
