"""float32 matrix product by the fastest exact path of this machine, and the names that products go by in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What a model calls for x @ W, beside nn.functional.linear and torch.addmm.
PRODUCTS = frozenset(
    {torch.matmul, torch.bmm, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}
)


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for float32 `a` [m, k] and `b` [n, k], accumulated in float32; returns [m, n].

    On x86 oneDNN runs this product about twice as fast as the BLAS that torch.mm calls, but only on
    contiguous operands: on strided ones it falls back to a reference loop a thousand times slower.
    """
    if a.device.type != "cpu" or not has_fast_linear() or 0 in (*a.shape, *b.shape):
        return a @ b.T
    return linear_f32(a, b, None)


def has_fast_linear() -> bool:
    """Whether `linear_f32` may be called: torch was built with oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def linear_f32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear for float32 CPU tensors through oneDNN; `x` [..., in], `weight` [out, in].

    Differentiable, backwards too through oneDNN: several times as fast as torch's own where its BLAS is slow.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    product = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    assert isinstance(product, Tensor)
    return product


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b; dx = dy W, dW = dyᵀ x, db = the sum of dy over all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_f32(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = matmul_nt(rows, weight.T).reshape(x.shape) if ctx.needs_input_grad[0] else None
        dw = matmul_nt(rows.T, x.reshape(-1, x.shape[-1]).T) if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None
