"""What every tool is given: a directory with one network and the inputs that calibrate, train and judge it.

    problem.json              the builder in `networks.py` and its config
    weights.safetensors       the state of the network
    calibration.safetensors   inputs by name; judged.safetensors too
    train.safetensors         images and labels; only where there is something to train on
    float.onnx                the network before anything is done to it

Imports nothing of Pennyweight: peers read it too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.vision.networks import BUILDERS

Arrays = dict[str, NDArray[Any]]
# Inputs of a batch, by name -> float32 [batch, width].
Run = Callable[[Arrays], NDArray[np.float32]]

FLOAT_FILE, ABOUT_FILE, WEIGHTS_FILE = "float.onnx", "problem.json", "weights.safetensors"
OUTPUT = "output"
# What a tool leaves: its file, if it can write one, and float32 [n, width] of the judged inputs.
MODEL_FILE, OUTPUTS_FILE = "model.onnx", "outputs.npy"
# Of everything that runs over more inputs than one.
BATCH = 50


@dataclass(frozen=True)
class Problem:
    """A directory that holds what the module's docstring says."""

    path: Path

    @property
    def float_file(self) -> Path:
        return self.path / FLOAT_FILE

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / ABOUT_FILE).read_text(encoding="utf-8"))
        return found

    @property
    def is_encoder(self) -> bool:
        return bool(self.about["builder"] == "sentence-encoder")

    def network(self) -> nn.Module:
        """The float network, in evaluation mode."""
        return built(self.about, load_file(self.path / WEIGHTS_FILE))

    def arrays(self, part: str) -> Arrays:
        """The inputs (and labels) of `part`: calibration, judged or train."""
        return load_arrays(self.path / f"{part}.safetensors")

    def batches(self, part: str, *, size: int = BATCH) -> Iterator[Arrays]:
        """Slices of `arrays(part)`."""
        arrays = self.arrays(part)
        for start in range(0, len(next(iter(arrays.values()))), size):
            yield {name: values[start : start + size] for name, values in arrays.items()}

    def tensors(self, part: str, *, size: int = BATCH) -> Iterator[tuple[Tensor, ...]]:
        """The same as tensors, in the order in which the network takes them."""
        for batch in self.batches(part, size=size):
            yield tuple(torch.from_numpy(batch[name]) for name in self.about["inputs"])

    def outputs(self, run: Run) -> NDArray[np.float32]:
        """float32 [n, width]: what `run` makes of the judged inputs."""
        return np.concatenate([run(batch) for batch in self.batches("judged")])


def built(about: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """The network of a problem with the weights `state`, in evaluation mode."""
    config = () if about["config"] is None else (about["config"],)
    net = BUILDERS[about["builder"]](*config)
    net.load_state_dict(state)
    return net.eval()


def of_torch(net: Callable[..., Tensor]) -> Run:
    """For `outputs`: a network in memory."""

    def run(batch: Arrays) -> NDArray[np.float32]:
        with torch.no_grad():
            made: NDArray[np.float32] = net(*(torch.from_numpy(values) for values in batch.values())).numpy()
        return made

    return run


def of_onnx(file: Path) -> Run:
    """For `outputs`: a file in ONNX Runtime on the CPU, as its user gets it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    wanted = session.get_outputs()[0].name

    def run(batch: Arrays) -> NDArray[np.float32]:
        made: NDArray[np.float32] = session.run([wanted], batch)[0]
        return made

    return run
