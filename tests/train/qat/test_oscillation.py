"""Codes that go to and fro."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pennyweight.train.qat.finish import finish
from pennyweight.train.qat.history import History
from pennyweight.train.qat.lsq import FREE
from pennyweight.train.qat.options import QatOptions
from pennyweight.train.qat.oscillation import dampening, follow_codes
from pennyweight.train.qat.prepare import prepare
from pennyweight.train.qat.prepared import trained_sites
from tests.train.qat.nets import pictures, small


def followed(values: list[list[int]], momentum: float = 0.1) -> History:
    history = History((1, len(values[0])), torch.device("cpu"))
    for step in values:
        history.update_(torch.tensor([step], dtype=torch.float32), momentum=momentum)
    return history


def by_hand(values: list[int], momentum: float) -> tuple[float, float]:
    """Frequency and average of one code, straight from the paper."""
    frequency, average, last, previous = 0.0, float(values[0]), 0, values[0]
    for value in values[1:]:
        change = (value > previous) - (value < previous)
        turned = change != 0 and change == -last
        frequency = momentum * turned + (1 - momentum) * frequency
        average = momentum * value + (1 - momentum) * average
        last, previous = change or last, value
    return frequency, average


def test_frequency_and_average_are_those_of_the_paper() -> None:
    random = torch.Generator().manual_seed(0)
    steps = torch.randint(-3, 3, (40, 20), generator=random)
    # One that rises all the time never turns, one that stays does not either.
    steps[:, 0], steps[:, 1] = torch.arange(40), 2
    history = followed(steps.tolist())
    for place in range(20):
        frequency, average = by_hand(steps[:, place].tolist(), 0.1)
        assert float(history.frequency[0, place]) == pytest.approx(frequency, abs=1e-6)
        assert float(history.average[0, place]) == pytest.approx(average, abs=1e-5)
    assert history.frequency[0, :2].tolist() == [0, 0]
    assert int(history.steps) == 40


def test_a_code_that_moves_on_after_a_rest_has_not_turned() -> None:
    assert followed([[0], [1], [1], [1], [2]]).frequency.item() == 0
    assert followed([[0], [1], [1], [1], [0]]).frequency.item() == pytest.approx(0.1)


def test_what_turns_often_is_frozen_at_its_average_and_stays() -> None:
    history = followed([[value, 0, place] for place, value in enumerate([0, 1, 0, 1, 1, 0, 1, 1])])
    history.freeze_(0.2)
    assert history.fixed.tolist() == [[round(float(history.average[0, 0])), FREE, FREE]]
    history.average.fill_(5)
    history.freeze_(-1)
    assert history.fixed[0, 0] != 5


def one_site(scheme: str = "int4-channel", **options: bool) -> nn.Module:
    return prepare(nn.Linear(8, 4), scheme, example=torch.randn(2, 8), options=QatOptions(**options))


def shaken(model: nn.Module, scale: float, seed: int) -> None:
    with torch.no_grad():
        for trained in trained_sites(model):
            weight = dict(model.named_parameters())[trained.site.parameter]
            weight.add_(scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))


def test_shares_are_reported_and_frozen_codes_stay_whatever_the_weights_do() -> None:
    model = one_site()
    for step in range(40):
        shaken(model, 0.2, step)
        found = follow_codes(model, momentum=0.1)
    assert found.oscillating > 0.5
    assert found.frozen == 0
    frozen = follow_codes(model, momentum=0.1, freeze_above=0.05)
    assert frozen.frozen > 0.3
    [trained] = trained_sites(model)
    assert trained.rounding.history is not None
    fixed = trained.rounding.history.fixed
    is_fixed = fixed != FREE
    assert frozen.frozen == pytest.approx(float(is_fixed.float().mean()))
    for step in range(5):
        shaken(model, 3.0, 100 + step)
        with torch.no_grad():
            trained.rounding.step.mul_(0.7)
        values = finish(model).weights[trained.site.name].codes.to(torch.int16) - 8
        assert torch.equal(values[is_fixed], fixed[is_fixed])
        assert torch.equal(finish(model).simulated()(torch.ones(1, 8)), model.eval()(torch.ones(1, 8)))


def test_frozen_weights_get_no_gradient() -> None:
    model = one_site()
    [trained] = trained_sites(model)
    assert trained.rounding.history is not None
    trained.rounding.history.fixed[1] = 2
    model(torch.randn(5, 8)).square().sum().backward()
    gradient = dict(model.named_parameters())[trained.site.parameter].grad
    assert gradient is not None
    assert not gradient[1].any()
    assert gradient[0].any()


def test_without_histories_nothing_is_followed() -> None:
    model = one_site(history=False)
    assert not any("history" in name for name in model.state_dict())
    found = follow_codes(model, freeze_above=0.0)
    assert (found.oscillating, found.frozen) == (0, 0)


def explicit_dampening(w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    centre = (w / scale).round().clamp(low, high) * scale
    ends = (low * scale, high * scale)
    return (centre.detach() - torch.clamp(w, torch.minimum(*ends), torch.maximum(*ends))).square().sum()


def test_the_dampening_loss_and_its_gradient_are_those_of_the_paper() -> None:
    model = one_site("int3-channel")
    [trained] = trained_sites(model)
    weight = dict(model.named_parameters())[trained.site.parameter]
    with torch.no_grad():
        weight[0, 0] = 5.0
    loss = dampening(model)
    loss.backward()
    twin = weight.detach().clone().requires_grad_()
    scale = trained.rounding.unit
    wanted = explicit_dampening(twin, scale, -4, 3)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert weight.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(weight.grad, twin.grad, rtol=1e-4, atol=1e-6)
    # Beyond the range there is nothing to pull to; steps are not moved.
    assert weight.grad[0, 0] == 0
    assert trained.rounding.step.grad is None


@pytest.mark.parametrize("scheme", ["int4-channel", "w4a8-tensor-asym"])
def test_dampening_pulls_weights_to_the_middles_of_their_cells(scheme: str) -> None:
    model = prepare(small(), scheme, example=pictures())
    before = float(dampening(model).detach())
    weights = [dict(model.named_parameters())[one.site.parameter] for one in trained_sites(model)]
    optimizer = torch.optim.SGD(weights, lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        dampening(model).backward()
        optimizer.step()
    assert float(dampening(model).detach()) < 0.05 * before
