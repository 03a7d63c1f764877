"""What happened to a network, for its user to read and for a program to parse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pennyweight.core.files import to_json
from pennyweight.evaluate.network.integers import IntegerAgreement
from pennyweight.evaluate.network.loss import NetworkTrial
from pennyweight.evaluate.onnx.agreement import RuntimeAgreement
from pennyweight.evaluate.onnx.latency import Latency


@dataclass(frozen=True)
class NetworkRecipe:
    """Everything needed to repeat a run, beside the network and the data.

    scheme              name of what every site and edge was asked to get, None where a budget chose
    budget              what chose, as the user said it
    calibration_sha256  of all calibration inputs; batches and samples: how many
    """

    scheme: str | None
    budget: str | None
    runtime: str
    effort: str
    keep: tuple[str, ...]
    at: tuple[str, ...]
    ranges: str | None
    equalize: bool | None
    seed: int
    batches: int = 0
    samples: int = 0
    calibration_sha256: str | None = None


@dataclass(frozen=True)
class SiteReport:
    """How one weight fared.

    error, error_nearest  tr(E H Eᵀ) / tr(W H Wᵀ) of the result and of rounding to nearest; without data H is 1
    output_error          |y - ŷ|² / |y|² of what the site gives, behind all that was rounded before it
    bias_shift            largest correction of its bias
    size_bytes            codes, scales and zero points in the file
    form                  how the weight enters its operation in the file: "integers", "blocks" or "decoded"
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: str
    error: float | None = None
    error_nearest: float | None = None
    output_error: float | None = None
    bias_shift: float | None = None
    size_bytes: int | None = None
    form: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EdgeReport:
    """A value that is rounded.

    scale, zero, low, high  where its range is static: the parameters, and the least and the largest number of its codes
    why                     what chose the range
    seen                    the least and the largest number in the calibration data; clipped: share beyond the range
    """

    name: str
    scheme: str
    scale: float | None = None
    zero: int | None = None
    low: float | None = None
    high: float | None = None
    why: str | None = None
    seen: tuple[float, float] | None = None
    clipped: float | None = None


@dataclass(frozen=True)
class NetworkRecord:
    """kept       site -> why it stays in float; refused: node that computes with a parameter and is no site -> why
    sizes         bytes: of the file, of the float file, of all quantized weights; and bits a weight
    fallbacks     site -> what was done otherwise than asked
    notes         of the run as a whole and of the file
    verification  by runtime; integers: ONNX Runtime against our simulation of its integers
    latency       against the float file, by runtime; warnings: wherever the quantized file is slower
    """

    recipe: NetworkRecipe
    network: Mapping[str, Any]
    sites: tuple[SiteReport, ...]
    edges: tuple[EdgeReport, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    trials: tuple[NetworkTrial, ...] = ()
    notes: tuple[str, ...] = ()
    sizes: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    verification: tuple[RuntimeAgreement, ...] = ()
    integers: IntegerAgreement | None = None
    latency: tuple[Latency, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verified(self) -> str:
        """ "full" where a runtime's outputs were compared, else "none"."""
        return "full" if self.verification else "none"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where the quantized file is slower than the float one."""
        return tuple(warning for one in self.latency if (warning := one.warning) is not None)

    def to_json(self) -> str:
        """All of it."""
        return to_json({**self.lasting(), **self.measured()})

    def lasting(self) -> dict[str, Any]:
        """pennyweight.json: the same for the same inputs, however long it took."""
        known = asdict(self)
        for name in ("latency", "seconds"):
            del known[name]
        return {"kind": "network", **known, "verified": self.verified}

    def measured(self) -> dict[str, Any]:
        """run.json: what depends on the machine and the moment."""
        return {
            "seconds": round(self.seconds, 3),
            "latency": [{**asdict(one), "ratio": one.ratio} for one in self.latency],
            "warnings": list(self.warnings),
        }


def bits_per_weight(sites: Sequence[SiteReport], weights: int) -> float | None:
    """Bits of the file for each weight of the quantized sites."""
    known = [site.size_bytes for site in sites if site.size_bytes is not None]
    return round(8 * sum(known) / weights, 4) if known and weights else None
