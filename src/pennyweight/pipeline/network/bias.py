"""Bias correction: what rounding shifts the output of a site by goes into its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), the empirical form; but
seen through the function behind the site, whose flat parts hide most of what is off there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network.identity import name_of

Function = Callable[[Tensor], Tensor]
# Of one number, number by number.
_FUNCTIONS = frozenset(
    {
        "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "leaky_relu", "gelu", "silu", "hardswish",
        "hardsigmoid", "sigmoid", "tanh", "elu", "selu", "celu", "mish", "softplus",
    }
)  # fmt: skip


def same(y: Tensor) -> Tensor:
    """The function of a site that nothing follows that is one of a single number."""
    return y


def function_behind(node: fx.Node) -> Function:
    """What every number that `node` gives goes through next, where nobody else reads it: ReLU, GELU."""
    steps: list[fx.Node] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if name_of(node) not in _FUNCTIONS or len(node.all_input_nodes) != 1:
            break
        steps.append(node)

    def applied(y: Tensor, step: fx.Node) -> Tensor:
        assert callable(step.target)
        found: Tensor = step.target(y, *step.args[1:], **step.kwargs)
        return found

    return (lambda y: reduce(applied, steps, y)) if steps else same


def output_shift(original: Sequence[Tensor], rounded: Sequence[Tensor], axis: int, behind: Function = same) -> Tensor:
    """What to add to each channel of the outputs, float64 [channels]: a step towards the least over s of the sum of
    (f(y) - f(ŷ + s))², f the function `behind`.

    `original` has the outputs y of the float network in each batch, `rounded` ŷ; channels lie along `axis`, below 0.
    With r = f(y) - f(ŷ) and g = f'(ŷ) the step of Gauss and Newton is sum(g r) / sum(g²): the mean of y - ŷ where f is
    the identity, and behind a ReLU that of the numbers which are not cut off. Let a and b be those of the samples of
    even and of odd numbers: s is their harmonic mean 2 a b / (a + b) where they have one sign, else 0, which is never
    far from what the more careful half says. Channels of which the squared error of either half does not fall stay.
    """
    steps = _summed(original, rounded, axis, lambda y, other: _products(y, other, behind))
    a, b = (torch.where(half[1] > 0, half[0] / half[1], 0.0) for half in steps)
    is_single = not bool(steps[1].any())
    shift = a if is_single else torch.where(a * b > 0, 2 * a * b / (a + b), 0.0)

    def change(y: Tensor, other: Tensor) -> Tensor:
        exact, moved = behind(y), behind(shifted(other, shift, axis))
        return ((exact - moved).square() - (exact - behind(other)).square())[None]

    changes = _summed(original, rounded, axis, change)
    falls = torch.stack([half[0] < 0 for half in changes[: 1 if is_single else 2]]).all(0)
    return torch.where(falls, shift, 0.0)


def _products(y: Tensor, other: Tensor, behind: Function) -> Tensor:
    """g r and g², stacked."""
    with torch.enable_grad():
        at = other.detach().requires_grad_()
        moved = behind(at)
        (slope,) = torch.autograd.grad(moved.sum(), at)
    return torch.stack([slope * (behind(y) - moved.detach()), slope.square()])


def _summed(
    original: Sequence[Tensor], rounded: Sequence[Tensor], axis: int, made: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Sums over everything but the channels of what is `made` [kinds, like y] of each batch, float64 [kinds, channels]:
    of the samples with even numbers, and of those with odd ones."""
    sums: list[Tensor | float] = [0.0, 0.0]
    first = 0
    for y, other in zip(original, rounded, strict=True):
        values = made(y, other).movedim(axis, -1)
        # Without a batch axis the tensor is one sample.
        values = values[:, None] if y.dim() == -axis else values
        for half in range(2):
            part = values[:, (first + half) % 2 :: 2]
            sums[half] = part.double().sum(tuple(range(1, part.dim() - 1))) + sums[half]
        first += values.shape[1]
    return [torch.as_tensor(total) for total in sums]


def channel_axis(module: nn.Module) -> int:
    """Where the channels of what `module` gives lie, counted from the last axis."""
    axes = len(getattr(module, "kernel_size", ()))
    return -1 - axes


def add_bias_(module: nn.Module, shift: Tensor) -> None:
    """Let `module` add `shift` [channels] to what it gives; a bias is made where it has none."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        before = bias.double() if isinstance(bias, Tensor) else 0.0
        module.bias = nn.Parameter((before + shift).to(weight.dtype), requires_grad=weight.requires_grad)


def shifted(y: Tensor, shift: Tensor, axis: int) -> Tensor:
    """`y` with `shift` added along `axis`."""
    return y + shift.to(y.dtype).view(-1, *[1] * (-1 - axis))
