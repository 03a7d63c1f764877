"""The quantizers of ONNX Runtime, with their defaults but for what the scheme says and what its guide advises.

minmax, entropy, percentile   quantize_static: QDQ, uint8 activations, int8 or int4 weights, after its preprocessing
dynamic                       quantize_dynamic: int8 weights, activations rounded as they come
rtn, hqq                      MatMulNBitsQuantizer: blocks of weights; "-embedding": embeddings as well
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

from benchmarks.peers.vision.schemes import NetworkScheme
from benchmarks.vision.problem import MODEL_FILE, Arrays, Problem, Run, of_onnx

METHODS = ("minmax", "entropy", "percentile", "dynamic", "rtn", "rtn-embedding", "hqq")
_STATIC = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}


def quantize(problem: Problem, out: Path, *, method: str, scheme: NetworkScheme) -> Run:
    """Write a file into `out` and return how it runs; a refusal is an error, the library's own where it has one."""
    file, prepared = out / MODEL_FILE, out / "prepared.onnx"
    _preprocess(problem, prepared)
    if method in _STATIC:
        _static(problem, prepared, file, method=_STATIC[method], scheme=scheme)
    elif method == "dynamic":
        _dynamic(prepared, file, scheme)
    else:
        _blocks(prepared, file, method=method, scheme=scheme)
    prepared.unlink()
    return of_onnx(file)


def _preprocess(problem: Problem, file: Path) -> None:
    """Shapes, constant folding and BatchNorm folding, as the guide to static quantization has it.

    Its symbolic inference of shapes ends with an error on the encoder's mask; the guide lets one leave it out.
    """
    quant_pre_process(str(problem.float_file), str(file), skip_symbolic_shape=problem.is_encoder)


class _Reader:
    """`CalibrationDataReader` over the calibration inputs."""

    def __init__(self, problem: Problem) -> None:
        self._batches: Iterator[Arrays] = problem.batches("calibration")

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)


def _static(problem: Problem, source: Path, file: Path, *, method: str, scheme: NetworkScheme) -> None:
    if scheme.activations is None:
        raise ValueError("quantize_static always quantizes activations: it has no weight-only mode")
    types = {8: QuantType.QInt8, 4: QuantType.QInt4}
    if scheme.weights not in types:
        raise ValueError(f"quantize_static has no weights of {scheme.weights} bits: its types are {list(QuantType)}")
    quantize_static(
        str(source),
        str(file),
        _Reader(problem),
        quant_format=QuantFormat.QDQ,
        per_channel=scheme.is_per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=types[scheme.weights],
        calibrate_method=CalibrationMethod[method],
    )


def _dynamic(source: Path, file: Path, scheme: NetworkScheme) -> None:
    quantize_dynamic(str(source), str(file), per_channel=scheme.is_per_channel, weight_type=QuantType.QInt8)


def _blocks(source: Path, file: Path, *, method: str, scheme: NetworkScheme) -> None:
    kinds = ("MatMul", "Gather") if method.endswith("-embedding") else ("MatMul",)
    model = onnx.load(source)
    before = sum(node.op_type in kinds for node in model.graph.node)
    if method == "hqq":
        config = nbits.HQQWeightOnlyQuantConfig(
            block_size=scheme.group, bits=scheme.weights, op_types_to_quantize=kinds
        )
    else:
        config = nbits.DefaultWeightOnlyQuantConfig(
            block_size=scheme.group,
            is_symmetric=True,
            bits=scheme.weights,
            op_types_to_quantize=kinds,
            accuracy_level=4,
        )
    quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    made = quantizer.model.model
    after = sum(node.op_type in kinds for node in made.graph.node)
    if before == after:
        raise ValueError(f"MatMulNBitsQuantizer found nothing to quantize: it takes {', '.join(kinds)} alone")
    onnx.save(made, file)
