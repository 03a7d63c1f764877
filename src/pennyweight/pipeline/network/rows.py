"""What a site multiplies its weight with: the rows that it reads, some of them drawn from each batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class Reader:
    """Draws rows of the inputs of one module.

    share  which part of all rows is drawn, up to 1; of a convolution as many positions of every picture
    """

    module: nn.Module
    share: float = 1.0

    def count(self, x: Tensor) -> int:
        """Rows that there are of the input `x`."""
        pictures, positions = self._shape(x)
        return pictures * positions

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Which rows of the input `x` are drawn: int64 positions [pictures, places] of a convolution's output, else
        places [1, places] of the flattened input; alike for all inputs of one shape."""
        pictures, positions = self._shape(x)
        wanted = ceil(self.share * positions)
        if wanted >= positions:
            return torch.arange(positions).expand(pictures, positions)
        return torch.randint(positions, (pictures, wanted), generator=generator)

    def _shape(self, x: Tensor) -> tuple[int, int]:
        if not isinstance(self.module, Convolution | Transposed):
            return 1, x.numel() // x.shape[-1]
        x = _with_batch(x, self.module)
        return x.shape[0], prod(axis.outputs for axis in _axes(self.module, tuple(x.shape[2:])))

    def rows(self, x: Tensor, places: Tensor) -> Tensor:
        """[groups, rows, in] in the order of the columns of NetworkSite.matrix; zeros where padding is read."""
        if isinstance(self.module, Convolution | Transposed):
            return _patches(_with_batch(x, self.module), self.module, places)
        return x.reshape(-1, x.shape[-1])[places[0]][None]


def _with_batch(x: Tensor, module: Convolution | Transposed) -> Tensor:
    return x if x.dim() == len(module.kernel_size) + 2 else x[None]


@dataclass(frozen=True)
class _Axis:
    """One axis of a convolution's input.

    reads  int64 [outputs, kernel]: which place each tap reads for each output; -1 for none
    """

    length: int
    reads: Tensor

    @property
    def outputs(self) -> int:
        return self.reads.shape[0]


def _axes(module: Convolution | Transposed, lengths: tuple[int, ...]) -> list[_Axis]:
    is_transposed = isinstance(module, Transposed)
    found = []
    for number, length in enumerate(lengths):
        kernel, stride, dilation = (values[number] for values in (module.kernel_size, module.stride, module.dilation))
        before, after = _padding(module, number)
        taps = torch.arange(kernel) * dilation
        if is_transposed:
            extra = module.output_padding[number]
            outputs = (length - 1) * stride - before - after + dilation * (kernel - 1) + extra + 1
            away = torch.arange(outputs)[:, None] + before - taps
            reads = torch.where(away % stride == 0, away // stride, -1)
        else:
            outputs = (length + before + after - dilation * (kernel - 1) - 1) // stride + 1
            reads = torch.arange(outputs)[:, None] * stride + taps - before
        found.append(_Axis(length, torch.where((reads >= 0) & (reads < length), reads, -1)))
    return found


def _padding(module: Convolution | Transposed, axis: int) -> tuple[int, int]:
    """Zeros before and behind."""
    if not isinstance(module.padding, str):
        return module.padding[axis], module.padding[axis]
    total = module.dilation[axis] * (module.kernel_size[axis] - 1) if module.padding == "same" else 0
    return total // 2, total - total // 2


def _patches(x: Tensor, module: Convolution | Transposed, places: Tensor) -> Tensor:
    """[groups, pictures * places, channels of a group * kernel] of `x` [pictures, channels, ...]."""
    axes = _axes(module, tuple(x.shape[2:]))
    pictures, channels = x.shape[:2]
    index = places.new_zeros(*places.shape, 1)
    is_read = torch.ones_like(index, dtype=torch.bool)
    rest = places
    strides = [prod(axis.length for axis in axes[number + 1 :]) for number in range(len(axes))]
    # From the last axis, which varies fastest, to the first; taps of the first end up slowest.
    for axis, stride in zip(axes[::-1], strides[::-1], strict=True):
        reads = axis.reads[rest % axis.outputs]
        rest = rest // axis.outputs
        index = (reads[..., :, None] * stride + index[..., None, :]).flatten(-2)
        is_read = ((reads >= 0)[..., :, None] & is_read[..., None, :]).flatten(-2)
    index, is_read = index.clamp_min_(0).flatten(1)[:, None].to(x.device), is_read.to(x.device)
    taken = x.flatten(2).gather(2, index.expand(-1, channels, -1)).view(pictures, channels, *is_read.shape[1:])
    taken = taken.mul_(is_read[:, None]).permute(1, 0, 2, 3)
    groups = module.groups
    parts = taken.reshape(groups, channels // groups, pictures * places.shape[1], -1)
    return parts.transpose(1, 2).flatten(2)
