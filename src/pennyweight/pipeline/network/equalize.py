"""Cross-layer equalization of a captured network: the channels between its sites get ranges that fit each other.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pennyweight.models.network.network import Network


@dataclass(frozen=True)
class EqualizationReport:
    """sites     whose weights were changed
    channels  how many channels between sites got a scale of their own
    sweeps    how often all of them were gone through
    kept      site -> why the channels that it makes keep their ranges
    replaced  values of a clipping function (ReLU6) that no calibration data reached: a ReLU now
    absorbed  value behind a ReLU -> in how many channels a constant went into the biases of the readers
    """

    sites: tuple[str, ...] = ()
    channels: int = 0
    sweeps: int = 0
    kept: Mapping[str, str] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    absorbed: Mapping[str, int] = field(default_factory=dict)


def equalized(network: Network, batches: Sequence[Any] | None = None) -> tuple[Network, EqualizationReport]:
    """The same function with weights whose ranges fit each other, and what was done; `network` with batch norms folded."""
    raise NotImplementedError
