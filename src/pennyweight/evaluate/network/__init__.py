"""A network from memory to a verified ONNX file in one call, and such a file checked again."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.evaluate.network.quantize import quantize_module
    from pennyweight.evaluate.network.saved import QuantizedModule, save_module

__all__ = ["QuantizedModule", "quantize_module", "save_module"]

# Looking at a directory imports neither torch nor the pipeline.
_LAZY = {
    "QuantizedModule": "pennyweight.evaluate.network.saved",
    "quantize_module": "pennyweight.evaluate.network.quantize",
    "save_module": "pennyweight.evaluate.network.saved",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
