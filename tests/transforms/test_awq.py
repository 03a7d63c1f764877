"""AWQ lowers the error of what reads a fold, SmoothQuant that of rounded activations."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.schemes import fit_scales, parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import round_to_nearest
from pennyweight.stats.magnitude import Magnitude
from pennyweight.transforms.awq import Awq
from pennyweight.transforms.base import Weighed
from pennyweight.transforms.smoothquant import SmoothQuant

OUTLIERS = slice(0, 4)
# Per-token int8 activations with four channels 60 times as large as the others.
SMOOTH_GAIN = 5.0


def weighed(w: Tensor, x: Tensor, scheme: str = "int3-g32-f32", source: Tensor | None = None) -> Weighed:
    source = torch.arange(w.shape[1]) if source is None else source
    magnitude = Magnitude.zero(w.shape[1]).update(x)
    return Weighed(w, source, parse_scheme(scheme), Statistics(x.T @ x / len(x)), magnitude)


def with_outliers(rows: int = 400, inputs: int = 64, factor: float = 60.0) -> Tensor:
    x = torch.randn(rows, inputs)
    x[:, OUTLIERS] *= factor
    return x


def output_error(reader: Weighed, s: Tensor, x: Tensor) -> float:
    """|x Wᵀ - (x / s) q(W s)ᵀ|², computed from the tokens themselves."""
    scaled = reader.w * s
    importance = (x / s).square().mean(0)
    parameters = fit_scales(scaled, reader.scheme, importance=importance)
    found = (x / s) @ round_to_nearest(scaled, reader.scheme, parameters).dequantize().T
    return float((found - x @ reader.w.T).double().square().sum())


def test_awq_protects_the_channel_that_is_large() -> None:
    x = torch.randn(400, 64)
    x[:, 3] *= 100
    readers = [weighed(torch.randn(48, 64), x, "int3-g64-f32"), weighed(torch.randn(16, 64), x, "int3-g64-f32")]
    s = Awq().choose(readers, 64)
    assert s is not None
    assert s[3] > 2 * s.sort().values[-2]
    before, after = (sum(output_error(reader, each, x) for reader in readers) for each in (torch.ones(64), s))
    assert after < 0.7 * before


def test_awq_is_never_worse_than_no_scales_by_its_own_measure() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(200, 32) @ torch.randn(32, 32)
        reader = weighed(torch.randn(24, 32), x)
        s = Awq().choose([reader], 32)
        if s is not None:
            assert output_error(reader, s, x) < output_error(reader, torch.ones(32), x)


def test_awq_ties_what_is_one_channel() -> None:
    x = torch.randn(400, 64)
    x[:, [3, 19]] *= 100
    source = torch.cat([torch.arange(16), torch.arange(16), torch.arange(16, 32), torch.full((16,), -1)])
    s = Awq().choose([weighed(torch.randn(48, 64), x, "int3-g64-f32", source=source)], 32)
    assert s is not None
    assert s.shape == (32,)
    assert s.argmax() == 3


def test_awq_needs_a_hessian() -> None:
    reader = Weighed(torch.randn(8, 16), torch.arange(16), parse_scheme("int4-g16-f32"), Statistics())
    assert Awq().choose([reader], 16) is None


def int8_rows(x: Tensor) -> Tensor:
    """x rounded to int8 with one scale a row."""
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
    return (x / scale).round() * scale


def smoothed(x: Tensor, w: Tensor, s: Tensor, *, rounds_inputs: bool) -> float:
    given = int8_rows(x / s) if rounds_inputs else x / s
    return float((given @ int8_rows(w * s).T - x @ w.T).square().mean())


def test_smoothquant_helps_where_activations_are_rounded_and_nowhere_else() -> None:
    x, w = with_outliers(), torch.randn(48, 64)
    s = SmoothQuant().choose([weighed(w, x)], 64)
    assert s is not None
    one = torch.ones(64)
    assert smoothed(x, w, s, rounds_inputs=True) < smoothed(x, w, one, rounds_inputs=True) / SMOOTH_GAIN
    plain = torch.randn(400, 64)
    even = SmoothQuant().choose([weighed(w, plain)], 64)
    assert even is not None
    assert smoothed(plain, w, even, rounds_inputs=False) > 0.9 * smoothed(plain, w, one, rounds_inputs=False)


def test_smoothquant_is_its_equation() -> None:
    x = torch.tensor([[4.0, -1.0, 0.0], [2.0, 0.25, 0.0]])
    w = torch.tensor([[1.0, 0.0, 3.0], [-0.25, 0.5, 1.0]])
    s = SmoothQuant(strength=0.5).choose([weighed(w, x, "int8-channel-f32")], 3)
    assert s is not None
    # sqrt(4 / 1), sqrt(1 / 0.5), and a channel that is never lit.
    torch.testing.assert_close(s, torch.tensor([2.0, 2.0**0.5, 1.0]))
