"""Small networks for training, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Small(nn.Module):
    """images [n, 3, 8, 8] -> logits [n, 5]: folded norms, one that cannot be folded, a residual sum, dropout."""

    def __init__(self, channels: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.lone = nn.BatchNorm2d(3)
        self.stem, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.block = Block(channels)
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(dropout)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.norm(self.stem(self.lone(x)))))
        return self.head(self.drop(self.pool(x).mean((2, 3))))


class Tagger(nn.Module):
    """tokens [n, length] -> scores [n, length, 11], whose head is the embedding; an LSTM between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.memory(self.embed(tokens))[0])


def used(net: nn.Module) -> nn.Module:
    """`net` with running statistics, lines and biases as of a trained one."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.uniform_(tensor, -0.5, 0.5)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
            # Channels of both signs, and one that is switched off.
            with torch.no_grad():
                module.weight[0] *= -1
                module.weight[1] = 0
    return net


def small(**options: float) -> Small:
    torch.manual_seed(1)
    net = Small(**options)  # type: ignore[arg-type]
    used(net)
    return net.eval()


def pictures(count: int = 12, seed: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labelled(batches: int = 4, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Batches whose label is where the picture's mean colour is greatest, of 3."""
    images = [pictures(size, seed) + 0.3 * torch.randn(size, 3, 1, 1) for seed in range(batches)]
    return [(x, x.mean((2, 3)).argmax(1)) for x in images]


SCHEMES = (
    "int8-channel", "int4-channel", "int4-tensor", "int3-g3", "int2-channel", "uint4-channel-asym", "nf4-channel",
    "int4-channel-f16", "w8a8-channel", "w4a8-channel", "w4a4-tensor", "w8a8-channel-dynamic", "w3a8-g3-asym",
)  # fmt: skip
