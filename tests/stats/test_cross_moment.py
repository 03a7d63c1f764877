"""The cross moment: parts and merges give what one pass gives, and which input stands on which side."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.core.errors import ShapeError
from pennyweight.stats import cross_moment
from pennyweight.stats.cross_moment import CrossMoment

# float32 sums of a few hundred products of numbers of size 1, added in another order.
ORDER_OF_SUMS = 1e-5


@pytest.mark.parametrize("inputs", [1, 3, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_has_the_original_input_in_its_rows(inputs: int, dtype: torch.dtype) -> None:
    original, x = torch.randn(2, 70, inputs).to(dtype)
    mean = CrossMoment.zero(inputs).update_([original], [x]).mean_()
    assert mean.dtype == torch.float32
    expected = original.double().T @ x.double() / 70
    torch.testing.assert_close(mean.double(), expected, atol=ORDER_OF_SUMS, rtol=ORDER_OF_SUMS)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), inputs=st.integers(1, 40), tile=st.sampled_from([7, 16, 512]))
def test_updates_in_parts_and_merges_equal_one_pass(cuts: list[int], inputs: int, tile: int) -> None:
    original, x = torch.randn(2, 60, inputs)
    edges = [0, *sorted(cuts), 60]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_moment, "_TILE", tile)
        once, in_parts = CrossMoment.zero(inputs).update_([original], [x]), CrossMoment.zero(inputs)
        merged = CrossMoment.zero(inputs)
        for a, b in pairwise(edges):
            in_parts = in_parts.update_([original[a:b]], [x[a:b]])
            merged = merged.merge_(CrossMoment.zero(inputs).update_([original[a:b]], [x[a:b]]))
        assert once.rows == in_parts.rows == merged.rows == 60
        expected = once.mean_()
        torch.testing.assert_close(in_parts.mean_(), expected, atol=ORDER_OF_SUMS, rtol=ORDER_OF_SUMS)
        torch.testing.assert_close(merged.mean_(), expected, atol=ORDER_OF_SUMS, rtol=ORDER_OF_SUMS)


@pytest.mark.parametrize("shapes", [((5, 4), (5, 3)), ((5, 3), (5, 4)), ((5, 4), (6, 4))])
def test_other_tokens_or_widths_are_refused(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(ShapeError, match="same tokens"):
        CrossMoment.zero(4).update_([torch.randn(shapes[0])], [torch.randn(shapes[1])])
