"""From a module to a verified file in one call, on scikit-learn's digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pennyweight as pw
from pennyweight.core.errors import BudgetError, DataError, PennyweightError, UsageError
from pennyweight.evaluate.onnx.runtime import opened
from pennyweight.models.network.network import module_calls

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
datasets = pytest.importorskip("sklearn.datasets")
TRAINED = 1347


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    found = datasets.load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)


@pytest.fixture(scope="module")
def net(data: tuple[Tensor, Tensor]) -> nn.Module:
    """Trained for some seconds."""
    torch.manual_seed(0)
    x, y = data[0][:TRAINED], data[1][:TRAINED]
    net = Digits()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(4):
        for rows in torch.randperm(TRAINED).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def loader(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data[0][:256].split(64), data[1][:256].split(64), strict=True))


def accuracy(module: Any, data: tuple[Tensor, Tensor]) -> float:
    x, y = data[0][TRAINED:], data[1][TRAINED:]
    with torch.no_grad():
        return 100 * float((module(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def w8a8(net: nn.Module, loader: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pw.quantize_module(net, calibration=loader, out=tmp_path_factory.mktemp("w8a8") / "out")


def test_8_bits_lose_nothing_and_are_verified(w8a8: Any, net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    assert accuracy(net, data) > 90
    assert abs(accuracy(w8a8.module, data) - accuracy(net, data)) <= 1.0
    record = w8a8.record
    assert record.verified == "full"
    assert record.recipe.scheme == "w8a8-channel"
    assert [site.form for site in record.sites] == ["integers"] * 4
    # ONNX Runtime's own classes, on samples that calibration did not see.
    (theirs,) = opened(w8a8.out / "model.onnx")({"x": data[0][TRAINED:].numpy()})
    same = torch.from_numpy(theirs).argmax(1) == w8a8.module(data[0][TRAINED:]).argmax(1)
    assert float(same.float().mean()) > 0.99


def test_the_record_has_every_site_and_edge(w8a8: Any) -> None:
    record = json.loads((w8a8.out / "pennyweight.json").read_text())
    assert [site["name"] for site in record["sites"]] == ["body.0", "body.3", "body.6", "head"]
    assert all(0 < site["error"] < 1e-3 and 0 < site["error_nearest"] < 1e-3 for site in record["sites"])
    assert all(edge["scale"] > 0 and edge["why"] and edge["clipped"] < 0.05 for edge in record["edges"])
    assert {edge["name"] for edge in record["edges"]} == set(w8a8.quantized.plan.edges)
    assert record["network"]["inputs"] == {"x": {"dtype": "float32", "shape": [None, 1, 8, 8]}}
    assert record["recipe"]["samples"] == 256
    assert record["sizes"]["file_bytes"] < record["sizes"]["float_file_bytes"]
    # On a processor without VNNI the runtime saturates otherwise, and the layer is named.
    assert record["integers"]["elements"] == 40
    assert record["integers"]["failed"] is None
    assert (record["integers"]["mismatches"] == 0) == (record["integers"]["first"] is None)
    assert pw.verify(w8a8.out)["verified"] == "full"


def test_the_users_module_is_as_it_was(net: nn.Module, loader: list[Any]) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = pw.quantize_module(net, scheme="int4-channel", calibration=loader, effort="fast")
    assert found.out is None
    assert found.record.verified == "none"
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not [module for _, module in module_calls(found.module) if isinstance(module, nn.BatchNorm2d)]


def test_weights_alone_need_no_data(net: nn.Module) -> None:
    found = pw.quantize_module(net, example=torch.randn(2, 1, 8, 8))
    assert found.record.recipe.scheme == "int8-channel"
    assert found.record.edges == ()


def test_sites_can_be_kept_and_given_a_scheme(net: nn.Module) -> None:
    found = pw.quantize_module(
        net, scheme="int4-channel", example=torch.randn(2, 1, 8, 8), keep=["head"], at=["body.0=int8-channel"]
    )
    assert set(found.record.kept) == {"head"}
    assert {site.name: site.scheme for site in found.record.sites} == {
        "body.0": "int8-channel-f32", "body.3": "int4-channel-f32", "body.6": "int4-channel-f32",
    }  # fmt: skip


def test_a_size_bounds_the_file(net: nn.Module, loader: list[Any], tmp_path: Path) -> None:
    found = pw.quantize_module(
        net, scheme="int8-channel", calibration=loader, size="16KB", out=tmp_path / "out", effort="fast"
    )
    assert (tmp_path / "out" / "model.onnx").stat().st_size <= 16_000
    assert found.record.recipe.budget == "size=16000"
    with pytest.raises(BudgetError):
        pw.quantize_module(
            net, scheme="int8-channel", calibration=loader, size="1KB", out=tmp_path / "b", effort="fast"
        )
    assert not (tmp_path / "b").exists()


def test_a_budget_of_accuracy_is_kept_by_looking(
    net: nn.Module, loader: list[Any], data: tuple[Tensor, Tensor]
) -> None:
    asked: list[Any] = []

    def judge(module: Any) -> float:
        asked.append(module)
        return accuracy(module, data)

    found = pw.quantize_module(
        net, scheme="int8-channel", calibration=loader, max_loss=2.0, evaluate=judge, effort="fast"
    )
    assert accuracy(net, data) - accuracy(found.module, data) <= 2.0
    assert len(found.record.trials) == len(asked) - 1
    assert min(trial.size_bytes for trial in found.record.trials if trial.holds)
    labelled = [(data[0][TRAINED:], data[1][TRAINED:])]
    bounded = pw.quantize_module(
        net, scheme="int8-channel", calibration=loader, max_loss=5.0, evaluate=labelled, effort="fast"
    )
    best = next(trial for trial in bounded.record.trials if trial.holds)
    assert best.upper <= 5.0
    assert best.upper > best.loss
    assert any("450 labelled samples" in note for note in bounded.record.notes)


BAD: dict[str, tuple[dict[str, Any], type[PennyweightError], str]] = {
    "nothing to run on": ({}, DataError, "calibration .* or example"),
    "an empty loader": ({"calibration": []}, DataError, "yields nothing"),
    "a name for a loader": ({"calibration": "built-in"}, UsageError, "loader of batches"),
    "another shape later": (
        {"calibration": [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 7)]}, DataError, "batch 1: x has the shape"),
    "NaN": ({"calibration": [torch.full((2, 1, 8, 8), torch.nan)]}, DataError, "batch 0: x has NaN"),
    "static ranges without data": (
        {"example": torch.zeros(2, 1, 8, 8), "scheme": "w8a8-channel"}, UsageError, "needs calibration data"),
    "a scheme that is none": (
        {"example": torch.zeros(2, 1, 8, 8), "scheme": "w8"}, UsageError, "w8a8-channel"),
    "a site that is none": (
        {"example": torch.zeros(2, 1, 8, 8), "scheme": "int8-channel", "keep": ["tail"]}, UsageError, "tail"),
    "a judge without a budget": (
        {"example": torch.zeros(2, 1, 8, 8), "evaluate": lambda module: 1.0}, UsageError, "give max_loss"),
    "a budget without a judge": ({"example": torch.zeros(2, 1, 8, 8), "max_loss": 1.0}, UsageError, "needs a judge"),
    "two budgets": (
        {"example": torch.zeros(2, 1, 8, 8), "max_loss": 1.0, "size": "1MB", "evaluate": lambda m: 90.0},
        UsageError, "exclude each other"),
    "a loss that is none": (
        {"example": torch.zeros(2, 1, 8, 8), "max_loss": -1.0, "evaluate": lambda m: 90.0}, UsageError, "points"),
    "labels that are missing": (
        {"calibration": [torch.zeros(2, 1, 8, 8)], "max_loss": 1.0, "evaluate": [torch.zeros(2, 1, 8, 8)],
         "scheme": "int8-channel"}, DataError, "batch 0 has no labels"),
    "a runtime that is none": (
        {"example": torch.zeros(2, 1, 8, 8), "runtime": "tensorrt"}, UsageError, "onnxruntime or openvino"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_nothing_is_written(net: nn.Module, name: str, tmp_path: Path) -> None:
    options, kind, told = BAD[name]
    with pytest.raises(kind, match=told):
        pw.quantize_module(net, out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_there_is_left_alone(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="not an empty directory"):
        pw.quantize_module(net, example=torch.zeros(2, 1, 8, 8), out=tmp_path)


def test_training_ends_in_a_verified_file(
    net: nn.Module, loader: list[Any], data: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    trained = pw.train.fit(net, "w4a8-channel", loader, epochs=1)
    saved = pw.save_module(trained, tmp_path / "out", calibration=loader)
    assert saved.record.verified == "full"
    assert accuracy(net, data) - accuracy(saved.module, data) < 3.0
