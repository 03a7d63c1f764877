"""Small networks that the tests of ONNX files share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """A block of ResNet as CIFAR has it: the shortcut takes every second pixel and fills up channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.one = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        y = self.two(functional.relu(self.one(x)))
        y = functional.relu(y + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(functional.adaptive_avg_pool2d(y, 1).flatten(1))


class Gated(nn.Module):
    """Depthwise convolution, ReLU6, a gate of squeeze and excitation, max pooling and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.point = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout()
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.depthwise(x))
        gate = self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = self.drop(x * torch.sigmoid(gate))
        y = functional.leaky_relu(self.point(functional.max_pool2d(x, 2)), 0.1)
        z = functional.avg_pool2d(x, 2)
        return self.head(torch.cat([y, z], 1))


class Encoder(nn.Module):
    """A transformer block over embedded tokens."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(20, width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        parts = self.mixed(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = self.first(x + self.out(y.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(functional.gelu(self.up(x))))


class Sequences(nn.Module):
    """An LSTM of two directions, a GRU, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0])


class Convolutions(nn.Module):
    """Plain, grouped, depthwise and transposed ones over one, two and three axes."""

    def __init__(self) -> None:
        super().__init__()
        plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        self.first = nn.ModuleList(
            kind(4, 8, 3, padding=1, groups=groups) for kind, groups in zip(plain, (1, 2, 4), strict=True)
        )
        self.second = nn.ModuleList(
            kind(8, 4, 3, stride=2, output_padding=1, groups=groups)
            for kind, groups in zip(transposed, (2, 1, 4), strict=True)
        )
        self.third = nn.ModuleList(kind(4, 4, 1, bias=False) for kind in plain)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        out = []
        for value, one, two, three in zip((x, y, z), self.first, self.second, self.third, strict=True):
            out.append(three(torch.relu(two(torch.relu(one(value))))))
        return tuple(out)


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 32), nn.Linear(32, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(tokens)))


class Layers(nn.Module):
    """Linear maps of matrices and of batches of them, with widths that are no whole blocks."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(width, 24), nn.Linear(24, width, bias=False), nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.two(torch.relu(self.one(x))))
        return self.three(x.mean(1))
