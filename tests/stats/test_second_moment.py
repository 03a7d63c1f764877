"""The second moment: parts, merges and threads give what one pass gives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.kernels.native import multiplies_bfloat16
from pennyweight.stats import second_moment
from pennyweight.stats.second_moment import SecondMoment, _add_products, _add_products_native

# float32 sums of a few hundred products of numbers of size 1, added in another order.
ORDER_OF_SUMS = 1e-5


def gathered(parts: Sequence[Tensor], inputs: int) -> SecondMoment:
    found = SecondMoment.zero(inputs)
    for part in parts:
        found = found.update_([part])
    return found


def reference(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / max(len(x), 1)


@pytest.mark.parametrize("inputs", [1, 3, 511, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_hessian_is_the_mean_of_the_outer_products(inputs: int, dtype: torch.dtype) -> None:
    x = torch.randn(70, inputs).to(dtype)
    hessian = gathered([x], inputs).hessian_()
    assert hessian.dtype == torch.float32
    torch.testing.assert_close(hessian.double(), reference(x), atol=ORDER_OF_SUMS, rtol=ORDER_OF_SUMS)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="no kernels for products of bfloat16 on this machine")
@pytest.mark.parametrize("inputs", [64, 128, 640])
@pytest.mark.parametrize("rows", [[1], [2], [255, 2], [600, 1, 37]])
def test_products_of_bfloat16_equal_their_twin(inputs: int, rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(inputs)
    # Whole numbers, whose products and sums are exact in whatever order they are made.
    x = [torch.randint(-9, 10, (count, inputs), generator=generator).bfloat16() for count in rows]
    totals = []
    for add in (_add_products_native, _add_products):
        total = torch.ones(inputs, inputs)
        add(total, list(x))
        totals.append(SecondMoment(total, sum(rows)).hessian_())
    assert torch.equal(*totals)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="no kernels for products of bfloat16 on this machine")
def test_products_of_bfloat16_are_summed_in_float32() -> None:
    x = torch.randn(999, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(192, 192)
    _add_products_native(total, [x])
    hessian = SecondMoment(total, len(x)).hessian_()
    torch.testing.assert_close(hessian.double(), reference(x), atol=ORDER_OF_SUMS, rtol=ORDER_OF_SUMS)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), inputs=st.integers(1, 40), tile=st.sampled_from([7, 16, 512]))
def test_updates_in_parts_and_merges_equal_one_pass(cuts: list[int], inputs: int, tile: int) -> None:
    x = torch.randn(60, inputs)
    edges = [0, *sorted(cuts), 60]
    parts = [x[a:b] for a, b in pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_moment, "_TILE", tile)
        once, in_parts = gathered([x], inputs), gathered(parts, inputs)
        merged = gathered([], inputs)
        for part in parts:
            merged = merged.merge_(gathered([part], inputs))
        assert once.rows == in_parts.rows == merged.rows == 60
        expected = once.hessian_()
        torch.testing.assert_close(in_parts.hessian_(), expected, atol=ORDER_OF_SUMS, rtol=ORDER_OF_SUMS)
        torch.testing.assert_close(merged.hessian_(), expected, atol=ORDER_OF_SUMS, rtol=ORDER_OF_SUMS)


@pytest.mark.parametrize("inputs", [1, 40, 600, 1100])
def test_the_hessian_is_symmetric_to_the_last_bit(inputs: int) -> None:
    hessian = gathered([torch.randn(33, inputs), torch.randn(5, inputs)], inputs).hessian_()
    assert torch.equal(hessian, hessian.T)


def test_the_number_of_threads_changes_no_bit() -> None:
    parts = [torch.randn(300, 1100), torch.randn(17, 1100)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gathered(parts, 1100).hessian_())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_inputs_are_not_edited_and_may_be_strided_or_empty() -> None:
    x = torch.randn(20, 30)
    kept = x.clone()
    strided = gathered([x.T], 20).hessian_()
    assert torch.equal(strided, gathered([x.T.contiguous()], 20).hessian_())
    gathered([x], 30)
    assert torch.equal(x, kept)
    empty = gathered([torch.empty(0, 30)], 30)
    assert empty.rows == 0
    assert torch.equal(empty.hessian_(), torch.zeros(30, 30))


def test_calibration_may_run_in_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(10, 1100)
        hessian = gathered([x], 1100).hessian_()
    assert torch.equal(hessian, gathered([x], 1100).hessian_())


@pytest.mark.parametrize("shape", [(3, 29), (30,), (2, 3, 30)])
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="cannot join a second moment of width 30"):
        SecondMoment.zero(30).update_([torch.zeros(shape)])
