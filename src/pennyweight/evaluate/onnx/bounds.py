"""How far a runtime may be from our own evaluation of the same codes without computing something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pennyweight.models.network.identity import value_read
from pennyweight.models.network.network import Inputs
from pennyweight.models.network.quantized import QuantizedNetwork, Rounded, RoundedDynamically

# A float32 sum of n products is off by about sqrt(n) half units (2^-24) of its largest part, more where parts cancel:
# 16 units of the largest number of the tensor for any order of a few thousand products.
SUM_ERROR = 2.0**-20
# Times the largest of a few samples of such errors: their largest of all is not among so few.
MARGIN = 4.0
_SAMPLES = 3
# What float32 itself can say of an output.
_LEAST = 2.0**-20
# Numbers from here on stand for infinity, as in masks of attention: an error relative to them would drown all others.
_INFINITE = 2.0**96
# ONNX Runtime's MatMulNBits at accuracy level 4 rounds what it multiplies to 8 bits, a scale for each block.
_LEVEL_4_STEPS = 127.0


def allowed_errors(
    quantized: QuantizedNetwork,
    module: fx.GraphModule,
    batches: Sequence[Inputs],
    *,
    blocks: Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[float]:
    """For each output, how large |y - ŷ| / |y| may be, y of `module` and ŷ of a runtime.

    The network is run again with numbers as a runtime may have them: what an operation behind a site gives is moved by
    up to SUM_ERROR of the largest number of its tensor, so that codes on edges fall to the other side where they are
    near the middle of two; a bias beside products of integers by up to half a unit of int32, scale(x) scale(w); and
    what MatMulNBits reads, of a site in `blocks` (-> the size of its blocks), is rounded to 8 bits. The largest of
    a few such errors, times MARGIN, is allowed.
    """
    generator = torch.Generator().manual_seed(seed)
    shaken = [_Shaken(quantized, module, blocks or {}, generator) for _ in range(_SAMPLES)]
    with torch.no_grad():
        plain = [outputs_of(module, batch) for batch in batches]
        others = [[outputs_of(one.run_on, batch) for batch in batches] for one in shaken]
    found = [relative_errors(plain, other) for other in others]
    return [max(_LEAST, MARGIN * max(some)) for some in zip(*found, strict=True)]


def outputs_of(module: Any, batch: Inputs) -> list[Tensor]:
    """The tensors that `module` gives, in order."""
    leaves = pytree.tree_leaves(module(*batch.args, **batch.kwargs))
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def relative_errors(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> list[float]:
    """|y - ŷ| / |y| of each output over all batches (the first index); of integers what differs counts 1."""
    return [
        relative_error(y, other) for y, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]


def relative_error(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    away = size = 0.0
    for y, other in zip(ours, theirs, strict=True):
        if y.is_floating_point():
            away += float((y.double() - other.double()).square().sum())
            size += float(y.double().square().sum())
        else:
            away += float((y != other).sum())
            size += y.numel()
    if not size:
        return float(away > 0)
    return float((away / size) ** 0.5)


class _Shaken(fx.Interpreter):
    """Runs a simulated network with errors of rounding that a runtime may make."""

    def __init__(
        self, quantized: QuantizedNetwork, module: fx.GraphModule, blocks: Mapping[str, int], generator: torch.Generator
    ) -> None:
        super().__init__(module)
        self._generator = generator
        self._sites = {name: site for site in quantized.network.sites for name in site.nodes}
        self._biases = _bias_steps(quantized)
        self._blocks = blocks
        # What no weight has touched (a mask, a size) a runtime has as we do.
        self._touched: set[str] = set()
        for node in module.graph.nodes:
            if node.name in self._sites or any(one.name in self._touched for one in node.all_input_nodes):
                self._touched.add(node.name)

    def run_on(self, *args: Any, **kwargs: Any) -> Any:
        flat = pytree.tree_leaves((args, kwargs))
        return self.run(*flat, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op not in ("call_function", "call_module") or n.name not in self._touched:
            return result
        if n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), Rounded | RoundedDynamically):
            return result
        return pytree.tree_map(lambda leaf: self._moved(n.name, leaf), result)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(str(target))
        size = self._blocks.get(str(target))
        if size is not None and isinstance(module, nn.Linear):
            args = (rounded_in_blocks(args[0], size), *args[1:])
        return super().call_module(target, args, kwargs)

    def _moved(self, name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            return x
        is_number = x.abs() < _INFINITE
        reach = SUM_ERROR * torch.where(is_number, x.abs(), 0).max()
        step = self._biases.get(name)
        if step is not None:
            axes = x.dim() - 2 if self._sites[name].kind == "conv" else 0
            reach = reach + step.view(-1, *[1] * axes)
        noise = torch.rand(x.shape, generator=self._generator, dtype=x.dtype) * 2 - 1
        return torch.where(is_number, x + noise * reach, x)


def _bias_steps(quantized: QuantizedNetwork) -> dict[str, Tensor]:
    """Node of a site that multiplies integers -> half a unit of its bias in int32, float32 [out]."""
    nodes = {node.name: node for node in quantized.network.graph.graph.nodes}
    found = {}
    for site in quantized.network.sites:
        weight = quantized.weights.get(site.name)
        for name in site.nodes if weight is not None and site.kind in ("linear", "conv") else ():
            parameters = quantized.activations.get(value_read(nodes[name]))
            if parameters is not None and weight is not None:
                found[name] = weight.parameters.decoded(weight.scheme).scales.abs().amax(1) * parameters.scale / 2
    return found


def rounded_in_blocks(x: Tensor, size: int) -> Tensor:
    """`x` [..., in] with each block of `size` rounded to 8 bits about 0, ties to even; float32."""
    short = -x.shape[-1] % size
    blocks = nn.functional.pad(x, (0, short)).reshape(*x.shape[:-1], -1, size)
    scale = blocks.abs().amax(-1, keepdim=True) / _LEVEL_4_STEPS
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]
