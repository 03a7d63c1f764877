"""What Pennyweight makes of a problem of the vision benchmark.

    python -m benchmarks.vision.ours PROBLEM OUT --method ptq --scheme w8a8-channel

ptq               quantize_module on the calibration inputs, effort normal
ptq-unequalized   the same without cross-layer equalization
minmax            our file of weights and activations with ranges by min-max, rounded to nearest, nothing corrected
minmax-equalized  the same after cross-layer equalization
qat               train.fit with its defaults on the training pictures and their labels
nearest           no method at all: per-channel scales from the largest weight, rounding to nearest; no file
"""

from __future__ import annotations

from benchmarks.peers import common  # isort: skip - sets the environment before any library is imported

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.vision.schemes import NetworkScheme
from benchmarks.vision.feeds import fed, names_of
from benchmarks.vision.problem import BATCH, MODEL_FILE, OUTPUTS_FILE, Problem, Run, of_torch
from benchmarks.vision.training import Pictures

if TYPE_CHECKING:
    from pennyweight.evaluate.network.saved import QuantizedModule

_PACKAGES = ("torch", "onnx", "onnxruntime")
# Numbers of the inputs that the simulation of integers is compared on: it keeps every value of the network twice.
_COMPARED = 1_000_000
# Sites are convolutions and linears of a vision network.
_SITES = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Made:
    """How the result runs, and what the run record says of it."""

    run: Run
    record: dict[str, Any]


@dataclass(frozen=True)
class _Batches:
    """The calibration inputs as a loader: tuples in the order in which the network takes them, as often as asked."""

    problem: Problem

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self.problem.tensors("calibration")


def _scheme_name(scheme: NetworkScheme) -> str:
    """As Pennyweight writes it: w4a8-channel, and int4-channel for weights alone."""
    if scheme.activations is None:
        return f"int{scheme.weights}-{scheme.sharing}"
    return f"w{scheme.weights}a{scheme.activations}-{scheme.sharing}"


def _calibrated(problem: Problem, out: Path, scheme: NetworkScheme, **options: Any) -> Made:
    import pennyweight as pw

    result = pw.quantize_module(
        problem.network(),
        scheme=_scheme_name(scheme),
        calibration=_Batches(problem),
        out=out,
        effort="normal",
        **options,
    )
    return _written(result)


def _written(result: QuantizedModule) -> Made:
    """The file that was written, and what of its record the tables show."""
    record = result.record
    said = {
        "warnings": record.warnings,
        "notes": record.notes,
        "kept": dict(record.kept),
        "fallbacks": {name: list(notes) for name, notes in record.fallbacks.items()},
        "sizes": dict(record.sizes),
    }
    assert result.out is not None
    return Made(_of_file(result.out / MODEL_FILE), said)


def _of_file(file: Path) -> Run:
    """For `Problem.outputs`: our file in ONNX Runtime, as its user gets it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names, wanted = names_of(session), session.get_outputs()[0].name
    return lambda batch: session.run([wanted], fed(names, batch))[0]


def _unequalized(problem: Problem, out: Path, scheme: NetworkScheme) -> Made:
    return _calibrated(problem, out, scheme, equalize=False)


def _minmax(problem: Problem, out: Path, scheme: NetworkScheme, *, equalize: bool = False) -> Made:
    import pennyweight as pw
    from pennyweight.evaluate.network.quantize import captured
    from pennyweight.pipeline.network.options import NetworkOptions
    from pennyweight.pipeline.network.quantize import quantize_network

    network, batches = captured(problem.network(), _Batches(problem), None)
    options = NetworkOptions(_scheme_name(scheme), solver="nearest", fit="minmax", ranges="minmax", equalize=equalize)
    result = quantize_network(network, batches, options)
    return _written(pw.save_module(result.quantized, out, calibration=_Batches(problem)))


def _minmax_equalized(problem: Problem, out: Path, scheme: NetworkScheme) -> Made:
    return _minmax(problem, out, scheme, equalize=True)


def _trained(problem: Problem, out: Path, scheme: NetworkScheme) -> Made:
    import pennyweight as pw

    batches = _Batches(problem)
    quantized = pw.train.fit(problem.network(), _scheme_name(scheme), Pictures.of(problem), calibration=batches)
    return _written(pw.save_module(quantized, out, calibration=batches))


def _nearest(problem: Problem, out: Path, scheme: NetworkScheme) -> Made:
    net = problem.network()
    fold_batch_norms_(net)
    for module in net.modules():
        if isinstance(module, _SITES):
            module.weight.data = rounded(module.weight.data, bits=scheme.weights)
    return Made(of_torch(net), {})


def rounded(weight: Tensor, *, bits: int) -> Tensor:
    """Of the shape of `weight`: each output channel on a symmetric grid, its step the largest weight / largest code.

    w = s clamp(round(w / s), -2^(bits-1), 2^(bits-1) - 1), s = max |w| / (2^(bits-1) - 1); float32, ties to even.
    """
    levels = 2 ** (bits - 1)
    rows = weight.flatten(1)
    peak = rows.abs().amax(1, keepdim=True)
    steps = torch.where(peak == 0, 1.0, peak / (levels - 1))
    return ((rows / steps).round().clamp(-levels, levels - 1) * steps).view_as(weight)


def fold_batch_norms_(net: nn.Module) -> None:
    """Multiply convolutions by the BatchNorm that follows them, bnN after convN as in `networks.py`."""
    for module in net.modules():
        for name, child in list(module.named_children()):
            norm = getattr(module, name.replace("conv", "bn"), None)
            if isinstance(child, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, nn.utils.fuse_conv_bn_eval(child, norm))
                setattr(module, name.replace("conv", "bn"), nn.Identity())


METHODS: dict[str, Callable[[Problem, Path, NetworkScheme], Made]] = {
    "ptq": _calibrated,
    "ptq-unequalized": _unequalized,
    "minmax": _minmax,
    "minmax-equalized": _minmax_equalized,
    "qat": _trained,
    "nearest": _nearest,
}


def quantize(arguments: argparse.Namespace, clock: common.Clock) -> dict[str, Any]:
    """Make it, run it on the judged inputs, and say what the record says."""
    problem = Problem(arguments.problem)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with clock.phase("quantize"):
        made = METHODS[arguments.method](problem, arguments.out, arguments.scheme)
    with clock.phase("judge"):
        np.save(arguments.out / OUTPUTS_FILE, problem.outputs(made.run))
    record, file = made.record, arguments.out / MODEL_FILE
    if file.exists() and arguments.scheme.activations is not None:
        with clock.phase("compare with integers"):
            record |= {"integers": mismatches(problem, file)}
    return {"record": record}


def mismatches(problem: Problem, file: Path) -> dict[str, Any]:
    """Output values of ONNX Runtime and of our simulation of its integers on the first judged inputs: how many there
    are, how many differ, and the first layer that does."""
    import onnxruntime

    from pennyweight.evaluate.onnx.integer.agreement import compare_layers

    numbers = sum(values[0].size for values in problem.arrays("judged").values())
    inputs = next(problem.batches("judged", size=min(BATCH, max(1, _COMPARED // numbers))))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = compare_layers(file, fed(names_of(session), inputs))
    first = found.first
    return {
        "outputs": found.elements,
        "mismatches": found.mismatches,
        "layers": len(found.layers),
        "layers_that_differ": sum(layer.alone.mismatches > 0 for layer in found.layers),
        "first": None if first is None else f"{first.node} ({first.op})",
        "not_simulated": sorted({layer.op for layer in found.not_simulated}),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision.ours", description=__doc__.split("\n\n")[0])
    parser.add_argument("problem", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=tuple(METHODS), required=True)
    parser.add_argument("--scheme", type=NetworkScheme.parse, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    common.answer(parse_arguments(), quantize, _PACKAGES)
