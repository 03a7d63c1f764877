"""The one unpacked type between solvers and containers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.schemes.parameters import Parameters
from pennyweight.schemes.scheme import Scheme

# Weights decoded at a time: the temporaries of a chunk stay in a core's second-level cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and parameters of one weight matrix; raises ShapeError where they are not what the scheme stores.

    codes   uint8 [out, in], each below 2**bits
    scales, zeros, offsets, parents, offset_parents   see Parameters
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    offsets: Tensor | None = None
    parents: Tensor | None = None
    offset_parents: Tensor | None = None

    def __post_init__(self) -> None:
        self.parameters.check(self.scheme, tuple(self.codes.shape))

    @staticmethod
    def of(codes: Tensor, parameters: Parameters, scheme: Scheme) -> QuantizedWeight:
        p = parameters
        return QuantizedWeight(codes, p.scales, p.zeros, scheme, p.offsets, p.parents, p.offset_parents)

    @property
    def parameters(self) -> Parameters:
        return Parameters(self.scales, self.zeros, self.offsets, self.parents, self.offset_parents)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def rows(self, index: Tensor | slice) -> QuantizedWeight:
        """Some rows of the weight; what is stored once for all rows stays."""
        return QuantizedWeight.of(self.codes[index], self.parameters.rows(index, self.scheme), self.scheme)

    @staticmethod
    def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """The weight whose consecutive rows are `parts`, of one scheme that shares nothing between rows."""
        if len(parts) == 1:
            return parts[0]
        parameters = Parameters.combined([part.parameters for part in parts], torch.cat)
        return QuantizedWeight.of(torch.cat([part.codes for part in parts]), parameters, parts[0].scheme)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in]: scale * (value - zero) or scale * value - offset in Scheme.arithmetic, cast.

        For plain schemes that is the order and the type in which compressed-tensors decodes.
        """
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if not out.numel():
            return out
        codes, result = grouped(self.codes, self.scheme), grouped(out, self.scheme)
        kind = self.scheme.arithmetic
        given = self.parameters.decoded(self.scheme)
        scales = given.scales.to(kind)[..., None]
        zeros, offsets = (None if x is None else x.to(kind)[..., None] for x in (given.zeros, given.offsets))

        def rows(part: slice) -> None:
            values = self.scheme.element.decode(codes[part]).to(kind)
            if zeros is not None:
                values.sub_(zeros[part])
            values.mul_(scales[part])
            result[part] = values if offsets is None else values.sub_(offsets[part])

        parallel_map(rows, chunks(codes.shape[0], max(1, _CHUNK // (codes.shape[1] * codes.shape[2]))))
        return out


def grouped(matrix: Tensor, scheme: Scheme) -> Tensor:
    """`matrix` [out, in] as a view [rows, groups, group size] so that scales [rows, groups, 1] broadcast over it."""
    rows, groups = scheme.scale_shape(tuple(matrix.shape))
    return matrix.reshape(rows, groups, -1) if matrix.numel() else matrix.reshape(rows, groups, 0)
