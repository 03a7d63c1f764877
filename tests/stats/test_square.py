"""Mean squares against the definition, in float64, and merging."""

from __future__ import annotations

import pytest
import torch

from pennyweight.core.errors import ShapeError
from pennyweight.stats.square import Square

# Squares are made in float32.
TOLERANCE = 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_mean_of_squares_however_the_rows_come(dtype: torch.dtype) -> None:
    x = (torch.randn(70, 600) * torch.logspace(-3, 3, 600)).to(dtype)
    expected = x.double().square().mean(0)
    whole = Square.zero(600).update(x)
    parts = Square.zero(600).update(x[:1]).update(x[1:1]).merge(Square.zero(600).update(x[1:]))
    for found in (whole, parts):
        assert found.rows == 70
        torch.testing.assert_close(found.mean.double(), expected, rtol=TOLERANCE, atol=0)


def test_no_rows_give_zeros_and_another_width_is_refused() -> None:
    assert Square.zero(3).mean.tolist() == [0, 0, 0]
    with pytest.raises(ShapeError, match="width 3"):
        Square.zero(3).update(torch.ones(2, 4))
