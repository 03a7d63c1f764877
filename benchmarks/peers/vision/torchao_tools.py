"""torchao's PT2E quantization of the network, judged by its own quantized graph; there is no ONNX file.

histogram   static, X86InductorQuantizer with its default observers
minmax      the same with smallest and largest values of activations
trained     quantization-aware: prepare_qat_pt2e and a plain loop over the training pictures and their labels

Fewer bits are the same specification of weights with a smaller range of codes; the graph keeps them in int8.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import functional
from torchao.quantization.pt2e import (
    FusedMovingAvgObsFakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from benchmarks.peers.vision.schemes import NetworkScheme
from benchmarks.vision.problem import Problem, Run, of_torch
from benchmarks.vision.training import Pictures

METHODS = ("histogram", "minmax", "trained")
EPOCHS, LEARNING_RATE, MOMENTUM = 10, 0.01, 0.9
# From here on running statistics of BatchNorm and ranges stay as they are.
_SETTLED = 0.7
# As the quantizer's own configuration has it.
_EPS = 2**-12


def quantize(problem: Problem, out: Path, *, method: str, scheme: NetworkScheme) -> Run:
    """How the quantized graph runs; nothing is written."""
    graph = _trained(problem, scheme) if method == "trained" else _calibrated(problem, scheme, method)
    return of_torch(graph)


def _exported(problem: Problem, net: torch.nn.Module) -> GraphModule:
    example = next(problem.tensors("judged", size=2))
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, example, dynamic_shapes=tuple({0: batch} for _ in example))
    return program.module()


def _quantizer(scheme: NetworkScheme, activations: Callable[..., Any], weights: Callable[..., Any], *, is_trained: bool
               ) -> X86InductorQuantizer:  # fmt: skip
    levels = 2 ** (scheme.weights - 1)
    of_weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-levels,
        quant_max=levels - 1,
        qscheme=torch.per_channel_symmetric if scheme.is_per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if scheme.is_per_channel else None,
        observer_or_fake_quant_ctr=weights,
    )
    of_activations = None
    if scheme.activations is not None:
        of_activations = QuantizationSpec(
            dtype=torch.uint8,
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=activations,
        )
    config = QuantizationConfig(of_activations, of_activations, of_weights, None, is_trained)
    return X86InductorQuantizer().set_global(config)


def _calibrated(problem: Problem, scheme: NetworkScheme, method: str) -> GraphModule:
    activations = (MinMaxObserver if method == "minmax" else HistogramObserver).with_args(eps=_EPS)
    weights = (PerChannelMinMaxObserver if scheme.is_per_channel else MinMaxObserver).with_args(eps=_EPS)
    quantizer = _quantizer(scheme, activations, weights, is_trained=False)
    observed = prepare_pt2e(_exported(problem, problem.network()), quantizer)
    with torch.no_grad():
        for batch in problem.tensors("calibration"):
            observed(*batch)
    return convert_pt2e(observed)


def _trained(problem: Problem, scheme: NetworkScheme) -> GraphModule:
    torch.manual_seed(0)
    activations = FusedMovingAvgObsFakeQuantize.with_args(eps=_EPS, observer=MovingAverageMinMaxObserver)
    weights = FusedMovingAvgObsFakeQuantize.with_args(eps=_EPS, observer=MovingAveragePerChannelMinMaxObserver)
    quantizer = _quantizer(scheme, activations, weights, is_trained=True)
    net = prepare_qat_pt2e(_exported(problem, problem.network().train()), quantizer)
    pictures = Pictures.of(problem)
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(pictures))
    move_exported_model_to_train(net)
    for epoch in range(EPOCHS):
        if epoch >= _SETTLED * EPOCHS:
            move_exported_model_to_eval(net)
            net.apply(torch.ao.quantization.disable_observer)
        for images, labels in pictures:
            optimizer.zero_grad()
            functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
    move_exported_model_to_eval(net)
    return convert_pt2e(net)
