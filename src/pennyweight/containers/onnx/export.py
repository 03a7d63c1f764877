"""torch.onnx.export without a word."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from pennyweight.core.errors import ContainerError, require
from pennyweight.models.network.network import Network


def exported(network: Network, opset: int) -> Any:
    """`network` as an onnx_ir Model of `opset`, inputs named as the values of its graph; raises ContainerError that
    names the operation for which ONNX has none."""
    for module in ("onnx", "onnx_ir", "onnxscript"):
        require(module, extra="onnx")
    args, kwargs = network.example.args, dict(network.example.kwargs)
    with _quiet():
        try:
            program = torch.onnx.export(
                network.graph, args, kwargs=kwargs, dynamo=True, dynamic_shapes=network.dynamic, opset_version=opset,
                verbose=False, external_data=False,
            )  # fmt: skip
        except Exception as error:
            raise ContainerError(f"torch.onnx cannot write the network: {_reason(error)}") from error
    assert program is not None
    return program.model


def _reason(error: BaseException) -> str:
    """The first lines of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return "; ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout or stderr, no warnings, no log records."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    unread = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
