"""NNCF: `nncf.quantize` and `nncf.compress_weights` on the ONNX file, and on the network where ONNX is refused.

fast            quantize with its defaults: ranges by min-max, and fast bias correction
accurate        the same with the full bias correction
minmax          without any bias correction
torch-fast      on the network in torch, for a device that has weights of 4 bits; judged by its own fake quantization
torch-minmax    the same without bias correction
compress        compress_weights; by its defaults embeddings stay at 8 bits where the others have 4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
import onnx
import onnx.version_converter
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

from benchmarks.peers.vision.schemes import NetworkScheme
from benchmarks.vision.problem import MODEL_FILE, Problem, Run, of_onnx, of_torch

METHODS = ("fast", "accurate", "minmax", "torch-fast", "torch-minmax", "compress")


def quantize(problem: Problem, out: Path, *, method: str, scheme: NetworkScheme) -> Run:
    """Write a file into `out` if there is one, and return how the result runs; a refusal is an error of NNCF's own."""
    if method.startswith("torch-"):
        items = [batch[0] for batch in problem.tensors("calibration", size=1)]
        return of_torch(_quantized(problem, problem.network(), items, method=method, scheme=scheme))
    model = onnx.load(problem.float_file)
    if method == "compress":
        made = _compressed(model, scheme)
    else:
        if problem.is_encoder:
            # What NNCF makes of it at 21 has zero points of another type than it says, and is not loaded.
            model = onnx.version_converter.convert_version(model, 20)
        made = _quantized(problem, model, list(problem.batches("calibration", size=1)), method=method, scheme=scheme)
    onnx.save(made, out / MODEL_FILE)
    return of_onnx(out / MODEL_FILE)


def _quantized(problem: Problem, model: Any, items: list[Any], *, method: str, scheme: NetworkScheme) -> Any:
    if scheme.activations is None:
        raise ValueError("nncf.quantize always quantizes activations; compress_weights is its weight-only mode")
    bits = None if scheme.weights == 8 else scheme.weights
    return nncf.quantize(
        model,
        nncf.Dataset(items),
        subset_size=len(items),
        fast_bias_correction=method != "accurate",
        model_type=nncf.ModelType.TRANSFORMER if problem.is_encoder else None,
        # The only one whose description has weights of 4 bits.
        target_device=nncf.TargetDevice.NPU if bits else nncf.TargetDevice.ANY,
        advanced_parameters=AdvancedQuantizationParameters(
            disable_bias_correction=method.endswith("minmax"),
            weights_quantization_params=QuantizationParameters(num_bits=bits, per_channel=scheme.is_per_channel),
        ),
    )


def _compressed(model: Any, scheme: NetworkScheme) -> Any:
    if scheme.activations is not None:
        raise ValueError("compress_weights leaves activations in float")
    mode = nncf.CompressWeightsMode[f"INT{scheme.weights}_SYM"]
    options: dict[str, Any] = {} if scheme.weights == 8 else {"group_size": scheme.group or -1}
    return nncf.compress_weights(model, mode=mode, **options)
