"""Codes of a network learned block after block, so that each block's output stays.

Li et al., "BRECQ" (2021); Wei et al., "QDrop" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pennyweight.models.network.network import Network
from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.activation import ActivationParameters


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
) -> ReconstructionResult:
    """Codes with which every block's output is nearer to that of the float `network`."""
    raise NotImplementedError
