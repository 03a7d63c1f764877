"""The fast linear map is torch's own, gradients included."""

from __future__ import annotations

import pytest
import torch

from pennyweight.kernels.matmul import has_fast_linear, linear_f32

pytestmark = pytest.mark.skipif(not has_fast_linear(), reason="torch was built without oneDNN")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (1, 5)])
def test_its_gradients_are_those_of_the_plain_map(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    bias = torch.randn(4, requires_grad=True) if with_bias else None
    leaves = [x, weight, *([] if bias is None else [bias])]
    outer = torch.randn(*shape[:-1], 4)
    fast, plain = (
        torch.autograd.grad(product(x, weight, bias), leaves, outer)
        for product in (linear_f32, torch.nn.functional.linear)
    )
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    x, weight = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True)
    [gradient] = torch.autograd.grad(linear_f32(x, weight, None).sum(), [weight])
    torch.testing.assert_close(gradient, x.sum(0).expand(4, 5))
    with torch.no_grad():
        assert not linear_f32(x, weight, None).requires_grad
