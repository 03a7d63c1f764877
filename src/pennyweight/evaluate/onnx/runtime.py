"""ONNX files opened in the runtimes that read them, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pennyweight.containers.onnx import Runtime
from pennyweight.core.errors import UsageError, VerificationError, require
from pennyweight.models.network.network import Inputs, Network

Array = NDArray[Any]
_ERRORS_ONLY = 3
# OpenVINO rounds to bfloat16 and quantizes what enters linear maps unless it is told not to.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@dataclass(frozen=True)
class Opened:
    """A file that a runtime has loaded.

    version   "onnxruntime 1.32.0"
    settings  that bear on its numbers
    inputs    names of what it takes; outputs: of what it gives, in order
    run       arrays by name -> arrays, in the order of `outputs`
    """

    version: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[Mapping[str, Array]], list[Array]] = field(repr=False)
    settings: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, arrays: Mapping[str, Array]) -> list[Array]:
        """Runs with those of `arrays` that the file takes; raises VerificationError in the runtime's words."""
        try:
            return self.run({name: arrays[name] for name in self.inputs})
        except KeyError as error:
            raise UsageError(f"the file takes {', '.join(self.inputs)}: {error} was not given") from error
        except Exception as error:
            raise VerificationError(f"{self.version} cannot run the file: {error}") from error


def opened(path: Path, runtime: Runtime = "onnxruntime", *, threads: int = 0, is_exact: bool = True) -> Opened:
    """`path` in `runtime`, on `threads` threads (0: as many as it takes).

    is_exact  OpenVINO computes in float32 what is not integers, which it does not by itself

    Raises VerificationError in the runtime's words where it cannot load the file.
    """
    open_in = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}[runtime]
    module = require(runtime, extra="onnx")
    try:
        return open_in(module, path, threads, is_exact)
    except Exception as error:
        raise VerificationError(f"{path}: {runtime} {module.__version__} cannot open it: {error}") from error


def _in_onnxruntime(module: Any, path: Path, threads: int, is_exact: bool) -> Opened:
    options = module.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    session = module.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = tuple(output.name for output in session.get_outputs())
    return Opened(
        f"onnxruntime {module.__version__}",
        tuple(given.name for given in session.get_inputs()),
        outputs,
        lambda arrays: list(session.run(outputs, dict(arrays))),
    )


def _in_openvino(module: Any, path: Path, threads: int, is_exact: bool) -> Opened:
    settings: dict[str, Any] = dict(_EXACT) if is_exact else {}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = module.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()

    def run(arrays: Mapping[str, Array]) -> list[Array]:
        found = request.infer(dict(arrays))
        return [np.array(found[output]) for output in compiled.outputs]

    version = str(module.__version__).split("-")[0]
    return Opened(
        f"openvino {version}",
        tuple(given.any_name for given in compiled.inputs),
        tuple(output.any_name for output in compiled.outputs),
        run,
        {name: str(value) for name, value in settings.items()},
    )


def arrays_of(network: Network, inputs: Inputs) -> dict[str, Array]:
    """The arrays of `inputs` by the names that a file of `network` has for them."""
    return as_arrays(argument_tensors(network, inputs))


def argument_tensors(network: Network, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of `inputs` by the names of the arguments of the user's module."""
    names = [str(node.target) for node in network.graph.graph.nodes if node.name in network.input_values]
    return dict(zip(names, inputs.tensors, strict=True))


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}


def as_tensors(arrays: Sequence[Array]) -> list[Tensor]:
    return [torch.from_numpy(np.array(array)) for array in arrays]
