"""Random networks whose channels can be followed: one part after the other, every kind of what stands between sites."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 8


class Between(nn.Module):
    """A function of one value that lets scales through."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.slopes = nn.PReLU(channels) if kind == "prelu" else None
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "relu":
                return torch.relu(x)
            case "relu_":
                return functional.relu(x * 1.0, inplace=True)
            case "prelu":
                assert self.slopes is not None
                made: Tensor = self.slopes(x)
                return made
            case "leaky":
                return functional.leaky_relu(x, 0.1)
            case "max":
                return functional.max_pool2d(torch.relu(x), 3, stride=1, padding=1)
            case "average":
                return functional.avg_pool2d(x, 3, stride=1, padding=1)
            case "clamp":
                return x.clamp(min=0)
            case "dropout":
                dropped: Tensor = self.dropout(torch.relu(x))
                return dropped
            case "halved":
                return functional.interpolate(torch.relu(x)[:, :, ::2, ::2] * 0.5, scale_factor=2)
            case "bilinear":
                return functional.interpolate(torch.relu(x), size=(SIZE, SIZE), mode="bilinear")
            case "shuffle":
                return torch.relu(x).reshape(len(x), 2, -1, SIZE, SIZE).transpose(1, 2).reshape(x.shape)
            case "picked":
                return torch.relu(x).index_select(1, torch.arange(x.shape[1]).flip(0))
            case "padded":
                return functional.pad(torch.relu(x), (1, 0, 0, 1))[:, :, :-1, 1:]
        return x


class Step(nn.Module):
    """A site with something around it; takes and gives [n, channels, SIZE, SIZE]."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.conv = _site(kind, channels)
        self.other = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        match self.kind:
            case "residual":
                return x + self.other(torch.relu(y))
            case "around":
                return x + y
            case "two":
                return self.other(x) - y
            case "cat":
                half = x.shape[1] // 2
                return torch.cat([y[:, :half], self.other(x)[:, half:]], 1)
            case "gate":
                return torch.relu(y) * torch.sigmoid(self.other(x).mean((2, 3), keepdim=True))
            case "shortcut":
                # Option A: every channel moves by one, a zero comes in.
                return functional.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)) + y
            case "sigmoid":
                return torch.sigmoid(y)
        return y


def _site(kind: str, channels: int) -> nn.Module:
    match kind:
        case "depthwise":
            return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        case "grouped":
            return nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        case "transposed":
            return nn.ConvTranspose2d(channels, channels, 3, padding=1)
        case "transposed_groups":
            return nn.ConvTranspose2d(channels, channels, 3, padding=1, groups=2)
        case "one":
            return nn.Conv2d(channels, channels, 1)
    return nn.Conv2d(channels, channels, 3, padding=1)


BETWEEN = (
    "relu", "relu_", "prelu", "leaky", "max", "average", "clamp", "dropout", "halved", "bilinear", "shuffle", "padded",
    "picked", "nothing",
)  # fmt: skip
STEPS = (
    "conv", "one", "depthwise", "grouped", "transposed", "transposed_groups", "residual", "around", "two", "cat",
    "gate", "shortcut", "sigmoid",
)  # fmt: skip


class Net(nn.Module):
    """images [n, 3, SIZE, SIZE] -> [n, 5], in float64 with channel ranges that differ by factors of up to 100."""

    def __init__(self, parts: Sequence[tuple[str, str]], *, head: str = "flatten", channels: int = 4, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.between = nn.ModuleList([Between(between, channels) for between, _ in parts])
        self.steps = nn.ModuleList([Step(step, channels) for _, step in parts])
        self.head = head
        self.linear = nn.Linear(channels * (SIZE * SIZE if head == "flatten" else 1), 5)
        self.double().eval()
        with torch.no_grad():
            for site in (module for module in self.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)):
                site.weight *= 100 ** torch.rand(site.weight.shape[0], 1, 1, 1).double()
                site.weight /= site.weight.square().mean().sqrt()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for between, step in zip(self.between, self.steps, strict=True):
            x = step(between(x))
        x = torch.relu(x)
        made: Tensor = self.linear(x.flatten(1) if self.head == "flatten" else x.mean((2, 3)))
        return made
