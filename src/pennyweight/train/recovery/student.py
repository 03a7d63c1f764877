"""A quantized model that is differentiated block by block, with one block decoded in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.core.parallel import parallel_map
from pennyweight.models.sites import Place
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.parameters import Parameters
from pennyweight.train.recovery.masters import Master, TrainedSite, vector_master
from pennyweight.train.recovery.teacher import Teacher

Slopes = dict[str, Tensor]
_STORED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Leaf:
    """A parameter of the module in the making: decoded sites in their places, or the value of a master."""

    value: Tensor
    sites: tuple[tuple[TrainedSite, Place], ...] = ()


class Student:
    """`model` with the codes of `weights` (by site name) in place of its sites' weights.

    masters   what is trained, by name: "SITE.scales", and each norm and bias by its checkpoint name
    sites     site name -> the site in training
    """

    def __init__(self, model: StreamedModel, weights: Mapping[str, QuantizedWeight], batches: Sequence[Tensor]) -> None:
        self.model = model
        sites = [site for site in model.sites if site.name in weights]
        self.sites = {site.name: TrainedSite.of(site, _moved(weights[site.name], model.device)) for site in sites}
        self._vectors = _vectors(model)
        self._block_of = {name: _block_of(model, name) for name in self._vectors}
        bits = _mean_bits(self.sites.values())
        self.masters: dict[str, Master] = {
            key: vector_master(model.checkpoint.read(key).to(model.device), bits=bits) for key in self._vectors.values()
        }
        for name, site in self.sites.items():
            self.masters.update({f"{name}.{part}": master for part, master in site.masters.items()})
        self._stream = model.start(batches)

    @property
    def weights(self) -> dict[str, QuantizedWeight]:
        """Every site as it is now, in stored values."""
        return {name: site.weight for name, site in self.sites.items()}

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Every norm and bias as it is now, in stored values, by checkpoint name."""
        return {key: self.masters[key].value for key in self._vectors.values()}

    def losses(self, teacher: Teacher, batches: Sequence[int]) -> list[float]:
        """The loss of each batch, a mean over its tokens, with everything rounded to the stored types."""
        stream = self._part(batches)
        for index in range(len(self.model.blocks)):
            with self._opened(index) as (block, _):
                self.model.advance(block, index, stream)
        given = {name: leaf.value for name, leaf in self._leaves(len(self.model.blocks)).items()}
        with self.model.finishing(stream, given=lambda number: given) as finish:

            def one(number: int) -> float:
                return float(teacher.loss(finish(number), batches[number])) / stream.input_ids[number].numel()

            return parallel_map(one, range(len(batches)))

    def loss(self, teacher: Teacher, batches: Sequence[int]) -> float:
        """The same, as the mean over the tokens of all of them."""
        tokens = [self._stream.input_ids[batch].numel() for batch in batches]
        losses = zip(self.losses(teacher, batches), tokens, strict=True)
        return math.fsum(loss * count for loss, count in losses) / sum(tokens)

    def slopes(self, teacher: Teacher, batches: Sequence[int]) -> tuple[float, Slopes]:
        """The mean loss over the tokens of `batches`, and its slope for each master that it depends on.

        Inputs of all blocks are kept; then the blocks are run once more, last to first, each with its own graph
        (Chen, Xu, Zhang, Guestrin, arXiv:1604.06174). Sums are made in the order of the batches.
        """
        stream = self._part(batches)
        inputs: list[list[Tensor]] = []
        for index in range(len(self.model.blocks)):
            inputs.append(stream.hidden)
            with self._opened(index) as (block, leaves):
                run = self._forward(block, index, stream, leaves)
                stream.hidden = parallel_map(run, range(len(batches)))
        loss, outer, slopes = self._finished(teacher, stream, batches)
        for index in reversed(range(len(self.model.blocks))):
            stream.hidden = inputs.pop()
            outer, found = self._back(index, stream, outer)
            slopes |= found
        return loss, slopes

    # -- parts of a pass ----------------------------------------------------------------------------------------

    def _part(self, batches: Sequence[int]) -> Stream:
        whole = self._stream
        ids, hidden = ([items[batch] for batch in batches] for items in (whole.input_ids, whole.hidden))
        return Stream(ids, hidden, [whole.arguments[batch] for batch in batches])

    def _finished(self, teacher: Teacher, stream: Stream, batches: Sequence[int]) -> tuple[float, list[Tensor], Slopes]:
        """The loss, its gradient with respect to what the last block gives, and slopes outside the blocks."""
        tokens = sum(ids.numel() for ids in stream.input_ids)
        stream.hidden = [hidden.requires_grad_() for hidden in stream.hidden]
        leaves = self._leaves(len(self.model.blocks))
        given = {name: leaf.value.requires_grad_() for name, leaf in leaves.items()}
        with self.model.finishing(stream, given=lambda number: given) as finish:

            def one(number: int) -> tuple[float, Tensor, Slopes]:
                with torch.enable_grad():
                    loss = teacher.loss(finish(number), batches[number]) / tokens
                return float(loss.detach()), *self._gradients(loss, stream.hidden[number], leaves, None)

            found = parallel_map(one, range(len(batches)))
        return math.fsum(loss for loss, _, _ in found), [dx for _, dx, _ in found], _sum(part for _, _, part in found)

    def _back(self, index: int, stream: Stream, outer: Sequence[Tensor]) -> tuple[list[Tensor], Slopes]:
        """From gradients with respect to the outputs of block `index` to those of its inputs, and its slopes."""
        stream.hidden = [hidden.detach().requires_grad_() for hidden in stream.hidden]
        with self._opened(index) as (block, leaves):
            for leaf in leaves.values():
                leaf.value.requires_grad_()
            run = self._forward(block, index, stream, leaves)

            def one(number: int) -> tuple[Tensor, Slopes]:
                with torch.enable_grad():
                    out = run(number)
                return self._gradients(out, stream.hidden[number], leaves, outer[number])

            found = parallel_map(one, range(len(outer)))
        return [dx for dx, _ in found], _sum(part for _, part in found)

    def _forward(
        self, block: nn.Module, index: int, stream: Stream, leaves: Mapping[str, _Leaf]
    ) -> Callable[[int], Tensor]:
        """The block's output for a batch; its sites in bfloat16 where calibration computes them so."""
        weights = [leaf.value for leaf in leaves.values() if leaf.sites]
        return lambda number: self.model.differentiable(block, index, stream, number, weights=weights)

    def _gradients(
        self, out: Tensor, x: Tensor, leaves: Mapping[str, _Leaf], outer: Tensor | None
    ) -> tuple[Tensor, Slopes]:
        values = [leaf.value for leaf in leaves.values()]
        dx, *rest = torch.autograd.grad(out, [x, *values], outer, allow_unused=True)
        # None where the output does not depend on the leaf.
        gradients: list[Tensor | None] = list(rest)
        slopes: Slopes = {}
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            if gradient is None:
                continue
            for site, place in leaf.sites:
                found = site.slopes(place.view(gradient))
                slopes.update({f"{site.site.name}.{part}": slope for part, slope in found.items()})
            if not leaf.sites:
                key = self._vectors[name]
                slopes[key] = self.masters[key].slope(gradient)
        return dx, slopes

    # -- parameters ---------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, index: int) -> Iterator[tuple[nn.Module, dict[str, _Leaf]]]:
        """Block `index` with its current weights, and those of its parameters that depend on masters."""
        leaves = self._leaves(index)
        with self.model.opened(index, given={name: leaf.value for name, leaf in leaves.items()}) as block:
            yield block, leaves

    def _leaves(self, index: int) -> dict[str, _Leaf]:
        """Parameters of block `index` that depend on masters; behind the last block those of all that is outside."""
        places: dict[str, list[tuple[TrainedSite, Place]]] = {}
        for site in self.model.sites_of(index):
            if site.name in self.sites:
                place = self.model.places[site.name]
                places.setdefault(place.parameter, []).append((self.sites[site.name], place))
        leaves = {name: _Leaf(self._assembled(name, members), tuple(members)) for name, members in places.items()}
        for name, key in self._vectors.items():
            if self._block_of[name] == index:
                leaves[name] = _Leaf(self.masters[key].value.float())
        return leaves

    def _assembled(self, name: str, members: Sequence[tuple[TrainedSite, Place]]) -> Tensor:
        """The parameter `name` made of decoded sites; what is no site keeps its stored values."""
        shape = self.model.module.get_parameter(name).shape
        if sum(site.site.weights for site, _ in members) == shape.numel():
            whole = torch.empty(shape, device=self.model.device)
        else:
            whole = self.model.weights.read(name).to(self.model.device)
        for site, place in members:
            place.view(whole).copy_(site.weight.dequantize(torch.float32))
        return whole


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    moved = Parameters.combined([weight.parameters], lambda one: one[0].to(device))
    return QuantizedWeight.of(weight.codes.to(device), moved, weight.scheme)


def _vectors(model: StreamedModel) -> dict[str, str]:
    """Norms and biases that are stored as they are used: parameter name -> checkpoint name."""
    found = {}
    for name, parameter in model.module.named_parameters():
        source = model.weights.sources.get(name)
        if source is None or source.converter is not None or parameter.ndim != 1:
            continue
        key = source.keys[-1]
        if model.checkpoint.tensors[key].dtype in _STORED:
            found[name] = key
    return found


def _block_of(model: StreamedModel, parameter: str) -> int:
    """The block that it is in; their number where it is in none."""
    inside = (index for index, name in enumerate(model.blocks) if parameter.startswith(f"{name}."))
    return next(inside, len(model.blocks))


def _mean_bits(sites: Iterable[TrainedSite]) -> float:
    """Bits of a code, over all weights."""
    counted = [(site.site.weights, site.start.scheme.element.bits) for site in sites]
    return sum(weights * bits for weights, bits in counted) / sum(weights for weights, _ in counted)


def _sum(parts: Iterable[Slopes]) -> Slopes:
    """Added up in order."""
    total: Slopes = {}
    for part in parts:
        for name, slope in part.items():
            total[name] = total[name] + slope if name in total else slope
    return total
