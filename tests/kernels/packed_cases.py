"""Quantized weights for the tests of packed products, and the products as sums of float64 that know no layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from pennyweight.core.registry import provided
from pennyweight.formats import NumberFormat
from pennyweight.kernels.native import native
from pennyweight.kernels.packed import PackedMatrix

_library = native()
TABLES = [] if _library is None else list(_library.kernel_tables())
# What takes `table` uses these kernels; see conftest.py.
on_every_table = pytest.mark.parametrize("table", TABLES or [pytest.param("", marks=pytest.mark.skip("not built"))])
FORMATS = provided("formats")
WEIGHT_FORMATS = sorted(name for name in FORMATS if not name.startswith("e8m0"))
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A weight [rows, cols] with a scale for each `group` columns; `zero` is one of the layout's kinds."""

    rows: int
    cols: int
    group: int
    zero: str = "none"
    scale: torch.dtype = torch.bfloat16
    unit: float = 1.0
    power_of_two: bool = False


@dataclass(frozen=True)
class Weight:
    """weight = unit * (scale * value - minus), all of them float64 [rows, cols]; `packed` is the same."""

    value: Tensor
    scale: Tensor
    minus: Tensor
    unit: float
    packed: PackedMatrix

    @property
    def dense(self) -> Tensor:
        return self.unit * (self.scale * self.value - self.minus)

    @property
    def sizes(self) -> Tensor:
        """Of what is added and subtracted: what errors are measured by."""
        return abs(self.unit) * ((self.scale * self.value).abs() + self.minus.abs())

    def product(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float64 x @ dense.T + bias, and the sum of the sizes of all that is added for it."""
        x, added = x.double(), torch.zeros(1) if bias is None else bias.double()
        return x @ self.dense.T + added, x.abs() @ self.sizes.T + added.abs()


def random_codes(element: NumberFormat, *shape: int) -> Tensor:
    """uint8 codes of finite values."""
    finite = element.decode(torch.arange(2**element.bits, dtype=torch.uint8)).isfinite().nonzero().flatten()
    return finite[torch.randint(len(finite), shape)].to(torch.uint8)


@cache
def weight_of(name: str, case: Case) -> Weight:
    element = FORMATS[name]
    torch.manual_seed(hash((case.rows, case.cols, case.group, element.bits)) % 1000)
    codes = random_codes(element, case.rows, case.cols)
    shape = (case.rows, case.cols // case.group)
    scales = (torch.randn(shape) * 0.1).to(case.scale)
    zeros = offsets = None
    if case.power_of_two:
        scales = (2.0 ** torch.randint(-2, 3, shape)).to(case.scale) * (1 - 2 * torch.randint(0, 2, shape))
    if case.zero == "integer":
        zeros = torch.randint(int(element.smallest), int(element.largest) + 1, shape, dtype=torch.int16)
    elif case.zero == "float":
        zeros = (torch.randn(shape) * element.largest / 3).to(case.scale)
    elif case.zero == "offset":
        offsets = torch.randn(shape).to(case.scale)
    packed = PackedMatrix.pack(codes, scales, element=element, zeros=zeros, offsets=offsets, unit=case.unit)
    wide = scales.double().repeat_interleave(case.group, 1)
    minus = torch.zeros(shape) if case.zero == "none" else scales.double() * zeros if offsets is None else offsets
    return Weight(
        element.decode(codes).double(), wide, minus.double().repeat_interleave(case.group, 1), case.unit, packed
    )
