"""torch's own kernels for weights of few bits, and its bfloat16 linear to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.kernels.contest import Contestant, Facts, Mode, Size, bytes_of, rounded

Product = Callable[[Tensor, Any], Tensor]


class Linears:
    """A list of weights as `product` takes them, one after the other."""

    def __init__(
        self, size: Size, facts: Facts, decoded: Tensor, weights: Sequence[Any], product: Product,
        *, memory: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        self.facts, self.memory = facts, memory
        self._size, self._decoded, self._weights, self._product = size, decoded, weights, product

    def take(self, x: Tensor) -> None:
        self._x = x.bfloat16() if self.facts.mode == "bfloat16" else x

    def run(self) -> None:
        self._outs: list[Tensor] = []
        for weight in self._weights:
            self._outs.append(self._product(self._x, weight))

    def outcome(self, index: int) -> Tensor:
        return self._outs[index].float()

    def decoded(self) -> Tensor:
        return self._decoded


def _dynamic_int8(size: Size) -> Linears:
    made = rounded(size, bits=8, group=size.cols, scale=torch.float32)
    values, scales = size.of_rows(made.values.to(torch.int8)), size.of_rows(made.scales).flatten()
    zeros = torch.zeros(size.rows, dtype=torch.int64)
    whole = torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)
    weights = [torch.ops.quantized.linear_prepack(whole, None) for _ in range(size.count)]
    facts = _facts("torch linear_dynamic int8", size, 8, size.cols, "int8", values.nbytes + scales.nbytes)
    # Seven bits are for processors without VNNI.
    return Linears(size, facts, made.decoded(size), weights,
                   lambda x, weight: torch.ops.quantized.linear_dynamic(x, weight, False))  # fmt: skip


def _int8(size: Size) -> Linears:
    made = rounded(size, bits=8, group=size.cols, scale=torch.bfloat16)
    values, scales = size.of_rows(made.values.to(torch.int8)), size.of_rows(made.scales).flatten()
    weights = [(values.clone(), scales.clone()) for _ in range(size.count)]
    facts = _facts("torch _weight_int8pack_mm", size, 8, size.cols, "bfloat16", values.nbytes + scales.nbytes)
    return Linears(size, facts, made.decoded(size), weights,
                   lambda x, weight: torch._weight_int8pack_mm(x, *weight),
                   memory=[bytes_of(weight) for weight, _ in weights])  # fmt: skip


def _int4(size: Size, group: int) -> Linears:
    made = rounded(size, bits=4, group=group, scale=torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(size.of_rows(made.codes.int()), 1)
    # weight = scale * (code - 8) + zero
    scales = size.of_rows(made.scales).T
    pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    weights = [(packed.clone(), pairs.clone()) for _ in range(size.count)]
    facts = _facts(f"torch _weight_int4pack_mm g{group}", size, 4, group, "bfloat16", packed.nbytes + pairs.nbytes)
    return Linears(size, facts, made.decoded(size), weights,
                   lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], group, w[1]),
                   memory=[bytes_of(weight) for weight, _ in weights])  # fmt: skip


def unquantized(size: Size) -> Contestant:
    """bfloat16 weights, for comparison: of no width, so that no target is about it."""
    weight = size.of_rows(size.normal().bfloat16())
    weights = [weight.clone() for _ in range(size.count)]
    facts = _facts("torch bfloat16 linear", size, 16, size.cols, "bfloat16", weight.nbytes)
    return Linears(size, facts, weight.float(), weights, torch.nn.functional.linear,
                   memory=[bytes_of(weight) for weight in weights])  # fmt: skip


def _facts(name: str, size: Size, bits: int, group: int, mode: Mode, size_bytes: int) -> Facts:
    return Facts(name, "torch", bits, group, mode, size_bytes)


def contestants(size: Size, bits: int) -> Iterator[Contestant]:
    if bits == 8:
        yield _dynamic_int8(size)
        yield _int8(size)
    if bits == 4:
        yield _int4(size, 32)
        yield _int4(size, 128)
