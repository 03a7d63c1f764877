"""Moments of what sites read, from rows that are drawn."""

from __future__ import annotations

import pytest
import torch

from pennyweight.pipeline.network.reading import Wanted, moments_of
from pennyweight.pipeline.network.walk import Walk
from tests.pipeline.network.subjects import KINDS, subject

# Sums of the same products in another order.
CLOSE = 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_both_networks_are_read_in_the_same_places(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pennyweight.pipeline.network.reading.ROWS", 40)
    monkeypatch.setattr("pennyweight.pipeline.network.reading.ROWS_PER_INPUT", 1)
    network, batches = subject(kind)
    one, other = Walk(network, batches), Walk(network.copied(), batches)
    sites = {site.nodes[0]: site for site in network.sites}
    found = 0
    for name, node in one.nodes.items():
        if name in sites:
            moments = moments_of(sites[name], name, one, other, Wanted(has_cross=True))
            if moments is not None:
                assert moments.cross is not None
                assert (moments.hessian - moments.cross).abs().max() < CLOSE * moments.hessian.abs().max()
                assert moments.rows < 40 + sites[name].matrix_shape[1] + len(batches) * 8
                found += 1
        if node.op != "output":
            one.advance(name)
            other.advance(name)
    assert found == sum(site.kind != "embedding" for site in sites.values())


def test_another_seed_draws_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pennyweight.pipeline.network.reading.ROWS", 40)
    network, batches = subject("pictures")
    site, walk = network.site("stem"), Walk(network, batches)
    walk.advance("x")
    drawn = [moments_of(site, site.nodes[0], walk, walk, Wanted(seed=seed)) for seed in (0, 0, 1)]
    hessians = [moments.hessian for moments in drawn if moments is not None]
    assert torch.equal(hessians[0], hessians[1])
    assert not torch.equal(hessians[0], hessians[2])
