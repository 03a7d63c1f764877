"""Files in their runtimes: what rounding may change is allowed, and a code that is another one is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pennyweight.containers.onnx import Runtime, write_float_onnx, write_onnx
from pennyweight.core.errors import UsageError, VerificationError
from pennyweight.evaluate.onnx.agreement import OutputAgreement, agreement
from pennyweight.evaluate.onnx.bounds import MARGIN, allowed_errors, outputs_of, relative_error, rounded_in_blocks
from pennyweight.evaluate.onnx.latency import Latency, in_turns, latency
from pennyweight.evaluate.onnx.runtime import arrays_of, opened
from pennyweight.models.network import QuantizedNetwork
from pennyweight.models.network.network import Inputs
from tests.evaluate.network.networks import cnn, mlp, nearest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")


def off(
    quantized: QuantizedNetwork, path: Path, runtime: Runtime, other: QuantizedNetwork | None = None
) -> OutputAgreement:
    """How far `path` is from `quantized`, or from the codes of `other`."""
    batches = [Inputs.of(quantized.network.example)]
    module = quantized.simulated()
    allowed = allowed_errors(quantized, module, batches)
    feeds = [arrays_of(quantized.network, batch) for batch in batches]
    meant = (other or quantized).simulated()
    (found,) = agreement(path, feeds, [outputs_of(meant, batch) for batch in batches], allowed, runtime=runtime).outputs
    return found


def nudged(quantized: QuantizedNetwork, site: str) -> QuantizedNetwork:
    """One code of `site` is its neighbour."""
    weight = quantized.weights[site]
    codes = weight.codes.clone()
    codes[0, 0] = codes[0, 0] - 1 if codes[0, 0] else 1
    return replace(quantized, weights={**quantized.weights, site: replace(weight, codes=codes)})


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("make", "scheme"), [(mlp, "int8-channel"), (mlp, "int4-g32"), (cnn, "int4-channel")])
def test_weights_alone_differ_by_the_order_of_sums(make: Any, scheme: str, runtime: Runtime, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    quantized = nearest(*make(), scheme)
    # Level 0: ONNX Runtime rounds no inputs.
    write_onnx(quantized, tmp_path / "model.onnx", runtime=runtime, accuracy_level=0)
    found = off(quantized, tmp_path / "model.onnx", runtime)
    assert found.holds
    assert found.top1 == 1.0
    # The bound is no barn door: a thousandth of the output is far outside.
    assert found.allowed < 1e-4
    for site in quantized.weights:
        assert not off(quantized, tmp_path / "model.onnx", runtime, nudged(quantized, site)).holds, site


def test_rounded_inputs_of_blocks_are_allowed_and_no_more(tmp_path: Path) -> None:
    quantized = nearest(*mlp(), "int4-g32")
    write_onnx(quantized, tmp_path / "model.onnx", accuracy_level=4)
    batches = [Inputs.of(quantized.network.example)]
    module = quantized.simulated()
    blocks = dict.fromkeys(quantized.weights, 32)
    (allowed,) = allowed_errors(quantized, module, batches, blocks=blocks)
    feeds = [arrays_of(quantized.network, batch) for batch in batches]
    found = agreement(tmp_path / "model.onnx", feeds, [outputs_of(module, batch) for batch in batches], [allowed])
    assert found.outputs[0].holds
    assert allowed / MARGIN / 3 < found.outputs[0].relative_error
    (without,) = allowed_errors(quantized, module, batches)
    assert found.outputs[0].relative_error > without


def test_blocks_are_rounded_to_a_127th_of_their_largest() -> None:
    x = torch.tensor([[127.0, 0.4, -0.6, 1.5, 1.0, 0.0, 0.003, -1.0, 5.0]])
    expected = torch.tensor([[127.0, 0.0, -1.0, 2.0, 1.0, 0.0, 0.0, -1.0, 5.0]])
    assert torch.allclose(rounded_in_blocks(x, 4), expected, atol=1e-6)
    assert torch.equal(rounded_in_blocks(torch.zeros(2, 3), 4), torch.zeros(2, 3))


def test_what_float32_itself_changes_is_allowed() -> None:
    quantized = nearest(*mlp(), "int8-channel")
    batch = Inputs.of(quantized.network.example)
    module = quantized.simulated()
    (allowed,) = allowed_errors(quantized, module, [batch])
    single = outputs_of(module, batch)
    double = outputs_of(quantized.simulated().double(), Inputs.of(batch.args[0].double()))
    assert 0 < relative_error(single, double) < allowed


def test_the_same_seed_allows_the_same() -> None:
    quantized = nearest(*cnn(), "int8-channel", ranges={"*": 4.0})
    batch, module = Inputs.of(quantized.network.example), quantized.simulated()
    assert allowed_errors(quantized, module, [batch]) == allowed_errors(quantized, module, [batch])


def test_relative_errors() -> None:
    assert relative_error([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.5])]) == 0.1
    assert relative_error([torch.tensor([1, 2, 3, 4])], [torch.tensor([1, 2, 3, 5])]) == 0.5
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0.0
    assert relative_error([torch.zeros(2)], [torch.ones(2)]) == 1.0


def test_outputs_of_another_shape_and_nan_are_no_agreement(tmp_path: Path) -> None:
    net, x = mlp()
    quantized = nearest(net, x, "int8-channel")
    write_onnx(quantized, tmp_path / "model.onnx")
    feeds = [arrays_of(quantized.network, Inputs.of(x))]
    with pytest.raises(VerificationError, match="shapes"):
        agreement(tmp_path / "model.onnx", feeds, [[torch.zeros(8, 9)]], [1.0])
    found = agreement(tmp_path / "model.onnx", feeds, [[torch.full((8, 10), torch.nan)]], [1.0])
    with pytest.raises(VerificationError, match="linear_2 is inf off"):
        found.check(tmp_path / "model.onnx")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_is_none_is_told_in_the_runtimes_words(runtime: Runtime, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(VerificationError, match=f"model.onnx: {runtime} .* cannot open it"):
        opened(tmp_path / "model.onnx", runtime)


def test_inputs_that_are_missing_or_wrong_are_told(tmp_path: Path) -> None:
    quantized = nearest(*mlp(), "int8-channel")
    write_onnx(quantized, tmp_path / "model.onnx")
    file = opened(tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="takes input"):
        file({})
    with pytest.raises(VerificationError, match="cannot run"):
        file({"input": torch.zeros(2, 3).numpy()})


def test_latency_is_measured_in_turns(tmp_path: Path) -> None:
    quantized = nearest(*mlp(), "int8-channel")
    write_onnx(quantized, tmp_path / "model.onnx")
    write_float_onnx(quantized.network, tmp_path / "float.onnx")
    arrays = arrays_of(quantized.network, quantized.network.example)
    found = latency(tmp_path / "float.onnx", tmp_path / "model.onnx", arrays, seconds=0.05, threads=1)
    assert found.runs >= 5
    assert found.batch == 8
    assert found.float_ms > 0
    assert found.runtime.startswith("onnxruntime")
    order: list[str] = []
    times = in_turns([lambda: order.append("a"), lambda: order.append("b")], seconds=0.0)
    assert order == ["a", "b"] * (len(order) // 2)
    assert [len(some) for some in times] == [5, 5]


def test_only_what_is_slower_is_warned_of() -> None:
    assert Latency("onnxruntime 1", 1.0, 0.5, 9, 0, 1).warning is None
    # Within the noise of a machine.
    assert Latency("onnxruntime 1", 1.0, 1.04, 9, 0, 1).warning is None
    warning = Latency("onnxruntime 1", 2.0, 3.0, 9, 0, 4).warning
    assert warning is not None
    assert "1.50 times as long as the float file (2 ms) at a batch of 4" in warning


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.a(x)
        return {"y": y, "best": y.argmax(1)}


def test_several_outputs_are_compared_each(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    quantized = nearest(_Two(), x, "int8-channel")
    write_onnx(quantized, tmp_path / "model.onnx", accuracy_level=0)
    module, batch = quantized.simulated(), Inputs.of(x)
    allowed = allowed_errors(quantized, module, [batch])
    found = agreement(
        tmp_path / "model.onnx", [arrays_of(quantized.network, batch)], [outputs_of(module, batch)], allowed
    )
    assert [output.elements for output in found.outputs] == [32, 4]
    assert all(output.holds for output in found.outputs)


class Masked(nn.Module):
    """Attention's way with a mask: what is left out is as low as its type goes."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.line(x) + (1 - mask) * torch.finfo(torch.float32).min).softmax(-1)


def test_numbers_that_stand_for_infinity_drown_no_others() -> None:
    example = (torch.randn(4, 8), torch.tensor([1.0, 1, 1, 1, 0, 0]).expand(4, 6).contiguous())
    quantized = nearest(Masked(), example, "int8-channel")
    [allowed] = allowed_errors(quantized, quantized.simulated(), [Inputs.of(example)])
    assert 2**-20 < allowed < 1e-4
