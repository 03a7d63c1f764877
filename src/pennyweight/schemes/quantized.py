"""The one unpacked type between solvers and containers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.schemes.scheme import Scheme

# Weights decoded at a time: the temporaries of a chunk stay in a core's second-level cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes, scales and zero points of one weight matrix.

    codes   uint8 [out, in], each below 2**bits
    scales  [rows, groups] in the scheme's stored type (see Scheme.scale_shape)
    zeros   int16 [rows, groups], values of the number format, or None when symmetric
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme

    def __post_init__(self) -> None:
        expected = self.scheme.scale_shape(tuple(self.codes.shape))
        if tuple(self.scales.shape) != expected or self.scales.dtype != self.scheme.scale.torch_dtype:
            raise ShapeError(
                f"{self.scheme}: scales {tuple(self.scales.shape)} {self.scales.dtype}, "
                f"expected {expected} {self.scheme.scale.torch_dtype}"
            )
        if (self.zeros is None) != (self.scheme.zero is None) or (
            self.zeros is not None and tuple(self.zeros.shape) != expected
        ):
            raise ShapeError(f"{self.scheme}: zero points must be {'absent' if self.scheme.zero is None else expected}")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] as compressed-tensors decodes it: (value - zero) * scale in the scale's type, cast."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if not out.numel():
            return out
        codes, result = grouped(self.codes, self.scheme), grouped(out, self.scheme)

        def rows(part: slice) -> None:
            values = self.scheme.element.decode(codes[part]).to(self.scales.dtype)
            if self.zeros is not None:
                values.sub_(self.zeros[part].to(self.scales.dtype)[..., None])
            result[part] = values.mul_(self.scales[part][..., None])

        parallel_map(rows, chunks(codes.shape[0], max(1, _CHUNK // (codes.shape[1] * codes.shape[2]))))
        return out


def grouped(matrix: Tensor, scheme: Scheme) -> Tensor:
    """`matrix` [out, in] as a view [rows, groups, group size] so that scales [rows, groups, 1] broadcast over it."""
    rows, groups = scheme.scale_shape(tuple(matrix.shape))
    return matrix.reshape(rows, groups, -1) if matrix.numel() else matrix.reshape(rows, groups, 0)
