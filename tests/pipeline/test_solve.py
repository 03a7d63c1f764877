"""Groups of zeros in number formats without a 0, decoded by the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from pennyweight.core.registry import find
from pennyweight.models.base import Site
from pennyweight.models.gguf.types import BLOCK_TYPES
from pennyweight.pipeline.chain import Chain
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.solve import solve_site
from pennyweight.solvers.base import Statistics

GROUP = 32


def weight() -> torch.Tensor:
    """Groups of zeros beside others, a row of nothing else, and a group with one weight that is not 0."""
    w = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    w[0, :GROUP] = 0
    w[1, 3 * GROUP : 6 * GROUP] = 0
    w[2] = 0
    w[3, :GROUP] = 0
    w[3, 5] = 1e-3
    return w


@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs"])
@pytest.mark.parametrize("solver", ["nearest", "gptq", "hqq"])
def test_zeros_are_decoded_to_zeros_and_nothing_else_changes(name: str, solver: str) -> None:
    w, kind = weight(), BLOCK_TYPES[name.upper()]
    # Inputs that do not hang together, or gptq would put errors of its own into the zeros.
    stats = Statistics(hessian=torch.eye(512))
    site = Site("a", (5, 512), 0, "linear", "a.weight")
    chosen = find("solvers", solver)
    found = solve_site(site, w, kind.scheme, Chain(chosen, "search"), SiteStatistics(stats, 100)).weight
    before = chosen.solve(w, kind.scheme, stats).weight
    is_empty = (w.reshape(5, -1, GROUP) == 0).all(-1)
    assert int(is_empty.sum()) == 20
    assert torch.equal(found.codes, before.codes)
    assert torch.equal(found.scales[~is_empty], before.scales[~is_empty])
    decoded = gguf.quants.dequantize(kind.pack(found).numpy(), gguf.GGMLQuantizationType[name.upper()])
    groups = torch.tensor(np.asarray(decoded)).reshape(5, -1, GROUP)
    assert (groups[is_empty] == 0).all()
    assert torch.equal(groups.reshape(5, 512), found.dequantize())
    assert (before.dequantize().reshape(5, -1, GROUP)[is_empty] != 0).any()


def test_errors_that_a_solver_put_into_zeros_stay() -> None:
    w, kind = weight(), BLOCK_TYPES["IQ4_XS"]
    x = torch.randn(1000, 512, generator=torch.Generator().manual_seed(1)).cumsum(1)
    stats, gptq = Statistics(hessian=x.T @ x / 1000), find("solvers", "gptq")
    site = Site("a", (5, 512), 0, "linear", "a.weight")
    found = solve_site(site, w, kind.scheme, Chain(gptq, "search"), SiteStatistics(stats, 1000)).weight
    before = gptq.solve(w, kind.scheme, stats).weight
    differs = (found.dequantize() != before.dequantize()).reshape(5, -1, GROUP).any(-1)
    is_used = (before.codes != kind.scheme.element.encode(torch.zeros(1))).reshape(5, -1, GROUP).any(-1)
    assert is_used[1, 3:6].any()
    assert not (differs & is_used).any()
