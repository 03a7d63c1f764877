"""What the user may ask of the quantization of a network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pennyweight.containers.onnx.dialect import Dialect, Runtime
from pennyweight.core.errors import UsageError
from pennyweight.core.registry import find, provided
from pennyweight.pipeline.effort import Effort
from pennyweight.plan.budget import Budget
from pennyweight.plan.overrides import parse_overrides
from pennyweight.schemes import Scheme
from pennyweight.schemes.activation import NetworkScheme, parse_network_scheme
from pennyweight.schemes.fit import Fit

# The chooser of ranges that looks at what consumers make of a value; the others are those of stats/ranges.
OUTPUT = "output"
# What a change of the outputs is called.
Loss = Literal["kl", "error"]


@dataclass(frozen=True)
class NetworkSteps:
    """solver      of the weights, one site after the other
    fit         how scales are fitted
    correct_bias  whether biases take up what rounding shifts the outputs of sites by
    refine      steps of the reconstruction of each block; 0 leaves it out
    """

    solver: str
    fit: Fit = "search"
    correct_bias: bool = False
    refine: int = 0


_WITHOUT_DATA = NetworkSteps("nearest")
_STEPS: dict[Effort, NetworkSteps] = {
    "fast": NetworkSteps("gptq", correct_bias=True),
    "normal": NetworkSteps("qronos", correct_bias=True),
    "best": NetworkSteps("qronos", correct_bias=True, refine=400),
}


@dataclass(frozen=True)
class NetworkOptions:
    """scheme        as `parse_network_scheme` reads it: of every site and edge; with a budget only what it says of
                  activations counts
    budget        what the tensors may take: chooses the scheme of each site
    keep, at      globs of sites that stay in float; GLOB=SCHEME for sites that get no other
    ends          name of a scheme for the first site and the last one of the graph, or None: they are like all others
    effort        what the run may cost: decides whatever of the next five is None
    solver        name of a solver; "nearest" uses no data
    fit           how scales are fitted: "search" or "minmax"
    correct_bias  whether biases are corrected
    refine        steps of reconstruction of each block, 0 for none
    equalize      whether weights are equalized across layers first; None: where they have one scale a tensor
    ranges        which chooser gives the ranges of activations: "output", or one of stats/ranges
    loss          what a budget keeps small: "kl" of the outputs as logits, or their squared "error"; None: what fits
    runtime       what will read the file
    seed          of whatever is drawn
    memory_bytes  that the values between operations may take; more of them lie in temporary files
    """

    scheme: str = "w8a8-channel"
    budget: Budget | None = None
    keep: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    ends: str | None = None
    effort: Effort = "normal"
    solver: str | None = None
    fit: Fit | None = None
    correct_bias: bool | None = None
    refine: int | None = None
    equalize: bool | None = None
    ranges: str = OUTPUT
    loss: Loss | None = None
    runtime: Runtime = "onnxruntime"
    seed: int = 0
    memory_bytes: int = 4 << 30

    def check(self, *, has_data: bool = True) -> None:
        """Raises UsageError for what can be seen without the network; `has_data`: calibration batches are there."""
        Dialect(self.runtime)
        wanted = self.network_scheme
        parse_overrides(self.keep, self.at)
        if self.ends is not None:
            parse_network_scheme(self.ends)
        if self.budget is not None and self.budget.kind not in ("size", "bpw"):
            raise UsageError(f"{self.budget}: a network is planned for a size or bits a weight; give size or bpw")
        for name, allowed in (
            ("effort", get_args(Effort)),
            ("fit", (*get_args(Fit), None)),
            ("loss", (*get_args(Loss), None)),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r}: give {', '.join(map(str, allowed))}")
        choosers = (OUTPUT, *sorted(provided("stats.ranges")))
        if self.ranges not in choosers:
            raise UsageError(f"ranges={self.ranges!r}: give one of {', '.join(choosers)}")
        if (self.refine or 0) < 0 or self.memory_bytes < 1:
            raise UsageError(
                f"refine={self.refine}, memory_bytes={self.memory_bytes}: neither is negative, nor memory 0"
            )
        if self.solver is not None:
            find("solvers", self.solver)
        if not has_data:
            self._check_blind(wanted)

    def _check_blind(self, wanted: NetworkScheme) -> None:
        """Raises UsageError for what needs calibration data."""
        steps = self.steps(has_data=False)
        for option, is_asked in (
            (f"scheme={self.scheme!r}, whose activations have static ranges,", _is_static(wanted)),
            (f"solver={self.solver!r}", bool(find("solvers", steps.solver).needs)),
            (f"{self.budget}", self.budget is not None),
            ("correct_bias", steps.correct_bias),
            ("refine", steps.refine > 0),
        ):
            if is_asked:
                raise UsageError(
                    f"{option} needs calibration data: give a loader of batches, or use weights alone (int8-channel) "
                    "or dynamic activations (w8a8-channel-dynamic)"
                )

    @property
    def network_scheme(self) -> NetworkScheme:
        return parse_network_scheme(self.scheme)

    @property
    def scheme_of_ends(self) -> Scheme | None:
        return None if self.ends is None else parse_network_scheme(self.ends).weight

    def steps(self, *, has_data: bool = True) -> NetworkSteps:
        """What was asked for by name, and for the rest what the effort does."""
        steps = _STEPS[self.effort] if has_data else _WITHOUT_DATA
        if self.solver is not None:
            # A solver asked for by name is what the user wants to see, and nothing after it.
            steps = NetworkSteps(self.solver)
        asked: dict[str, Any] = {"fit": self.fit, "correct_bias": self.correct_bias, "refine": self.refine}
        return replace(steps, **{name: value for name, value in asked.items() if value is not None})


def _is_static(wanted: NetworkScheme) -> bool:
    return wanted.activation is not None and not wanted.activation.is_dynamic
