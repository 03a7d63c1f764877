"""Small networks with every kind of site, and calibration batches for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.models.network import Network, capture, fold_batch_norms
from pennyweight.models.network.network import Inputs


class Pictures(nn.Module):
    """Plain, strided, depthwise and grouped convolutions with batch norms, a shortcut, a pool and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        y = self.grouped(functional.relu6(self.depthwise(x)))
        x = functional.max_pool2d(functional.relu(x + y), 2)
        x = functional.relu(self.down(x))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Upsampler(nn.Module):
    """Transposed convolutions between one-dimensional ones."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.up = nn.Conv1d(2, 6, 3, padding=1), nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1)
        self.wide, self.out = nn.ConvTranspose1d(4, 4, 3, groups=2), nn.Conv1d(4, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.relu(self.wide(functional.relu(self.up(functional.relu(self.into(x)))))))


class Reader(nn.Module):
    """Embedding, a bidirectional LSTM of two layers, a GRU, and a head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.head = nn.GRU(10, 4, batch_first=True), nn.Linear(4, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.words(tokens))
        x, _ = self.gru(x)
        return self.head(x[:, -1])


class Repeated(nn.Module):
    """One linear map called twice, and an embedding whose weight the head shares."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.again = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = functional.gelu(self.again(self.words(tokens)))
        return self.head(functional.gelu(self.again(x)))


def _pictures(generator: torch.Generator) -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=generator)


def _signals(generator: torch.Generator) -> Tensor:
    return torch.randn(6, 2, 10, generator=generator)


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(12, (6, 7), generator=generator)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "pictures": (Pictures, _pictures),
    "upsampler": (Upsampler, _signals),
    "reader": (Reader, _tokens),
    "repeated": (Repeated, _tokens),
}


def subject(kind: str, *, batches: int = 5) -> tuple[Network, list[Inputs]]:
    """The network `kind`, batch norms folded, and random calibration batches; not to be edited."""
    generator = torch.Generator().manual_seed(5)
    given = [Inputs((KINDS[kind][1](generator),)) for _ in range(batches)]
    return _captured(kind), given


@cache
def _captured(kind: str) -> Network:
    build, draw = KINDS[kind]
    torch.manual_seed(3)
    net = build()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
    return fold_batch_norms(capture(net, draw(torch.Generator().manual_seed(5))))
