"""The numbers on an edge, rounded with a step and an offset that are learnt, or as each tensor's own range asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.train.qat.lsq import LEAST, Grid, gradient_factor, passed_through, rounded, sized


class ActivationRounding(nn.Module):
    """x -> (q - z) s, q = clamp(round(x / s) + z), of the type of x, computed in float32.

    step     1 at the start: s = step * unit
    unit     s at the start
    offset   None where the zero point stays, else in units of the whole range at the start:
             z = clamp(round(-offset / s)), so that an exact 0 stays one
    """

    unit: Tensor

    def __init__(
        self, scheme: ActivationScheme, start: ActivationParameters, *, features: int, learns_zero: bool
    ) -> None:
        """`features`: numbers on the edge for one sample of a batch."""
        super().__init__()
        self.scheme = scheme
        self.grid = Grid(scheme.element, zero=start.zero)
        self.step = nn.Parameter(torch.ones(()))
        self.span = scheme.element.largest - scheme.element.smallest
        self.offset = nn.Parameter(torch.tensor(-start.zero / self.span)) if learns_zero else None
        self.register_buffer("unit", torch.tensor(start.scale))
        self.factor = gradient_factor(features, scheme.element)
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_enabled:
            return x
        return rounded(x.float(), *self._scaled(), None, self.grid).to(x.dtype)

    def _scaled(self) -> tuple[Tensor, Tensor | None]:
        """scale and offset []."""
        scale = sized(self.step, self.unit, least=LEAST, factor=self.factor)
        if self.offset is None:
            return scale, None
        return scale, sized(self.offset, self.unit * self.span, least=-torch.inf, factor=self.factor)

    @property
    def parameters_(self) -> ActivationParameters:
        """What `forward` rounds with."""
        with torch.no_grad():
            scale, offset = self._scaled()
            stored = self.grid.scale(scale)
            zeros = self.grid.zeros(stored, offset)
        return ActivationParameters(float(stored), 0 if zeros is None else int(zeros), self.scheme.element)


class DynamicRounding(nn.Module):
    """The same with the range of each tensor, as ONNX's DynamicQuantizeLinear takes it; gradients pass unchanged."""

    def __init__(self, scheme: ActivationScheme) -> None:
        super().__init__()
        self.scheme, self.grid = scheme, Grid(scheme.element)
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_enabled or x.numel() == 0:
            return x
        with torch.no_grad():
            scale, zeros = self._range(x)
            values = self.grid.values(x.float(), scale, zeros)
            made = self.grid.decoded(values, scale, zeros).to(x.dtype)
        return passed_through(x, made)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scale and zero point, by the arithmetic of pennyweight.models.network.quantized.dynamic_parameters."""
        smallest, largest = self.scheme.element.smallest, self.scheme.element.largest
        low, high = x.min().float().clamp_max(0), x.max().float().clamp_min(0)
        scale = (high - low) / torch.tensor(largest - smallest, device=x.device)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return scale, (smallest - low / scale).round().clamp(smallest, largest)
