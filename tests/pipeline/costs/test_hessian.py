"""Lost output energies against their definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.core.registry import find
from pennyweight.models.streamed import StreamedModel
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest
from tests.models.families import FAMILIES, build, save, token_batches
from tests.pipeline.costs.originals import calls_of, weights_of

# float32 through two blocks.
TOLERANCE = 1e-3
SCHEME = parse_scheme("int4-channel-f32")
TOKENS = 4 * 20


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_costs_are_shares_of_the_output_s_energy_that_are_lost(family: str, tmp_path: Path) -> None:
    # No matrix of a block has more rows than are looked at.
    config = FAMILIES[family].config | {"intermediate_size": 32}
    directory = save(build(FAMILIES[family].architecture, config), tmp_path / "model")
    model = StreamedModel(directory)
    sites = model.sites
    assert [site.name for site in sites if max(site.shape) > 32] == ["lm_head"]
    groups = [Candidates((site.name,), (None, SCHEME)) for site in sites]
    cost = find("pipeline.costs", "hessian")
    rows = cost.measure(model, token_batches(), groups, solver=Nearest(), seed=0, scratch=tmp_path / "kept")
    calls = [calls_of(directory, batch) for batch in token_batches()]
    weights = weights_of(model)
    compared = 0
    for site, [none, found] in zip(sites, rows, strict=True):
        x = torch.cat([x for batch in calls for x, _ in batch[site.name]])
        assert none == 0
        if len(x) >= site.shape[1]:
            compared += 1
            assert found == pytest.approx(_lost(weights[site.name].double(), x), rel=TOLERANCE), site.name
    assert len(calls[0]["lm_head"][0][0]) == 3 * 20
    assert compared > len(sites) / 2
    together = Candidates(tuple(site.name for site in sites), (SCHEME,))
    [[total]] = cost.measure(model, token_batches(), [together], solver=Nearest(), seed=0, scratch=tmp_path / "kept")
    assert total == pytest.approx(sum(found for _, found in rows), rel=1e-9)


def _lost(w: Tensor, x: Tensor) -> float:
    statistics = Statistics((x.T @ x / len(x)).float())
    e = w - Nearest().solve(w.float(), SCHEME, statistics).weight.dequantize()
    share, rows = len(x) / TOKENS, slice(None, None, -(-len(w) // 32))
    return share * float((x @ e[rows].T).square().sum() / (x @ w[rows].T).square().sum())
