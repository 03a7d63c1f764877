"""Modules over packed weights that stand where a model has nn.Linear and nn.Embedding."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pennyweight.inference.operator import check_activations, described, packed_product, packed_rows, rows_of
from pennyweight.kernels.packed import Activations, PackedMatrix, multiply


class Shared(Protocol):
    """What computes a linear map together with others that have the same input."""

    def output(self, x: Tensor, index: int) -> Tensor: ...


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with the rows of W packed: nn.Linear for inference, x [..., in_features] of any float type.

    `activations` is "exact" (products of decoded weights, added in float32) or "int8" (x is rounded to 8 bits first);
    see `kernels.packed.multiply`. Nothing is recorded for gradients.
    """

    storage: Tensor

    def __init__(self, matrix: PackedMatrix, *, bias: Tensor | None, activations: Activations) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.activations: Activations = check_activations(activations)
        self.register_buffer("storage", matrix.storage)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._layout = matrix.layout
        self._described = described([matrix.layout])
        self._shared: tuple[Shared, int] | None = None

    @property
    def matrix(self) -> PackedMatrix:
        return PackedMatrix(self._layout, self.storage)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, float32 [out_features, in_features]: made anew, for models that look at it."""
        return self.matrix.decode()

    def share(self, shared: Shared, index: int) -> None:
        """From now on `shared` computes this as its member `index`."""
        self._shared = (shared, index)

    def alone(self, x: Tensor) -> Tensor:
        """The output for `x` without regard to others."""
        [out] = multiply(x, [self.matrix], biases=[self.bias], activations=self.activations)
        return out

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            outs: list[Tensor] = packed_product(x, [self.storage], [self.bias], self._described, self.activations)
            return outs[0]
        return self.alone(x) if self._shared is None else self._shared[0].output(x, self._shared[1])

    def __getstate__(self) -> dict[str, Any]:
        # A copy has neighbours of its own: it is not computed with those of the original.
        return {**self.__dict__, "_shared": None}

    def extra_repr(self) -> str:
        bits = f"{self._layout.bits} bits in groups of {self._layout.group}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {bits}, {self.activations}"


class PackedEmbedding(nn.Module):
    """Rows of a packed table for ids [...], decoded when they are looked up: [..., embedding_dim] in `dtype`."""

    storage: Tensor

    def __init__(self, matrix: PackedMatrix, *, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = padding_idx
        self.dtype = dtype
        self.register_buffer("storage", matrix.storage)
        self._layout = matrix.layout
        self._described = described([matrix.layout])

    @property
    def matrix(self) -> PackedMatrix:
        return PackedMatrix(self._layout, self.storage)

    @property
    def weight(self) -> Tensor:
        """The decoded table [num_embeddings, embedding_dim], made anew."""
        return self.matrix.decode().to(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(ids) is not Tensor:
            rows: Tensor = packed_rows(ids, self.storage, self._described, self.dtype)
            return rows
        return rows_of(ids, self.matrix, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._layout.bits} bits"
