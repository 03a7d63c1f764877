"""A network computed node after node."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.core.errors import DataError
from pennyweight.models.network import Network
from pennyweight.models.network.network import Inputs
from pennyweight.pipeline.network.shelf import Shelf, shelf
from pennyweight.pipeline.network.walk import Walk
from tests.pipeline.network.subjects import KINDS, subject


def walked(network: Network, batches: list[Inputs], kept: Shelf | None = None) -> list[Tensor]:
    walk = Walk(network, batches, kept)
    names = [name for name, node in walk.nodes.items() if node.op != "output"]
    for name in names:
        walk.advance(name)
    return [walk.result([], batch)[0] for batch in range(len(batches))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_gives_what_the_graph_gives(kind: str) -> None:
    network, batches = subject(kind)
    with torch.no_grad():
        for found, batch in zip(walked(network, batches), batches, strict=True):
            assert torch.equal(found, network(batch))


@pytest.mark.parametrize("memory_bytes", [1, 3000, 1 << 30])
def test_values_in_files_are_the_same(memory_bytes: int) -> None:
    network, batches = subject("pictures")
    with shelf(memory_bytes) as kept:
        found = walked(network, batches, kept)
        assert all(torch.equal(one, other) for one, other in zip(found, walked(network, batches), strict=True))
        assert (kept.filed_bytes > 0) == (memory_bytes < 1 << 30)


def test_values_that_nobody_reads_any_more_make_room() -> None:
    network, batches = subject("pictures")
    largest = 6 * 8 * 8 * 8 * 4 * len(batches)
    with shelf(1 << 30) as kept:
        walk, most = Walk(network, batches, kept), 0
        for name, node in walk.nodes.items():
            if node.op != "output":
                walk.advance(name)
                most = max(most, kept.used_bytes)
        # Three values of the largest kind are alive beside a shortcut.
        assert largest < most <= 4 * largest
        walk.at.clear()
        gc.collect()
        # The inputs themselves.
        assert kept.used_bytes == 6 * 3 * 8 * 8 * 4 * len(batches)


def test_no_more_than_the_limit_lies_in_memory() -> None:
    network, batches = subject("pictures")
    with shelf(20_000) as kept:
        walk = Walk(network, batches, kept)
        for name, node in walk.nodes.items():
            if node.op != "output":
                walk.advance(name)
                assert kept.used_bytes <= 20_000


def test_files_are_gone_afterwards() -> None:
    with shelf(1) as kept:
        place: Path = kept._place
        mapped = kept.put([torch.arange(100.0)])[0]
        assert torch.equal(mapped, torch.arange(100.0))
    assert not place.exists()
    assert torch.equal(mapped, torch.arange(100.0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_network_can_be_computed_from_any_node_on(kind: str) -> None:
    network, batches = subject(kind, batches=2)
    walk = Walk(network, batches)
    names = [name for name, node in walk.nodes.items() if node.op != "output"]
    for done, name in enumerate(names):
        with torch.no_grad():
            assert torch.equal(walk.result(names[done:], 1)[0], network(batches[1]))
        walk.advance(name)


def test_another_number_of_inputs_is_refused_by_the_number_of_the_batch() -> None:
    network, batches = subject("pictures")
    wrong = Inputs((*batches[0].args, *batches[0].args))
    with pytest.raises(DataError, match="batch 1 has 2 inputs"):
        Walk(network, [batches[0], wrong])
