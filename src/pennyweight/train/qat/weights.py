"""The weight of a site, rounded with steps that are learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.core.errors import UsageError
from pennyweight.models.network.network import NetworkSite
from pennyweight.schemes import PerTensor, QuantizedWeight, Scheme
from pennyweight.schemes.parameters import Parameters
from pennyweight.schemes.quantized import grouped
from pennyweight.train.qat.history import History
from pennyweight.train.qat.lsq import LEAST, Grid, kept, rounded, sized, weight_gradient_factor


def why_not_trained(scheme: Scheme) -> str | None:
    """Why the parameters of `scheme` cannot be learnt here; None where they can."""
    if scheme.is_plain:
        return None
    return (
        f"{scheme} has offsets, zero points that are floats or scales that are codes, which are not learnt here: "
        "use one with float scales and integer zero points or none, such as int4-channel or int4-g32-asym"
    )


class WeightRounding(nn.Module):
    """matrix [out, in] -> what a reader of its codes sees, of the same shape and type.

    step     [rows, groups] (Scheme.scale_shape), 1 at the start: scale = step * unit * the size of its row
    unit     the scale at the start, of a row of size 1; its sign stays, as steps are held above 0
    offset   [rows, groups], where the scheme has a zero point, in units of the whole range at the start: the zero point
             is -offset / scale, rounded
    history  how codes have changed, and those that no longer do; None where it is not followed

    A row's size is 1, or |gamma / sigma| of the batch norm that is folded into the matrix: with scales that belong to
    rows the codes then do not depend on running statistics. A scale that the whole matrix shares has no such size.
    """

    unit: Tensor

    def __init__(self, site: NetworkSite, scheme: Scheme, start: Parameters, *, has_history: bool = True) -> None:
        """`start` for a matrix whose rows have the size 1."""
        super().__init__()
        if why := why_not_trained(scheme):
            raise UsageError(f"{site.name}: {why}")
        self.site, self.scheme = site, scheme
        self.grid = Grid(scheme.element, scheme.scale.torch_dtype, scheme.arithmetic)
        given = start.decoded(scheme)
        self.step = nn.Parameter(torch.ones_like(given.scales))
        self.span = scheme.element.largest - scheme.element.smallest
        self.offset = None if given.zeros is None else nn.Parameter(-given.zeros / self.span)
        self.register_buffer("unit", given.scales.clone())
        self.history = History(site.matrix_shape, given.scales.device) if has_history else None
        outputs, inputs = site.matrix_shape
        self.factor = weight_gradient_factor(outputs * inputs // given.scales.numel(), scheme.element)
        self.is_enabled = True

    def forward(self, matrix: Tensor, rows: Tensor | None = None) -> Tensor:
        if not self.is_enabled:
            return matrix
        scale, offset = self._scaled(rows)
        fixed = None if self.history is None else grouped(self.history.fixed, self.scheme)
        made = rounded(grouped(matrix.float(), self.scheme), scale, offset, fixed, self.grid)
        return made.reshape(matrix.shape).to(matrix.dtype)

    def _scaled(self, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """scale and offset [rows, groups, 1]."""
        sizes = self._sizes(rows, self.step)
        scale = sized(self.step, self.unit, least=LEAST, factor=self.factor) * sizes
        if self.offset is None:
            return scale[..., None], None
        offset = sized(self.offset, self.unit * self.span, least=-torch.inf, factor=self.factor) * sizes
        return scale[..., None], offset[..., None]

    @property
    def is_by_rows(self) -> bool:
        """Whether each scale belongs to one row."""
        return not isinstance(self.scheme.granularity, PerTensor)

    def _sizes(self, rows: Tensor | None, like: Tensor) -> Tensor:
        """The size of the row of each scale."""
        if rows is None or not self.is_by_rows:
            return torch.ones_like(like)
        return rows[:, None]

    @torch.no_grad()
    def values(self, matrix: Tensor, rows: Tensor | None = None) -> Tensor:
        """The value of each code, float32 [out, in]."""
        values = self.grid.values(grouped(matrix.float(), self.scheme), *self._stored(rows)).reshape(matrix.shape)
        return kept(values, None if self.history is None else self.history.fixed)

    @torch.no_grad()
    def centred(self, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """The weights [out, in] that `values` stand for."""
        return self.grid.decoded(grouped(values, self.scheme), *self._stored(rows)).reshape(values.shape)

    @torch.no_grad()
    def quantized(self, matrix: Tensor, rows: Tensor | None = None) -> QuantizedWeight:
        """The codes that `forward` of the same arguments decodes."""
        scale, zeros = (None if x is None else x[..., 0] for x in self._stored(rows))
        assert scale is not None
        parameters = Parameters(scale.to(self.grid.stored), None if zeros is None else zeros.to(torch.int16))
        return QuantizedWeight.of(self.scheme.element.encode(self.values(matrix, rows)), parameters, self.scheme)

    def _stored(self, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """scale and zero point [rows, groups, 1], as they are stored."""
        scale, offset = self._scaled(rows)
        stored = self.grid.scale(scale)
        return stored, self.grid.zeros(stored, offset)
