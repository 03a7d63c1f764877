"""Codes of a network learned block after block, so that each block's output stays.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (2021); rounding of
activations dropped at random as in Wei et al., "QDrop" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.parallel import one_thread_per_operation, parallel_map
from pennyweight.models.network.blocks import NetworkBlock, partition
from pennyweight.models.network.network import Inputs, Network
from pennyweight.models.network.part import Parts, Recorder
from pennyweight.pipeline.network.dropped import chance, dropped
from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.activation import ActivationParameters
from pennyweight.solvers.learned.base import BlockProblem, BlockSolver
from pennyweight.solvers.learned.sigmoid import Sigmoid

# Pictures (or sentences) of one batch, and batches of one step.
_TOGETHER, _BATCHES = 16, 2


@dataclass(frozen=True)
class BlockError:
    """sites   of the block
    before  mean squared error of the block's output with the codes that it started from, activations rounded
    after   the same with those that were learned
    """

    sites: tuple[str, ...]
    before: float
    after: float


@dataclass(frozen=True)
class ReconstructionResult:
    """weights      site -> its codes, also those of sites that nothing was learned for
    activations  value -> its scale and zero point, as given unless steps were learned
    blocks       by the name of the value that comes out
    notes        what could not be done
    """

    weights: Mapping[str, QuantizedWeight]
    activations: Mapping[str, ActivationParameters]
    blocks: Mapping[str, BlockError]
    notes: tuple[str, ...] = ()


# How many steps are done, of how many, all blocks together.
Tell = Callable[[int, int], None]


def tell_nobody(done: int, total: int) -> None:
    """For callers that do not follow the steps."""


def reconstructed(
    network: Network,
    weights: Mapping[str, QuantizedWeight],
    activations: Mapping[str, ActivationParameters],
    batches: Sequence[Any],
    *,
    steps: int,
    drop: float = 0.5,
    seed: int = 0,
    tell: Tell = tell_nobody,
    solver: BlockSolver | None = None,
    mix: bool = True,
    together: int = _TOGETHER, per_step: int = _BATCHES,
) -> ReconstructionResult:
    """Codes with which every block's output is nearer to that of the float `network`."""
    chosen = (solver or Sigmoid()).with_steps(steps, batches=per_step)
    blocks = partition(network)
    parts = Parts(network)
    now, errors, notes = dict(weights), dict[str, BlockError](), list[str]()
    with one_thread_per_operation(), torch.no_grad():
        streams = _streams(network, blocks, _cut(network, batches, together), activations)
        for number, block in enumerate(blocks):
            learned = [name for name in block.sites if name in weights]
            targets = parallel_map(lambda values, block=block: parts.run(block.nodes, values, weights={}), streams.exact)
            if block.target is not None and learned:
                run = _Running(network, parts, block, activations, streams, drop if mix else 1.0, drop, seed + 1000003 * number)
                problem = BlockProblem(
                    {name: network.site(name).matrix(network.weight(network.site(name)).detach()).float() for name in learned},
                    {name: now[name] for name in learned},
                    run.forward,
                    [values[block.target] for values in targets],
                    seed=seed,
                    learning=run.learning,
                )
                solution = chosen.refine(problem)
                now.update(solution.weights)
                errors[block.target] = BlockError(tuple(learned), solution.error_before, solution.error)
                notes += solution.notes
            decoded = {name: network.site(name).tensor(now[name].dequantize()) for name in block.sites if name in now}
            rounded = parallel_map(
                lambda values, block=block, decoded=decoded: parts.run(block.nodes, values, weights=decoded, changed=_rounding(activations)), streams.rounded
            )
            streams.advance(block, targets, rounded)
            tell(number + 1, len(blocks))
    return ReconstructionResult(now, dict(activations), errors, tuple(notes))


def _rounding(activations):
    def changed(name, value):
        return activations[name].round_trip(value) if name in activations else value
    return changed


@dataclass
class _Streams:
    exact: list[dict[str, Any]]
    rounded: list[dict[str, Any]]
    last: dict[str, int]
    done: int = 0

    def advance(self, block, exact, rounded):
        self.done += 1
        for held, found in ((self.exact, exact), (self.rounded, rounded)):
            for n, values in enumerate(found):
                held[n] = {name: value for name, value in values.items() if self.last.get(name, -1) >= self.done}


def _streams(network, blocks, batches, activations):
    last = {name: number for number, block in enumerate(blocks) for name in block.inputs}
    made = {name for block in blocks for name in block.nodes}
    free = frozenset(last) - made
    exact = [Recorder.values(network, inputs, free) for inputs in batches]
    change = _rounding(activations)
    rounded = [{name: change(name, value) if isinstance(value, Tensor) else value for name, value in values.items()} for values in exact]
    return _Streams(exact, rounded, last)


def _cut(network: Network, batches, together):
    given = [network.inputs(batch) for batch in batches]
    args = [torch.cat([one.args[i] for one in given]) for i in range(len(given[0].args))]
    return [Inputs(tuple(a[s:s + together] for a in args)) for s in range(0, len(args[0]), together)]


class _Running:
    def __init__(self, network, parts, block, activations, streams, mix, drop, seed):
        self.network, self.parts, self.block = network, parts, block
        self.activations, self.streams, self.mix, self.drop, self.seed = activations, streams, mix, drop, seed

    def _shaped(self, weights):
        return {name: self.network.site(name).tensor(w) for name, w in weights.items()}

    def forward(self, weights, batch):
        def changed(name, value):
            if name == self.block.target or name not in self.activations:
                return value
            return dropped(value, self.activations[name], None)
        values = self.parts.run(self.block.nodes, self.streams.rounded[batch], weights=self._shaped(weights), changed=changed)
        return values[self.block.target]

    def learning(self, weights, batch, step):
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 10_007 + batch)
        def changed(name, value):
            if name == self.block.target or name not in self.activations:
                return value
            return dropped(value, self.activations[name], chance(value.shape, self.drop, generator))
        given = dict(self.streams.rounded[batch])
        for name in self.block.inputs:
            value = given[name]
            if isinstance(value, Tensor) and value.is_floating_point():
                mask = chance(value.shape, self.mix, generator)
                if mask is not None:
                    given[name] = torch.where(mask, value, self.streams.exact[batch][name])
        values = self.parts.run(self.block.nodes, given, weights=self._shaped(weights), changed=changed)
        return values[self.block.target]
