"""Inputs found in what loaders yield, and samples that are like them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pennyweight.core.errors import DataError
from pennyweight.evaluate.network.example import example_in, sample_like
from pennyweight.models.network import capture

X, MASK, LABELS = torch.randn(6, 4), torch.ones(6, 4), torch.zeros(6, dtype=torch.long)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


class Optional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        return x


class Open(nn.Module):
    def forward(self, **inputs: Tensor) -> Tensor:
        return inputs["x"]


@pytest.mark.parametrize(
    ("net", "batch", "args", "names"),
    [
        (One(), X, (X,), ()),
        (One(), (X, LABELS), (X,), ()),
        (One(), [X, LABELS, "text"], (X,), ()),
        (Two(), (X, MASK, LABELS), (X, MASK), ()),
        (Optional(), (X, LABELS), (X,), ()),
        (Optional(), {"x": X, "scale": MASK, "labels": LABELS}, (), ("x", "scale")),
        (Optional(), ({"x": X, "mask": MASK}, LABELS), (), ("x", "mask")),
        (Open(), {"x": X, "more": MASK}, (), ("x", "more")),
    ],
)
def test_inputs_are_told_from_labels(net: nn.Module, batch: Any, args: tuple[Any, ...], names: tuple[str, ...]) -> None:
    found = example_in(net, batch)
    assert len(found.args) == len(args)
    assert all(one is other for one, other in zip(found.args, args, strict=True))
    assert tuple(found.kwargs) == names


@pytest.mark.parametrize(("batch", "told"), [((X,), "takes x, mask"), (3, "int"), (("a", "b"), "str"), ({}, "without")])
def test_what_is_no_batch_is_told(batch: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        example_in(Two(), batch)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)

    def forward(self, ids: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        return self.embedding(ids) * mask[..., None] + x


def test_a_sample_is_like_the_example_and_not_of_it() -> None:
    ids, mask, x = torch.randint(3, 50, (6, 9)), torch.zeros(6, 9, dtype=torch.long), torch.rand(6, 9, 4)
    mask[:, :5] = 1
    network = capture(Tokens(), (ids, mask, x))
    found = sample_like(network, seed=1)
    new_ids, new_mask, new_x = found.args
    assert [tuple(part.shape) for part in found.args] == [(4, 9), (4, 9), (4, 9, 4)]
    assert [part.dtype for part in found.args] == [ids.dtype, mask.dtype, x.dtype]
    assert int(new_ids.min()) >= 3
    assert int(new_ids.max()) < 50
    assert new_mask.sum(1).tolist() == [5] * 4
    assert float(new_x.min()) >= float(x.min())
    assert not torch.equal(new_ids, ids[:4])
    assert not (new_x[..., None] == x[:4, ..., None]).any(-1).float().mean() > 0.2
    again = sample_like(network, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(found.args, again.args, strict=True))
    assert torch.isfinite(network(found.args)).all()


def test_a_sample_keeps_a_batch_that_may_not_vary() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(6, 2, 2)

    assert sample_like(capture(Fixed(), X)).args[0].shape == (6, 4)
