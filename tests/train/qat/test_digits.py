"""Networks trained from scratch on scikit-learn's digits, in seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pennyweight as pw
from pennyweight.train.qat.options import FitOptions

pytest.importorskip("sklearn", reason="scikit-learn has the digits")

# Of the fifth of the digits that is not trained on, in percent.
CORRECT = 90.0


def digits() -> tuple[TensorDataset, TensorDataset]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    is_test = torch.arange(len(x)) % 5 == 0
    return TensorDataset(x[~is_test], y[~is_test]), TensorDataset(x[is_test], y[is_test])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def correct(module: Any, data: TensorDataset) -> float:
    x, y = data.tensors
    with torch.no_grad():
        return 100 * float((module(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def data() -> tuple[TensorDataset, TensorDataset]:
    return digits()


def loop(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """A user's own loop: nothing of pennyweight in it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            falling.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("scheme", ["int4-channel", "w4a8-channel"])
def test_a_network_is_trained_from_scratch_in_a_loop_of_the_user_s_own(scheme: str, data: Any) -> None:
    train, test = data
    loader = DataLoader(train, 64, shuffle=True)
    model = pw.train.prepare(network(), scheme, calibration=[train[:256]])
    loop(model, loader, 10)
    quantized = pw.train.finish(model)
    assert correct(quantized.simulated(), test) > CORRECT
    model.eval()
    assert torch.equal(quantized.simulated()(test.tensors[0]), model(test.tensors[0]))


def test_two_bits_are_learnt_in_one_call(data: Any) -> None:
    train, test = data
    loader = DataLoader(train, 64, shuffle=True)
    net = network()
    loop(net, loader, 10)
    net.eval()
    at_once = pw.train.finish(pw.train.prepare(net, "int2-channel", example=train[:2][0]))
    options = FitOptions(rate=0.05)
    quantized = pw.train.fit(net, "int2-channel", loader, validation=[test[:]], epochs=5, options=options)
    assert correct(quantized.simulated(), test) > max(CORRECT, correct(at_once.simulated(), test) + 5)
