"""Small networks of every kind that capture must know, with what they are called with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

Case = tuple[nn.Module, Any]


def pictures(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 10, (batch, length))


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.memory = kind(4, 6, batch_first=True, **options)
        width = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        y, state = self.memory(x)
        y, state = self.memory(x * 0.5, state)
        return self.head(y), state


class Normed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, **options)
        used(self.norm)
        if self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked += 7

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def used(norm: nn.Module) -> None:
    """Running statistics and lines as of a trained batch norm."""
    for name, tensor in norm.state_dict().items():
        if name != "num_batches_tracked":
            tensor.copy_(torch.rand_like(tensor) + 0.5)


class Shared(nn.Module):
    """A module called twice, two modules with one weight, modules in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.twice.weight
        self.parts = nn.ModuleDict({"a b": nn.Linear(4, 4), "c": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).relu())
        return self.tied(self.parts["c"](self.parts["c"](self.parts["a b"](x))))


class Functional(nn.Module):
    """Weights without modules: parameters of the root, a buffer as a kernel, a tensor that is nothing to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4))
        self.k = nn.Parameter(torch.randn(6, 5, 3))
        self.register_buffer("blur", torch.randn(6, 1, 3))
        self.register_buffer("unsaved", torch.randn(1), persistent=False)
        self.constant = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv1d(functional.linear(x, self.w).transpose(1, 2), self.k)
        assert isinstance(self.blur, Tensor)
        return functional.conv1d(x, self.blur, groups=6) + self.constant.sum() * self.unsaved


class Residual(nn.Module):
    """Operations in place: an activation, a sum, a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.drop, self.relu = nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.relu(self.drop(self.a(x))))
        y += x
        y = self.relu(y)
        same = y
        y.mul_(2).add_(1)
        return self.relu(same)


class Same(nn.Module):
    """In eval mode dropout gives the tensor itself, so that what is written into the one is seen in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y + self.drop(y).relu_()


class Parts(nn.Module):
    """Assignments to parts, and views that are written into."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm(self.a(x)))
        y[:, 0] += 1
        flat = y.view(-1)
        flat.relu_()
        z = torch.zeros_like(x)
        z[:, 1:] = y[:, :-1]
        return z + y


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None, *, scale: Tensor | None = None) -> dict[str, Any]:
        out = self.a(x)
        out = out if y is None else out + self.b(y)
        return {"out": out, "both": (out if scale is None else out * scale, x)}


class Fixed(nn.Module):
    """The batch size is written down in the network."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.a, self.batch = nn.Linear(4, 4), batch

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).view(self.batch, 2, 2)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        other = x[..., : self.attend.kdim] if self.attend.kdim != size else x
        return self.attend(x, other, other, need_weights=False)[0]


class Block(nn.Module):
    """MobileNetV2's inverted residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = channels * 4
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def mobile() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True), Block(8), Block(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 5),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            used(module)
    return net


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.out = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = functional.leaky_relu(self.down(x), 0.1, inplace=True)
        y = torch.cat((skip, self.up(functional.silu(self.deep(skip)))), 1)
        return functional.interpolate(self.out(functional.avg_pool2d(y, 3, 1, 1)), scale_factor=2, mode="nearest")


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, 8))
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.first.expand(x.shape[0], -1, -1), x), 1) + self.place
        return self.head(self.encoder(x)[:, 0])


class Scaled(nn.Conv2d):
    """A convolution of the user's own, with more parameters than torch's."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.gain = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * self.gain


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


class Forever(nn.Module):
    """Dropout that is asked for in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.a(x), 0.5, training=True)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.never = nn.Linear(4, 4), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.cell = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4)), nn.LSTMCell(4, 5)

    def forward(self, x: Tensor) -> Any:
        y = x @ self.w + torch.addmm(self.b, x, self.w)
        return self.cell(y, self.cell(y))


def bert() -> Case:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return BertModel(config), {"input_ids": tokens(), "attention_mask": mask}


def _transposed(axes: int) -> Case:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    return nn.Sequential(kind(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=2)), torch.randn(
        2, 4, *[5] * axes
    )


CASES: dict[str, Callable[[], Case]] = {
    "root linear": lambda: (nn.Linear(4, 3), torch.randn(2, 4)),
    "linear over tokens": lambda: (nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(2, 5, 4)),
    "conv1d same circular": lambda: (
        nn.Sequential(nn.Conv1d(4, 8, 4, padding="same", padding_mode="circular")), torch.randn(2, 4, 9)),
    "conv2d valid": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3, padding="valid", dilation=2)), pictures()),
    "conv2d same": lambda: (nn.Sequential(nn.Conv2d(3, 8, 4, padding="same", dilation=(1, 2))), pictures()),
    "conv2d reflect": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")), pictures()),
    "conv2d grouped": lambda: (nn.Sequential(nn.Conv2d(4, 8, 3, (2, 1), (0, 2), groups=2)), pictures(4)),
    "depthwise": lambda: (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False)), pictures(4)),
    "conv2d without a batch": lambda: (nn.Conv2d(3, 4, 3), pictures()[0]),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(4, 8, 3, (1, 2, 1), groups=2)), torch.randn(2, 4, 5, 6, 7)),
    **{f"conv_transpose{axes}d": lambda axes=axes: _transposed(axes) for axes in (1, 2, 3)},
    "embedding": lambda: (nn.Sequential(nn.Embedding(10, 4, padding_idx=0), nn.Linear(4, 3)), tokens()),
    "embedding bag": lambda: (Bags(), tokens()),
    "lstm": lambda: (Recurrent(nn.LSTM), torch.randn(2, 5, 4)),
    "lstm deep": lambda: (Recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.3), torch.randn(2, 5, 4)),
    "lstm projected": lambda: (Recurrent(nn.LSTM, proj_size=3, bias=False), torch.randn(2, 5, 4)),
    "gru": lambda: (Recurrent(nn.GRU, num_layers=2, bidirectional=True), torch.randn(2, 5, 4)),
    "rnn": lambda: (Recurrent(nn.RNN, nonlinearity="relu"), torch.randn(2, 5, 4)),
    "batch norm": lambda: (Normed(), pictures()),
    "batch norm without a line": lambda: (Normed(affine=False), pictures()),
    "batch norm without statistics": lambda: (Normed(track_running_stats=False), pictures()),
    "batch norm of cumulative statistics": lambda: (Normed(momentum=None), pictures()),
    "dropouts": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.Dropout(0.5), nn.ReLU(True)),
        pictures()),
    "dropout forever": lambda: (Forever(), torch.randn(3, 4)),
    "shared": lambda: (Shared(), torch.randn(3, 4)),
    "functional": lambda: (Functional(), torch.randn(2, 9, 4)),
    "subclass": lambda: (nn.Sequential(Scaled()), pictures()),
    "in place": lambda: (Residual(), pictures()),
    "the same tensor": lambda: (Same(), torch.randn(3, 4)),
    "parts": lambda: (Parts(), torch.randn(3, 4)),
    "weight norm": lambda: (nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)), torch.randn(2, 4)),
    "by name": lambda: (Named(), {"scale": torch.randn(2, 4), "x": torch.randn(2, 4)}),
    "two inputs": lambda: (Named(), (torch.randn(2, 4), torch.randn(2, 4))),
    "constants among inputs": lambda: (Named(), {"x": torch.randn(2, 4), "y": None}),
    "a batch of one": lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), pictures(batch=1)),
    "a fixed batch": lambda: (Fixed(3), torch.randn(3, 4)),
    "a fixed batch of one": lambda: (Fixed(1), torch.randn(1, 4)),
    "attention": lambda: (Attention(), torch.randn(2, 5, 8)),
    "attention with other keys": lambda: (Attention(kdim=6, vdim=6, bias=False), torch.randn(2, 5, 8)),
    "transformer": lambda: (
        nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (torch.randn(2, 5, 8), torch.randn(2, 4, 8))),
    "bert": bert,
    "mobile": lambda: (mobile(), pictures()),
    "unet": lambda: (UNet(), pictures()),
    "vit": lambda: (ViT(), pictures()),
    "float16": lambda: (Normed().half(), pictures().half()),
    "bfloat16": lambda: (Normed().bfloat16(), pictures().bfloat16()),
    "counting": lambda: (Counting(), torch.randn(2, 4)),
    "unused parts": lambda: (Unused(), torch.randn(2, 4)),
    "products": lambda: (Products(), torch.randn(2, 4)),
}  # fmt: skip

# Parameters that have no module of their own get one, and with it a second name.
RENAMED = {
    "root linear": 2, "conv2d without a batch": 2, "functional": 3, "attention": 2, "attention with other keys": 3,
    "transformer": 4, "vit": 4,
}  # fmt: skip
# Where the network, or the meaning of the first axis, does not let the batch vary.
FIXED = {"conv2d without a batch", "a fixed batch", "a fixed batch of one"}


def case(name: str) -> Case:
    torch.manual_seed(len(name) + sum(map(ord, name)))
    net, example = CASES[name]()
    for parameter in net.parameters():
        if parameter.dim() == 1 and math.prod(parameter.shape):
            nn.init.uniform_(parameter, -0.5, 0.5)
    return net, example
