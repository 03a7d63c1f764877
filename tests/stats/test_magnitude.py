"""Mean and largest magnitude of channels."""

from __future__ import annotations

import pytest
import torch

from pennyweight.core.errors import ShapeError
from pennyweight.stats.magnitude import Magnitude

# Sums of a few dozen numbers in float64, rounded once to float32.
LAST_BIT = 1e-7


def test_updates_in_parts_and_merges_equal_one_pass() -> None:
    x = torch.randn(60, 1100)
    once = Magnitude.zero(1100).update(x)
    parts = Magnitude.zero(1100).update(x[:7]).update(x[7:7]).update(x[7:])
    merged = Magnitude.zero(1100).update(x[:30]).merge(Magnitude.zero(1100).update(x[30:]))
    for found in (once, parts, merged):
        assert found.rows == 60
        torch.testing.assert_close(found.mean, x.abs().mean(0), atol=LAST_BIT, rtol=LAST_BIT)
        assert torch.equal(found.largest, x.abs().amax(0))


def test_the_number_of_threads_changes_no_bit() -> None:
    x = torch.randn(300, 1100)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(Magnitude.zero(1100).update(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].total, other.total) for other in found[1:])


def test_without_rows_the_mean_is_zero() -> None:
    assert torch.equal(Magnitude.zero(4).mean, torch.zeros(4))


def test_scaled_inputs_have_scaled_magnitudes() -> None:
    x, s = torch.randn(20, 8), torch.rand(8) + 0.5
    ours, theirs = Magnitude.zero(8).update(x).divided(s), Magnitude.zero(8).update(x / s)
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.largest, theirs.largest)


@pytest.mark.parametrize("shape", [(3, 29), (30,), (2, 3, 30)])
def test_inputs_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="cannot join magnitudes of width 30"):
        Magnitude.zero(30).update(torch.zeros(shape))
