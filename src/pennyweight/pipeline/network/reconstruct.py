"""Codes of a network learned block after block, so that each block's output stays.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (2021); Wei et al., "QDrop:
Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import UsageError
from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.models.network.blocks import NetworkBlock, partition
from pennyweight.models.network.network import Network
from pennyweight.models.network.part import Changed, Parts
from pennyweight.pipeline.network.dropped import chance, dropped
from pennyweight.pipeline.network.streams import Streams, cut, largest_batch
from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.activation import ActivationParameters
from pennyweight.solvers.learned.base import BlockProblem, BlockSolver
from pennyweight.solvers.learned.sigmoid import Sigmoid

_SOLVER = Sigmoid()
# Rows (pictures, sentences) of one batch at most, and numbers that go into the network at once.
_ROWS, _ELEMENTS = 8, 1 << 19
# Rows that a step learns from at most, and batches of them at least: each is run by one thread.
_STEP_ROWS, _STEP_BATCHES = 32, 4
# Apart from each other for any number of steps and batches that there may be.
_SEEDS = 1_000_003


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
    activations  value -> its scale and zero point, as given
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
    solver: BlockSolver = _SOLVER,
    tell: Tell = tell_nobody,
) -> ReconstructionResult:
    """Codes with which the output of every block of `network` (blocks.py) is nearer to what it is in float:

        min over codes of the mean of (block(Ŵ, x̃) - block(W, x))²

    x comes from the float network, x̃ from that whose blocks before are rounded, activations included. Inside of a
    block a step rounds each element of a value that has `activations` with probability `drop` (QDrop) and leaves it as
    it is otherwise; codes are judged with all of them rounded, and those of the start kept where none are better.

    `weights` are the codes that are begun with, by site; sites left out stay in float. `batches` are as `network` takes
    them. The result depends on `seed`, not on the number of threads. Raises UsageError for names that the network
    has not.
    """
    _check(network, weights, activations)
    pieces = cut(network, batches, rows=_ROWS, elements=_ELEMENTS)
    per_step = max(_STEP_BATCHES, _STEP_ROWS // largest_batch(pieces)) if network.batch_varies else _STEP_BATCHES
    blocks = partition(network)
    parts = Parts(network)
    with one_thread_per_operation(), torch.no_grad():
        streams = Streams(network, parts, blocks, pieces, activations)
        work = _Work(network, parts, dict(weights), activations, streams, drop)
        learned = [block for block in blocks if work.sites(block)]
        chosen = solver.with_steps(steps, batches=per_step)
        for block in blocks:
            exact = streams.targets(block)
            if block in learned:
                done = learned.index(block)
                work.learn(block, exact, chosen, _told(tell, done, len(learned)), seed=seed * _SEEDS + done)
            streams.advance(block, exact, work.decoded)
    lost = [name for block in blocks if block.target is None for name in block.sites if name in weights]
    notes = [*work.notes, *(f"{name}: no single value shows what it does; its codes stay" for name in lost)]
    return ReconstructionResult(work.weights, dict(activations), work.errors, tuple(notes))


def _told(tell: Tell, blocks: int, total: int) -> Tell:
    """`tell` for the steps of one block after so many others, of `total`."""
    return lambda done, steps: tell(blocks * steps + done, total * steps)


def _check(
    network: Network, weights: Mapping[str, QuantizedWeight], activations: Mapping[str, ActivationParameters]
) -> None:
    sites = {site.name for site in network.sites}
    values = {node.name for node in network.graph.graph.nodes}
    for kind, given, known in (("site", weights, sites), ("value", activations, values)):
        for name in given:
            if name not in known:
                raise UsageError(f"{name} is no {kind} of the network: names are those of Network.{kind}s")


class _Work:
    """Codes as they are so far."""

    def __init__(
        self,
        network: Network,
        parts: Parts,
        weights: dict[str, QuantizedWeight],
        activations: Mapping[str, ActivationParameters],
        streams: Streams,
        drop: float,
    ) -> None:
        self._network, self._parts, self._streams = network, parts, streams
        self._activations, self._drop = activations, drop
        self.weights = weights
        self._sites = {site.name: site for site in network.sites}
        self.decoded = {name: self._sites[name].tensor(weight.dequantize()) for name, weight in weights.items()}
        self.errors: dict[str, BlockError] = {}
        self.notes: list[str] = []

    def sites(self, block: NetworkBlock) -> list[str]:
        """Those of `block` that are learned."""
        return [name for name in block.sites if name in self.weights and block.target is not None]

    def learn(
        self,
        block: NetworkBlock,
        exact: Sequence[Mapping[str, Any]],
        solver: BlockSolver,
        tell: Tell,
        *,
        seed: int,
    ) -> None:
        """Better codes for the sites of `block`."""
        assert block.target is not None
        sites = self.sites(block)
        floats = {name: self._network.weight(self._sites[name]).detach() for name in sites}

        def forward(given: Mapping[str, Tensor], batch: int) -> Tensor:
            return self._output(block, given, batch, self._rounded(block))

        def learning(given: Mapping[str, Tensor], batch: int, step: int) -> Tensor:
            generator = torch.Generator().manual_seed((seed * _SEEDS + step) * _SEEDS + batch)
            return self._output(block, given, batch, self._rounded(block, generator))

        solution = solver.refine(
            BlockProblem(
                {name: self._sites[name].matrix(w).float() for name, w in floats.items()},
                {name: self.weights[name] for name in sites},
                forward,
                [values[block.target] for values in exact],
                seed=seed,
                tell=tell,
                learning=learning,
            )
        )
        self.weights.update(solution.weights)
        for name, weight in solution.weights.items():
            self.decoded[name] = self._sites[name].tensor(weight.dequantize())
        self.errors[block.target] = BlockError(tuple(sites), solution.error_before, solution.error)
        self.notes += [f"{', '.join(sites)}: {note}" for note in solution.notes]

    def _output(self, block: NetworkBlock, given: Mapping[str, Tensor], batch: int, changed: Changed) -> Tensor:
        """What `block` gives with the matrices `given`, on what the rounded blocks before it give."""
        assert block.target is not None
        weights = self.decoded | {name: self._sites[name].tensor(w) for name, w in given.items()}
        found = self._parts.run(block.nodes, self._streams.rounded[batch], weights=weights, changed=changed)
        target: Tensor = found[block.target]
        return target

    def _rounded(self, block: NetworkBlock, generator: torch.Generator | None = None) -> Changed:
        """Rounds the values inside of `block`: all elements, or with a `generator` those that chance takes.

        Its output is compared as it is computed: the rounding that follows is the next block's.
        """

        def changed(name: str, value: Tensor) -> Tensor:
            if name not in self._activations or name == block.target:
                return value
            mask = None if generator is None else chance(value.shape, self._drop, generator)
            return dropped(value, self._activations[name], mask)

        return changed
