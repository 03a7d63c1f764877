"""Experts that a model keeps as one 3-D parameter, packed: the model's own forward runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import UsageError
from pennyweight.inference.modules import PackedWeight
from pennyweight.inference.operator import check_activations
from pennyweight.kernels.packed import Activations, PackedMatrix, multiply

# A matrix of an expert, or rows of it (gate and up are two parts of one): packed, or floats [rows, in].
Part = PackedMatrix | Tensor


class PackedStack(nn.Module):
    """Stands where the parameter [experts, out, in] stood: `stack[expert]` can be the weight of
    `torch.nn.functional.linear`, whatever scheme each expert, or each part of it, has."""

    def __init__(self, experts: Sequence[Sequence[Part]], *, activations: Activations) -> None:
        """The parts of each expert are its rows, in order."""
        super().__init__()
        self.activations: Activations = check_activations(activations)
        self._counts = [len(parts) for parts in experts]
        for index, parts in enumerate(experts):
            for place, part in enumerate(parts):
                if isinstance(part, PackedMatrix):
                    self.add_module(f"{index}_{place}", PackedWeight(part))
                else:
                    self.register_buffer(f"{index}_{place}", part)

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, expert: int | Tensor) -> PackedExpert:
        index = int(expert)
        held = [getattr(self, f"{index}_{place}") for place in range(self._counts[index])]
        parts = [one.matrix if isinstance(one, PackedWeight) else one for one in held]
        return PackedExpert(parts, self.activations)


class PackedExpert:
    """The matrix of one expert, which `torch.nn.functional.linear` takes for a weight."""

    def __init__(self, parts: Sequence[Part], activations: Activations) -> None:
        self.parts, self._activations = parts, activations

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias of all parts side by side; those that are packed in one product."""
        packed = [part for part in self.parts if isinstance(part, PackedMatrix)]
        products = iter(multiply(x, packed, activations=self._activations))
        made = [
            next(products) if isinstance(part, PackedMatrix) else nn.functional.linear(x, part) for part in self.parts
        ]
        out = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
        return out if bias is None else out + bias

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if func is not nn.functional.linear or not isinstance(given.get("weight"), PackedExpert):
            raise UsageError(
                f"{getattr(func, '__name__', func)} was called with the packed weight of an expert; known is "
                "torch.nn.functional.linear: load this model with transformers"
            )
        return given["weight"](given["input"], given.get("bias"))
