"""How the numbers on an edge of a network's graph are rounded, beside how its weights are."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import UsageError
from pennyweight.formats.integer import Int
from pennyweight.schemes.names import parse_scheme
from pennyweight.schemes.scheme import Scheme
from pennyweight.schemes.storage import PerChannel, PerGroup, PerTensor

_NAME = re.compile(r"w([2-8])a([48])-(tensor|channel|g[1-9][0-9]{0,8})(-asym)?(-dynamic)?")

UINT8 = Int(8, signed=False)


@dataclass(frozen=True)
class ActivationScheme:
    """x is stored as codes of `element`, one scale and zero point for the whole tensor.

    is_dynamic    scale and zero point come from each tensor as it passes; else they are chosen by calibration
    is_symmetric  the zero point is 0 (signed) or the middle of the codes (unsigned)
    """

    element: Int = UINT8
    is_dynamic: bool = False
    is_symmetric: bool = False

    @property
    def name(self) -> str:
        """As in a report: "uint8", "int8-sym", "uint8-dynamic"."""
        return f"{self.element.name}{'-sym' * self.is_symmetric}{'-dynamic' * self.is_dynamic}"

    def parameters(self, low: float, high: float) -> ActivationParameters:
        """Those whose range, widened to hold 0, is [low, high]: scale = (high - low) / steps rounded to float32, zero =
        round(smallest - low / scale), ties to even.

        A range of nothing but 0 has the scale 1. Raises UsageError where the ends are not finite.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UsageError(f"a range from {low} to {high}: give finite ends")
        smallest, largest = self.element.smallest, self.element.largest
        if self.is_symmetric:
            middle = (smallest + largest + 1) / 2
            scale = max(-low / (middle - smallest), high / (largest - middle))
            return ActivationParameters(_stored(scale), int(middle), self.element)
        scale = _stored((high - low) / (largest - smallest))
        zero = min(max(round(smallest - low / scale), int(smallest)), int(largest))
        return ActivationParameters(scale, zero, self.element)


def _stored(scale: float) -> float:
    """`scale` as float32: never 0, never so small that x / scale overflows for an x of the range."""
    if scale == 0:
        return 1.0
    tiny = torch.finfo(torch.float32).tiny
    return float(torch.tensor(max(scale, tiny), dtype=torch.float32))


@dataclass(frozen=True)
class ActivationParameters:
    """value = clamp(round(x / scale) + zero), ties to even; x is read as (value - zero) * scale, all in float32.

    scale  a float32 number above 0; zero  a value of `element`
    """

    scale: float
    zero: int
    element: Int

    def values(self, x: Tensor) -> Tensor:
        """The stored values, whole numbers in float32, of any `x`; divided, as ONNX's QuantizeLinear does."""
        scaled = torch.div(x.float(), torch.tensor(self.scale, device=x.device))
        return scaled.round_().add_(self.zero).clamp_(self.element.smallest, self.element.largest)

    def codes(self, x: Tensor) -> Tensor:
        """uint8 codes of `x`: values counted from the smallest."""
        return self.values(x).sub_(self.element.smallest).to(torch.uint8)

    def round_trip(self, x: Tensor) -> Tensor:
        """What a reader of the stored values sees, float32."""
        return self.values(x).sub_(self.zero).mul_(torch.tensor(self.scale, device=x.device))

    @property
    def low(self) -> float:
        """The smallest number that can be read."""
        return (self.element.smallest - self.zero) * self.scale

    @property
    def high(self) -> float:
        return (self.element.largest - self.zero) * self.scale


@dataclass(frozen=True)
class NetworkScheme:
    """What all sites and all edges of a network get: `activation` is None where weights alone are rounded."""

    weight: Scheme
    activation: ActivationScheme | None = None

    @property
    def name(self) -> str:
        if self.activation is None:
            return self.weight.name
        match self.weight.granularity:
            case PerTensor():
                shared = "tensor"
            case PerChannel():
                shared = "channel"
            case PerGroup(size):
                shared = f"g{size}"
        tail = "-asym" * (self.weight.zero is not None) + "-dynamic" * self.activation.is_dynamic
        return f"w{self.weight.element.bits}a{self.activation.element.bits}-{shared}{tail}"


def parse_network_scheme(name: str) -> NetworkScheme:
    """The scheme of a name: wBITSaBITS-SHARED[-asym][-dynamic], or the name of a scheme of weights alone.

    w4a8-channel: int4-channel weights, uint8 activations with a zero point, their ranges from calibration. SHARED
    (tensor, channel, g and a group size) and -asym are said of weights. Scales are float32 where nothing else is said.
    Raises UsageError.

    >>> [parse_network_scheme(name).name for name in ("w4a8-channel", "w8a8-tensor-dynamic", "int4-g32")]
    ['w4a8-channel', 'w8a8-tensor-dynamic', 'int4-g32-f32']
    """
    match = _NAME.fullmatch(name)
    if match is None:
        try:
            return NetworkScheme(parse_scheme(name).with_scale_dtype(torch.float32))
        except UsageError as error:
            raise UsageError(
                f"{error}; or with activations: w8a8-channel, w4a8-channel, w8a8-channel-dynamic"
            ) from error
    weights, activations, shared, asym, dynamic = match.groups()
    sign = "uint" if asym else "int"
    scheme = parse_scheme(f"{sign}{weights}-{shared}{asym or ''}").with_scale_dtype(torch.float32)
    return NetworkScheme(scheme, ActivationScheme(Int(int(activations), signed=False), is_dynamic=bool(dynamic)))
