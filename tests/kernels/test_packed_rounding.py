"""Activations rounded to 8 bits: the kernels do what the plain version says, and it does what its equation says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pennyweight.formats.integer import Int
from pennyweight.kernels.packed import PackedMatrix, multiply, round_activations
from tests.kernels.packed_cases import TYPES, on_every_table

# Of normal numbers rounded by the largest magnitude of a group: measured in float64, times 1.1.
RELATIVE_ERROR = {16: 1.1 * 0.0047, 32: 1.1 * 0.0054, 64: 1.1 * 0.0060, 128: 1.1 * 0.0064}

# Half a step of the third byte, and as much again from what float32 leaves over of the first; seen: 2**-23.
LARGEST_ERROR = 2.0**-23
# Of the three sums at the end.
LAST_PLACES = 2.0**-23


def identity(cols: int, group: int) -> PackedMatrix:
    codes = 128 + torch.eye(cols, dtype=torch.uint8)
    return PackedMatrix.pack(codes, torch.ones(cols, cols // group), element=Int(8))


def numbers(rows: int, cols: int) -> Tensor:
    """Of all magnitudes, with zeros, ties and groups of one magnitude."""
    x = torch.randn(rows, cols) * 10.0 ** torch.randint(-5, 5, (rows, 1))
    x[0] = torch.arange(cols) % 128 / 2
    x[0, ::16] = 127.0
    x[1, 16:48] = 0.0
    x[2] = 3.0
    return x


@pytest.mark.parametrize("group", [16, 48, 64, 128])
def test_the_plain_version_is_its_equation(group: int) -> None:
    x = numbers(9, 2 * group)
    codes, scales = round_activations(x, group)
    groups = x.numpy().reshape(9, 2, group)
    peak = np.abs(groups).max(2, keepdims=True)
    expected = (peak / np.float32(127)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(expected > 0, np.float32(1) / expected, np.float32(0))
    assert np.array_equal(scales.numpy(), expected)
    assert np.array_equal(codes.numpy(), np.rint(groups * inverse))
    assert int(codes.abs().max()) == 127


def test_halves_go_to_the_even_byte() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] + [0.0] * 8])
    assert round_activations(x, 16)[0].flatten()[:8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_what_has_no_scale() -> None:
    x = torch.zeros(4, 16)
    # The scale of the second is that at which numbers begin to count.
    x[0], x[1], x[2, 3], x[3, 3] = 1.2e-28, 1.3e-28, torch.nan, -torch.inf
    codes, scales = round_activations(x, 16)
    assert codes.flatten(1).tolist() == [[0] * 16, [127] * 16, [0] * 16, [0] * 16]
    assert scales[0].item() == 0.0
    assert scales[1].item() > 1e-30
    assert bool(scales[2:].isnan().all())


@on_every_table
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [16, 32, 48, 64, 80, 96, 112, 128])
def test_kernels_round_as_the_plain_version_does(table: str, dtype: torch.dtype, group: int) -> None:
    x = numbers(7, 3 * group).to(dtype)
    codes, scales = round_activations(x, group)
    # The result is scale * code, in float32 even where the input is not.
    (y,) = multiply(x, [identity(3 * group, group)], activations="int8")
    assert torch.equal(y, (codes.float() * scales).flatten(1).to(dtype))


@on_every_table
def test_columns_that_fill_no_group_are_rounded_alone(table: str) -> None:
    x = torch.randn(3, 100)
    codes, scales = round_activations(x, 128)
    assert torch.equal(multiply(x, [identity(100, 100)], activations="int8")[0], (codes * scales).flatten(1)[:, :100])


@on_every_table
@pytest.mark.parametrize("group", sorted(RELATIVE_ERROR))
def test_the_error_of_normal_numbers(table: str, group: int) -> None:
    x = torch.randn(256, 256)
    (y,) = multiply(x, [identity(256, group)], activations="int8")
    assert float((y - x).norm() / x.norm()) <= RELATIVE_ERROR[group]


@on_every_table
def test_bytes_in_three_planes_are_as_good_as_float32(table: str) -> None:
    x = torch.randn(256, 256)
    (y,) = multiply(x, [identity(256, 128)])
    peak = x.view(256, 2, 128).abs().amax(2).repeat_interleave(128, 1)
    assert bool(((y - x).abs() <= LARGEST_ERROR * peak + LAST_PLACES * x.abs()).all())


@on_every_table
def test_bytes_in_two_planes_are_as_good_as_bfloat16(table: str) -> None:
    x = torch.randn(256, 256).bfloat16()
    (y,) = multiply(x, [identity(256, 128)])
    peak = x.view(256, 2, 128).abs().amax(2).repeat_interleave(128, 1)
    # What two bytes leave is less than half a last place of numbers above a hundredth of the largest.
    assert torch.equal(y[x.abs() > 0.01 * peak], x[x.abs() > 0.01 * peak])
    assert bool(((y - x).abs() <= peak / 2**15).all())
