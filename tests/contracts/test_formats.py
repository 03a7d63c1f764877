"""What every number format that is provided must do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.registry import provided
from pennyweight.formats import NumberFormat

FORMATS = list(provided("formats").values())
every_format = pytest.mark.parametrize("element", FORMATS, ids=lambda element: str(element.name))


def all_codes(element: NumberFormat) -> Tensor:
    return torch.arange(2**element.bits, dtype=torch.uint8)


def emitted(element: NumberFormat) -> Tensor:
    """The codes that an encoder may give: those of the finite values between the ends, without a second zero."""
    codes = all_codes(element)
    values = element.decode(codes)
    return codes[
        ~((values == 0) & (values.signbit() | ((values == 0).cumsum(0) > 1)))
        & values.isfinite()
        & (values >= element.smallest)
        & (values <= element.largest)
    ]


def table(element: NumberFormat) -> np.ndarray:
    """The values of these codes in float64."""
    return element.decode(emitted(element)).double().numpy()


def brute_force(element: NumberFormat, x: Tensor) -> np.ndarray:
    """The value that is nearest to each element, by looking at the whole table; of two equally near ones the even."""
    values = table(element)
    exact = np.clip(x.double().numpy(), values.min(), values.max())
    distance = np.abs(exact[..., None] - values)
    odd = np.mod(emitted(element).numpy(), 2)
    nearest = distance.min(-1, keepdims=True)
    return values[np.argmin(np.where(distance == nearest, odd, 2), axis=-1)]


@every_format
def test_every_code_decodes_and_those_of_numbers_in_range_encode_to_themselves(element: NumberFormat) -> None:
    codes = all_codes(element)
    assert element.decode(codes).dtype == torch.float32
    codes = emitted(element)
    decoded = element.decode(codes)
    assert element.encode(decoded).dtype == torch.uint8
    assert torch.equal(element.encode(decoded), codes)
    assert torch.equal(element.nearest(decoded), decoded)


@every_format
def test_smallest_and_largest_are_the_ends_of_the_table(element: NumberFormat) -> None:
    assert (element.smallest, element.largest) == (table(element).min(), table(element).max())


@every_format
def test_all_halfway_points_go_where_the_whole_table_says(element: NumberFormat) -> None:
    values = np.sort(table(element))
    middles = torch.from_numpy((values[1:] + values[:-1]) / 2)
    for x in (middles, middles * (1 + 1e-6), middles * (1 - 1e-6)):
        assert np.array_equal(element.decode(element.encode(x)).double().numpy(), brute_force(element, x))


@every_format
def test_float64_is_not_rounded_twice(element: NumberFormat) -> None:
    values = np.sort(table(element))
    # Too close to halfway for float32 to tell.
    middles = torch.from_numpy((values[1:] + values[:-1]) / 2)
    for x in (middles + middles.abs() * 1e-12, middles - middles.abs() * 1e-12):
        assert np.array_equal(element.decode(element.encode(x)).double().numpy(), brute_force(element, x))


@every_format
@settings(max_examples=15, deadline=None)
@given(
    numbers=st.lists(st.floats(-400, 400, width=16) | st.floats(allow_nan=False, width=16), max_size=20),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_encoding_is_nearest_with_ties_to_even_and_saturates(
    element: NumberFormat, numbers: list[float], dtype: torch.dtype
) -> None:
    x = torch.tensor(numbers, dtype=dtype)
    before = x.clone()
    expected = brute_force(element, x)
    assert np.array_equal(element.decode(element.encode(x)).double().numpy(), expected)
    assert torch.equal(element.nearest(x), torch.from_numpy(expected).to(dtype))
    assert element.nearest(x).dtype == dtype
    assert torch.equal(x, before)


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_infinities_and_the_largest_numbers_saturate(element: NumberFormat, dtype: torch.dtype) -> None:
    huge = torch.finfo(dtype).max
    x = torch.tensor([-float("inf"), -huge, huge, float("inf")], dtype=dtype)
    low, high = element.smallest, min(element.largest, float(brute_force(element, x[2:3])[0]))
    assert element.decode(element.encode(x)).tolist() == [low, max(low, -huge), high, element.largest]


@every_format
def test_encoding_never_falls_where_the_number_rises(element: NumberFormat) -> None:
    reach = 1.5 * max(-element.smallest, element.largest)
    x = torch.linspace(-reach, reach, 4001, dtype=torch.float64)
    assert (element.decode(element.encode(x)).diff() >= 0).all()


@every_format
def test_strided_and_empty_tensors_are_taken(element: NumberFormat) -> None:
    x = torch.randn(12, 10) * element.largest
    assert torch.equal(element.encode(x.T), element.encode(x.T.contiguous()))
    assert torch.equal(element.encode(x[::3, 1::2]), element.encode(x)[::3, 1::2])
    codes = element.encode(x)
    assert torch.equal(element.decode(codes.T), element.decode(codes).T)
    for shape in [(0,), (0, 5), (3, 0)]:
        empty = element.encode(torch.empty(shape))
        assert (empty.shape, empty.dtype) == (torch.Size(shape), torch.uint8)
        assert element.decode(empty).shape == shape


@every_format
def test_no_argument_is_edited(element: NumberFormat) -> None:
    x, codes = torch.randn(100) * element.largest, all_codes(element)
    kept, kept_codes = x.clone(), codes.clone()
    element.encode(x), element.nearest(x), element.decode(codes)
    assert torch.equal(x, kept)
    assert torch.equal(codes, kept_codes)


@every_format
def test_a_format_has_its_own_name(element: NumberFormat) -> None:
    assert provided("formats")[element.name] is element
    assert 1 <= element.bits <= 8
