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


class PackedWeight(nn.Module):
    """A packed matrix whose bytes are the buffer `storage`; `layout` describes it to the operators."""

    storage: Tensor

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.register_buffer("storage", matrix.storage)
        self.layout = described([matrix.layout])
        self._matrix = matrix

    @property
    def matrix(self) -> PackedMatrix:
        # A matrix keeps what kernels know of its bytes; another buffer, on another device, is another matrix.
        if self._matrix.storage is not self.storage:
            self._matrix = PackedMatrix(self._matrix.layout, self.storage)
        return self._matrix

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": PackedMatrix(self._matrix.layout, self.storage)}

    def extra_repr(self) -> str:
        rows, cols = self._matrix.shape
        return f"{rows} x {cols}, {self._matrix.layout.bits} bits in groups of {self._matrix.layout.group}"


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with the rows of W packed: nn.Linear for inference, x [..., in_features] of any float type.

    `activations` is "exact" (products of decoded weights, added in float32) or "int8" (x is rounded to 8 bits first);
    see `kernels.packed.multiply`. Nothing is recorded for gradients.
    """

    packed: PackedWeight

    def __init__(self, matrix: PackedMatrix, *, bias: Tensor | None, activations: Activations) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.activations: Activations = check_activations(activations)
        self.packed = PackedWeight(matrix)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._shared: tuple[Shared, int] | None = None

    @property
    def weight(self) -> Tensor:
        """The decoded weight, float32 [out_features, in_features]: made anew, for models that look at it."""
        return self.packed.matrix.decode()

    def share(self, shared: Shared, index: int) -> None:
        """From now on `shared` computes this as its member `index`."""
        self._shared = (shared, index)

    def alone(self, x: Tensor) -> Tensor:
        """The output for `x` without regard to others."""
        [out] = multiply(x, [self.packed.matrix], biases=[self.bias], activations=self.activations)
        return out

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            packed = self.packed
            outs: list[Tensor] = packed_product(x, [packed.storage], [self.bias], packed.layout, self.activations)
            return outs[0]
        return self.alone(x) if self._shared is None else self._shared[0].output(x, self._shared[1])

    def __getstate__(self) -> dict[str, Any]:
        # A copy has neighbours of its own: it is not computed with those of the original.
        return {**self.__dict__, "_shared": None}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.activations}"


class PackedEmbedding(nn.Module):
    """Rows of a packed table for ids [...], decoded when they are looked up: [..., embedding_dim] in `dtype`."""

    packed: PackedWeight

    def __init__(self, matrix: PackedMatrix, *, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = padding_idx
        self.dtype = dtype
        self.packed = PackedWeight(matrix)

    @property
    def weight(self) -> Tensor:
        """The decoded table [num_embeddings, embedding_dim], made anew."""
        return self.packed.matrix.decode().to(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(ids) is not Tensor:
            rows: Tensor = packed_rows(ids, self.packed.storage, self.packed.layout, self.dtype)
            return rows
        return rows_of(ids, self.packed.matrix, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.dtype}"
