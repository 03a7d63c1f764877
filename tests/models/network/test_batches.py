"""What a loader yields is checked before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pennyweight.core.errors import DataError
from pennyweight.models.network import Network, batches_of, capture
from pennyweight.models.network.network import Inputs
from tests.models.network.zoo import Fixed, Named

X, LABELS = torch.randn(2, 3, 8, 8), torch.tensor([1, 0])


@pytest.fixture(scope="module")
def network() -> Network:
    return capture(nn.Sequential(nn.Conv2d(3, 4, 3)), X)


@pytest.fixture(scope="module")
def named() -> Network:
    return capture(Named(), {"x": torch.randn(2, 4), "scale": torch.randn(2, 4)})


@pytest.mark.parametrize("batch", [(X, LABELS), [X, LABELS]])
def test_labels_come_behind_the_inputs(network: Network, batch: Any) -> None:
    (found,) = batches_of([batch], network, needs_labels=True)
    assert found.labels is LABELS
    assert found.inputs.args == (X,)


def test_other_forms_of_batches(network: Network, named: Network) -> None:
    assert batches_of([X], network)[0].labels is None
    assert batches_of([(X,)], network)[0].labels is None
    assert batches_of([(X, LABELS, "more")], network)[0].labels == (LABELS, "more")
    by_name = {"x": torch.randn(3, 4), "scale": torch.randn(3, 4)}
    for given in ((by_name, LABELS), {**by_name, "labels": LABELS}, {**by_name, "target": LABELS, "id": "7"}):
        (found,) = batches_of([given], named, needs_labels=True)
        assert found.labels is LABELS
        assert dict(found.inputs.kwargs) == by_name
        assert torch.equal(named(given)["out"], named(by_name)["out"])
    assert batches_of([Inputs((X,))], network)[0].inputs.args == (X,)


def test_no_more_batches_are_taken_than_asked_for(network: Network) -> None:
    def endless() -> Any:
        while True:
            yield X

    assert len(batches_of(endless(), network, limit=3)) == 3


def test_batches_may_have_any_size_where_the_network_allows_it(network: Network) -> None:
    assert len(batches_of([X[:1], X, torch.cat((X, X))], network)) == 3


BAD: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "nothing": (list, ["yields nothing"]),
    "another width": (lambda: [X, X[..., :7]], ["batch 1", "[2, 3, 8, 7]", "[any, 3, 8, 8]"]),
    "no batch axis": (lambda: [X[0]], ["batch 0", "[3, 8, 8]", "[any, 3, 8, 8]"]),
    "another type": (lambda: [X.double()], ["batch 0", "torch.float64", "torch.float32"]),
    "NaN": (lambda: [X, X, X * torch.nan], ["batch 2", "NaN"]),
    "infinity": (lambda: [X / 0], ["batch 0", "NaN or infinity"]),
    "no rows": (lambda: [X[:0]], ["batch 0", "empty"]),
    "no tensor": (lambda: [X.numpy()], ["batch 0", "ndarray"]),
    "texts": (lambda: [("a picture", LABELS)], ["batch 0", "str"]),
    "names": (lambda: [{"picture": X}], ["batch 0", "takes"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches_are_named(network: Network, name: str) -> None:
    loader, told = BAD[name]
    with pytest.raises(DataError) as raised:
        batches_of(loader(), network)
    assert all(part in str(raised.value) for part in told), str(raised.value)


def test_missing_labels_are_named(network: Network, named: Network) -> None:
    with pytest.raises(DataError, match="batch 1 has no labels"):
        batches_of([(X, LABELS), X], network, needs_labels=True)
    with pytest.raises(DataError, match="batch 0: the network takes .*scale"):
        batches_of([{"x": torch.randn(2, 4)}], named)


def test_a_fixed_batch_size_is_said() -> None:
    network = capture(Fixed(3), torch.randn(3, 4))
    assert not network.batch_varies
    with pytest.raises(DataError, match="no other batch size"):
        batches_of([torch.randn(2, 4)], network)
