"""Whether a runtime computes from a file what we mean by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.containers.onnx import Runtime
from pennyweight.core.errors import VerificationError
from pennyweight.evaluate.onnx.bounds import relative_error
from pennyweight.evaluate.onnx.runtime import Array, Opened, as_tensors, opened

_REASONS = (
    "Codes that differ by more than rounding point at another reader of the file: a processor without VNNI, where "
    "ONNX Runtime adds products of uint8 and int8 in int16 (use int7-channel weights), or a fault of this version"
)


@dataclass(frozen=True)
class OutputAgreement:
    """One output of the file against ours, over all samples that were run.

    relative_error  |y - ŷ| / |y|; allowed: see allowed_errors
    largest         largest |y - ŷ|
    top1            share of samples whose largest number is the same one, of outputs [samples, classes]
    kl              mean over those samples of KL(ours || theirs) of the softmax, in nats
    """

    name: str
    elements: int
    relative_error: float
    allowed: float
    largest: float
    top1: float | None = None
    kl: float | None = None

    @property
    def holds(self) -> bool:
        return self.relative_error <= self.allowed


@dataclass(frozen=True)
class RuntimeAgreement:
    """A file in one runtime against our own evaluation of its codes. settings: of the runtime, that bear on numbers."""

    runtime: str
    settings: dict[str, str]
    samples: int
    outputs: tuple[OutputAgreement, ...]

    def check(self, path: Path) -> None:
        """Raise VerificationError that names the outputs which are too far off."""
        bad = [output for output in self.outputs if not output.holds]
        if bad:
            told = "; ".join(
                f"{output.name} is {output.relative_error:.3g} off (relative), {output.allowed:.3g} is allowed"
                for output in bad
            )
            raise VerificationError(
                f"{path}: {self.runtime} computes something else than the codes say: {told}. {_REASONS}"
            )


def agreement(
    path: Path,
    feeds: Sequence[dict[str, Array]],
    ours: Sequence[Sequence[Tensor]],
    allowed: Sequence[float],
    *,
    runtime: Runtime = "onnxruntime",
) -> RuntimeAgreement:
    """Run `path` on each of `feeds` and compare what it gives with `ours`, the outputs for each of them in order."""
    file = opened(path, runtime)
    theirs = [as_tensors(file(feed)) for feed in feeds]
    _check_outputs(path, file, ours, theirs)
    outputs = tuple(
        _compared(name, [batch[place] for batch in ours], [batch[place] for batch in theirs], allowed[place])
        for place, name in enumerate(file.outputs)
    )
    samples = sum(next((int(array.shape[0]) for array in feed.values() if array.ndim), 1) for feed in feeds)
    return RuntimeAgreement(file.version, dict(file.settings), samples, outputs)


def _check_outputs(
    path: Path, file: Opened, ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]
) -> None:
    for batch, (some, other) in enumerate(zip(ours, theirs, strict=True)):
        wanted, found = ([tuple(tensor.shape) for tensor in tensors] for tensors in (some, other))
        if wanted != found:
            raise VerificationError(
                f"{path}: {file.version} gives outputs of the shapes {found} in batch {batch}, the network {wanted}"
            )


def _compared(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], allowed: float) -> OutputAgreement:
    elements = sum(y.numel() for y in ours)
    error = relative_error(ours, theirs)
    largest = max(
        float((y.double() - other.double()).abs().max()) if y.numel() else 0.0
        for y, other in zip(ours, theirs, strict=True)
    )
    if math.isnan(error):
        error = math.inf
    if not all(y.dim() == 2 and y.shape[1] > 1 and y.is_floating_point() for y in ours):
        return OutputAgreement(name, elements, error, allowed, largest)
    y, other = torch.cat(list(ours)).double(), torch.cat(list(theirs)).double()
    same = float((y.argmax(1) == other.argmax(1)).double().mean())
    log_p, log_q = y.log_softmax(1), other.log_softmax(1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    return OutputAgreement(name, elements, error, allowed, largest, same, max(0.0, kl))
