"""Range and mean of channels."""

from __future__ import annotations

import pytest
import torch

from pennyweight.core.errors import DataError, ShapeError
from pennyweight.stats import channel_range
from pennyweight.stats.channel_range import ChannelRange

# Sums of some hundred numbers in float64, rounded once to float32.
LAST_BIT = 1e-6


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7), (6, 5, 4, 3)])
@pytest.mark.parametrize("chunk", [1, 64, 1 << 18])
def test_parts_and_merges_are_one_pass(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_range, "_CHUNK", chunk)
    x = torch.randn(shape)
    other = [axis for axis in range(x.ndim) if axis != 1]
    once = ChannelRange.zero(5).update(x)
    parts = ChannelRange.zero(5).update(x[:2]).update(x[2:2]).update(x[2:])
    merged = ChannelRange.zero(5).update(x[3:]).merge(ChannelRange.zero(5)).merge(ChannelRange.zero(5).update(x[:3]))
    for found in (once, parts, merged):
        assert torch.equal(found.low, x.amin(other))
        assert torch.equal(found.high, x.amax(other))
        torch.testing.assert_close(found.mean, x.double().mean(other).float(), atol=LAST_BIT, rtol=LAST_BIT)
        assert found.count == x.numel() // 5


def test_the_axis_may_be_any_and_the_layout_as_well() -> None:
    x = torch.randn(4, 6, 5, 3)
    expected = ChannelRange.zero(6).update(x)
    last = ChannelRange.zero(6).update(x.permute(0, 2, 3, 1).contiguous(), axis=-1)
    strided = ChannelRange.zero(6).update(x.to(memory_format=torch.channels_last))
    for found in (last, strided):
        assert torch.equal(found.low, expected.low)
        assert torch.equal(found.high, expected.high)
        torch.testing.assert_close(found.mean, expected.mean, atol=LAST_BIT, rtol=LAST_BIT)


def test_the_number_of_threads_changes_no_bit() -> None:
    x = torch.randn(30, 700, 49)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ChannelRange.zero(700).update(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].total, other.total) for other in found[1:])


def test_half_precision_and_no_data() -> None:
    x = torch.randn(10, 3).bfloat16()
    found = ChannelRange.zero(3).update(x)
    assert found.high.dtype == found.low.dtype == torch.float32
    assert torch.equal(found.high, x.float().amax(0))
    none = ChannelRange.zero(3)
    assert torch.equal(none.mean, torch.zeros(3))
    assert none.update(torch.empty(0, 3)).count == 0
    assert ChannelRange.zero(0).update(torch.empty(4, 0)).count == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    x = torch.randn(4, 8, 3)
    x[2, 5, 1] = value
    with pytest.raises(DataError, match="relu_3: NaN or infinity in 1 of 8 channels, first in channel 5"):
        ChannelRange.zero(8).update(x, name="relu_3")


@pytest.mark.parametrize("shape", [(3, 29), (30,), (2, 3, 30)])
def test_other_channels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="relu_3: shape .* has not 30 channels along axis 1"):
        ChannelRange.zero(30).update(torch.zeros(shape), name="relu_3")
    with pytest.raises(ShapeError, match="30 and 7 channels"):
        ChannelRange.zero(30).merge(ChannelRange.zero(7))
